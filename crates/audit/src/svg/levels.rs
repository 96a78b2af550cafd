//! The weights, each divided by its block's absmax, with a format's values drawn in.

use super::{Frame, percent, ticks};
use crate::report::{BINS, Report};
use rankfold_backend::Format;

/// The plot of one format over the histogram of all tensors.
pub(crate) fn plot(report: &Report, format: Format) -> String {
    let counts = &report.totals.histogram;
    let total = report.totals.parameters as f64;
    let share: Vec<f64> = counts.iter().map(|count| 100.0 * *count as f64 / total).collect();
    let (y_ticks, top) = ticks(share.iter().copied().fold(0.0, f64::max));
    let title = format!("Weights and the values of {format} at block {}", report.shown_block);
    let description = format!(
        "A histogram of all weights divided by the largest magnitude of their block of {}, in {BINS} bins from -1 to \
         1, and a vertical line at each value that {format} has. Where the lines are dense and the histogram high, the \
         format spends its values where the weights are.",
        report.shown_block
    );
    let mut frame = Frame::new(&format!("levels-{format}"), &title, &description, (-1.04, 1.04), (0.0, top));
    frame.y_axis("weights in the bin", &y_ticks.iter().map(|y| (*y, percent(*y))).collect::<Vec<_>>());
    let x_ticks = [-1.0, -0.5, 0.0, 0.5, 1.0].map(|x| (x, x.to_string()));
    frame.x_axis("weight / largest of its block", &x_ticks);
    let width = 2.0 / BINS as f64;
    for (bin, share) in share.iter().enumerate() {
        let from = -1.0 + bin as f64 * width;
        let hint = format!("{from:.2} to {:.2}: {}", from + width, percent(*share));
        frame.bar("hist", (from, from + width), *share, &hint);
    }
    let mut values = format.values().to_vec();
    values.sort_by(f32::total_cmp);
    values.dedup();
    for value in values {
        frame.rule(&format!("level {format}"), value.into());
    }
    frame.finish()
}
