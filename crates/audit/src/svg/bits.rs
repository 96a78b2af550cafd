//! Error against size: every format, block and kind of scales, over all tensors.
//!
//! The horizontal axis is logarithmic in what a parameter takes beyond its 4 bits, because the blocks double; its
//! labels are total bits.

use super::{Frame, percent, ticks};
use crate::report::Report;

/// The plot.
pub(crate) fn plot(report: &Report) -> String {
    let results = &report.totals.results;
    let overhead = |bits: f64| (bits - 4.0).max(1e-6).log2();
    let nominal = results.iter().map(|figures| overhead(figures.size.nominal_bits_per_parameter));
    let (least, most) = nominal.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
    // The vertical axis begins below the lowest error, not at 0: the differences are the point, and labels say so.
    let errors = || results.iter().map(|figures| 100.0 * figures.noise());
    let (steps, top) = ticks(errors().fold(0.0, f64::max));
    let lowest = errors().fold(f64::INFINITY, f64::min);
    let first = steps.iter().rposition(|step| *step <= lowest).unwrap_or(0);
    let title = "Error against bits a parameter";
    let description = "For each format, block size and kind of scales over all tensors: bits a parameter on a \
                       logarithmic axis of what is beyond 4 bits, and the error's root mean square as a percentage of \
                       the weights'. Filled marks are plain scales, hollow marks double quantisation. Larger blocks \
                       take fewer bits and lose more.";
    let mut frame = Frame::new("bits", title, description, (least - 0.5, most + 0.5), (steps[first], top));
    let labels: Vec<_> = steps[first..].iter().map(|y| (*y, percent(*y))).collect();
    frame.y_axis("error, share of the weights", &labels);
    let ticks = [4.002, 4.008, 4.031, 4.125, 4.5, 5.0].map(|bits| (overhead(bits), bits.to_string()));
    let ticks: Vec<_> = ticks.into_iter().filter(|(x, _)| (least - 0.5..=most + 0.5).contains(x)).collect();
    frame.x_axis("bits a parameter", &ticks);
    for format in report.formats() {
        for double in [false, true] {
            let line: Vec<_> = results.iter().filter(|r| (r.format, r.double) == (format, double)).collect();
            let at = |f: &crate::Figures| (overhead(f.size.nominal_bits_per_parameter), 100.0 * f.noise());
            let points: Vec<_> = line.iter().map(|figures| at(figures)).collect();
            frame.path(&format.to_string(), &points);
            for figures in line {
                let (x, y) = at(figures);
                let bits = figures.size.bits_per_parameter;
                let (block, scales) = (figures.block, figures.scales());
                let hint = format!("{format}, block {block}, {scales}: {bits:.4} bits, {}", percent(y));
                frame.mark(format, double, (x, y), &hint);
            }
        }
    }
    frame.finish()
}
