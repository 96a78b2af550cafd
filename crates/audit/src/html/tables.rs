//! The page's tables, each in a box that scrolls by itself and that a keyboard can reach.

use crate::number::{count, decibels, part, short};
use crate::page::escape;
use crate::report::{Report, find};
use std::fmt::Write;

/// A table in its box: the first `left` columns are words.
fn table(page: &mut String, label: &str, heads: &[String], left: usize, rows: impl Iterator<Item = Row>) {
    let _ = write!(
        page,
        "<div class=\"box\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table><thead><tr>",
        escape(label)
    );
    for (i, head) in heads.iter().enumerate() {
        let _ = write!(page, "<th scope=\"col\"{}>{}</th>", class(i < left), escape(head));
    }
    page.push_str("</tr></thead><tbody>");
    for row in rows {
        page.push_str(if row.is_best { "<tr class=\"best\">" } else { "<tr>" });
        for (i, cell) in row.cells.iter().enumerate() {
            let cell = escape(cell);
            let _ = match i {
                0 => write!(page, "<th scope=\"row\" class=\"l\">{cell}</th>"),
                _ => write!(page, "<td{}>{cell}</td>", class(i < left)),
            };
        }
        if let Some(sentence) = row.sentence {
            let _ = write!(page, "<td class=\"say\">{}</td>", escape(&sentence));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
}

fn class(is_words: bool) -> &'static str {
    if is_words { " class=\"l\"" } else { "" }
}

struct Row {
    is_best: bool,
    cells: Vec<String>,
    sentence: Option<String>,
}

/// Every format, block and kind of scales.
pub(super) fn totals(page: &mut String, report: &Report) {
    let heads = [
        "format",
        "scales",
        "block",
        "bits a parameter",
        "mean error",
        "max error",
        "relative error",
        "RMS error",
        "SNR, dB",
        "code entropy",
        "padding, bits",
        "bound used",
    ];
    let rows = report.totals.results.iter().map(|figures| {
        let is_best = report.is_best(figures);
        let star = if is_best { " \u{2605}" } else { "" };
        let cells = vec![
            format!("{}{star}", figures.format),
            figures.scales().into(),
            figures.block.to_string(),
            format!("{:.4}", figures.size.bits_per_parameter),
            short(figures.mean_error),
            short(figures.max_error),
            short(figures.mean_relative_error),
            short(figures.rms_error),
            decibels(figures.snr_db),
            format!("{:.3}", figures.code_entropy),
            short(figures.size.padding_bits),
            part(figures.bound_used),
        ];
        Row { is_best, cells, sentence: None }
    });
    table(page, "Totals", &heads.map(String::from), 2, rows);
}

/// A line a tensor: its weights' shape, and each format's error at the shown block.
pub(super) fn tensors(page: &mut String, report: &Report) {
    let (formats, block) = (report.formats(), report.shown_block);
    let mut heads: Vec<String> =
        ["tensor", "type", "shape", "mean", "sd", "skewness", "excess kurtosis", "Kolmogorov"].map(String::from).into();
    for format in &formats {
        heads.extend(["mean error", "SNR, dB", "bound used"].map(|head| format!("{format} {head}")));
    }
    heads.push("does NF4 fit?".into());
    let rows = report.tensors.iter().map(|tensor| {
        let weights = &tensor.weights;
        let mut cells = vec![
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("{} \u{d7} {}", tensor.shape[0], tensor.shape[1]),
            short(weights.mean),
            short(weights.sd),
            format!("{:.3}", weights.skewness),
            format!("{:.3}", weights.excess_kurtosis),
            format!("{:.4}", weights.kolmogorov),
        ];
        for format in &formats {
            if let Some(figures) = find(&tensor.results, *format, block, false) {
                cells.extend([short(figures.mean_error), decibels(figures.snr_db), part(figures.bound_used)]);
            }
        }
        Row { is_best: false, cells, sentence: Some(weights.verdict.clone()) }
    });
    table(page, "Tensors", &heads, 2, rows);
}

/// The worst weight of every format, block and kind of scales, with its bound.
pub(super) fn worst(page: &mut String, report: &Report) {
    let heads =
        ["format", "scales", "tensor", "block", "row", "column", "weight", "decoded", "error", "bound", "margin"];
    let rows = report.totals.results.iter().map(|figures| {
        let worst = &figures.worst;
        let cells = vec![
            figures.format.to_string(),
            figures.scales().into(),
            worst.tensor.clone(),
            figures.block.to_string(),
            count(worst.row as u64),
            count(worst.column as u64),
            short(worst.w),
            short(worst.decoded),
            short(worst.error),
            short(worst.bound),
            short(worst.margin),
        ];
        Row { is_best: false, cells, sentence: None }
    });
    table(page, "Worst weights", &heads.map(String::from), 3, rows);
}
