//! Error by layer: how far each tensor's weights are off, in the order of layers.
//!
//! The error's root mean square as a share of the weights' own, at the shown block with plain scales, so that tensors
//! of different sizes of weights can be compared.

use super::{Frame, percent, ticks};
use crate::report::{Report, find};

/// The plot.
pub(crate) fn plot(report: &Report) -> String {
    let (formats, block) = (report.formats(), report.shown_block);
    let noise = |tensor: usize, format| {
        find(&report.tensors[tensor].results, format, block, false).map(|figures| (100.0 * figures.noise(), figures))
    };
    let n = report.tensors.len();
    let all = (0..n).flat_map(|i| formats.iter().filter_map(move |format| noise(i, *format)));
    let (y_ticks, top) = ticks(all.map(|(noise, _)| noise).fold(0.0, f64::max));
    let description = format!(
        "For each of {n} tensors in the order of layers, the error's root mean square as a percentage of the weights' \
         root mean square, at block {block} with plain scales, one line a format."
    );
    let title = format!("Error by layer at block {block}");
    let mut frame = Frame::new("layers", &title, &description, (-0.5, n as f64 - 0.5), (0.0, top));
    let labels: Vec<_> = y_ticks.iter().map(|y| (*y, percent(*y))).collect();
    frame.y_axis("error, share of the weights", &labels);
    let (name, starts) = layer_starts(report);
    frame.x_axis(name, &starts);
    for (x, _) in starts.iter().skip(1) {
        frame.rule("grid", x - 0.5);
    }
    for format in formats {
        let points: Vec<_> = (0..n).filter_map(|i| noise(i, format).map(|(noise, _)| (i as f64, noise))).collect();
        frame.path(&format.to_string(), &points);
        // Beyond what fits, a mark a tensor would be a smear: a mark every so many, on the line of all.
        let every = n.div_ceil(60);
        for (x, y) in points.into_iter().step_by(every) {
            let hint = format!("{}: {format} {}", report.tensors[x as usize].name, percent(y));
            frame.mark(format, false, (x, y), &hint);
        }
    }
    frame.finish()
}

/// What the horizontal axis counts, and its ticks: the first tensor of every layer, at most about ten of them.
fn layer_starts(report: &Report) -> (&'static str, Vec<(f64, String)>) {
    let layer = |name: &str| name.split('.').find(|part| part.parse::<u32>().is_ok()).map(str::to_owned);
    let mut starts: Vec<(f64, String)> = Vec::new();
    for (i, tensor) in report.tensors.iter().enumerate() {
        if let Some(layer) = layer(&tensor.name)
            && starts.last().is_none_or(|(_, last)| *last != layer)
        {
            starts.push((i as f64, layer));
        }
    }
    if starts.is_empty() {
        let every = report.tensors.len().div_ceil(10).max(1);
        return ("tensor", (0..report.tensors.len()).step_by(every).map(|i| (i as f64, (i + 1).to_string())).collect());
    }
    let every = starts.len().div_ceil(10);
    ("layer (one point a tensor)", starts.into_iter().step_by(every).collect())
}
