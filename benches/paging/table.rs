//! The rows as text, aligned, and as Markdown.

use crate::disk::Disk;
use crate::meter::{Row, Series};
use std::fmt::Write;

const HEADS: [&str; 13] = [
    "in memory",
    "ms",
    "/ no pager",
    "written MiB",
    "read MiB",
    "ahead",
    "waited ms",
    "compute ms",
    "disk ms",
    "bound",
    "(spread)",
    "beside ms",
    "over",
];

/// The cells of a row, as [`HEADS`] calls them.
fn cells(row: &Row) -> [String; 13] {
    let share = format!("{:.0} %", 100.0 * row.share);
    let Some(figures) = &row.figures else {
        let mut cells = std::array::from_fn(|_| String::new());
        (cells[0], cells[1]) = (share, "refused".into());
        return cells;
    };
    let ms = |seconds: f64| format!("{:.1}", 1e3 * seconds);
    let mib = |bytes: f64| format!("{:.0}", bytes / f64::from(1 << 20));
    [
        share,
        ms(figures.seconds),
        format!("{:.2}", figures.ratio),
        mib(figures.stored),
        mib(figures.loaded),
        format!("{:.0} %", 100.0 * figures.ahead),
        ms(figures.stall),
        ms(figures.compute),
        ms(figures.disk),
        format!("{:.2}", figures.bound),
        format!("({:.2}–{:.2})", figures.spread[0], figures.spread[1]),
        ms(figures.beside),
        format!("{:.2}", figures.over),
    ]
}

/// For people who watch.
pub fn text(series: &Series) -> String {
    let mut text = format!("\n{}: {} MiB of buffers\n", series.name, series.bytes >> 20);
    let mut line = |cells: &[&str]| {
        let cells: String =
            cells.iter().zip(HEADS).map(|(cell, head)| format!("  {cell:>width$}", width = head.len())).collect();
        let _ = writeln!(text, "{cells}");
    };
    line(&HEADS);
    for row in &series.rows {
        line(&cells(row).each_ref().map(String::as_str));
    }
    text
}

/// For the record.
pub fn markdown(disk: &Disk, series: &[Series]) -> String {
    let mut text = format!("{disk}\n\n| work | {} |\n|---|{}\n", HEADS.join(" | "), "---:|".repeat(HEADS.len()));
    for series in series {
        for row in &series.rows {
            let _ = writeln!(text, "| {} | {} |", series.name, cells(row).join(" | "));
        }
    }
    text
}
