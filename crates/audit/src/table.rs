//! The totals as a table of text: a line for each format, block and kind of scales.

use crate::number::{count, decibels, part, short};
use crate::report::{Figures, Report};
use std::fmt::Write;

const HEADS: [&str; 10] =
    ["format", "block", "scales", "bits", "mean err", "max err", "rel err", "rms err", "SNR dB", "bound used"];

/// The table, with a line on its weights above it and one on its marks below.
pub fn table(report: &Report) -> String {
    let totals = &report.totals;
    let rows: Vec<_> = totals.results.iter().map(row).collect();
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).chain([HEADS[i].len()]).max().unwrap_or(0);
    let widths: [usize; HEADS.len()] = std::array::from_fn(width);
    let mut text = format!("{} weights in {} tensors", count(totals.parameters), totals.tensors);
    let fits = totals.fits.iter().map(|(fit, n)| format!("{n} {}", fit.name()));
    let _ = writeln!(text, " ({})", fits.collect::<Vec<_>>().join(", "));
    line(&mut text, &widths, &HEADS.map(String::from), ' ');
    for (row, figures) in rows.iter().zip(&totals.results) {
        line(&mut text, &widths, row, if report.is_best(figures) { '*' } else { ' ' });
    }
    text.push_str("* the lowest mean error at these bits a parameter\n");
    let broken = totals.results.iter().filter(|figures| !figures.certified).count();
    text.push_str(&match broken {
        0 => "every weight keeps the bound of its error\n".into(),
        n => format!("THE BOUND IS BROKEN in {n} lines: bound used is above 100 %\n"),
    });
    text
}

fn row(figures: &Figures) -> [String; HEADS.len()] {
    [
        figures.format.to_string(),
        figures.block.to_string(),
        figures.scales().into(),
        format!("{:.4}", figures.size.bits_per_parameter),
        short(figures.mean_error),
        short(figures.max_error),
        short(figures.mean_relative_error),
        short(figures.rms_error),
        decibels(figures.snr_db),
        part(figures.bound_used),
    ]
}

/// Words to the left, numbers to the right.
fn line(text: &mut String, widths: &[usize], cells: &[String], mark: char) {
    let mut line = String::from(mark);
    for (i, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let _ = if i == 0 || i == 2 { write!(line, " {cell:<width$}") } else { write!(line, " {cell:>width$}") };
    }
    text.push_str(line.trim_end());
    text.push('\n');
}
