//! `report.html`: a run's `metrics.jsonl` as one page that needs nothing else, written when the run ends.
//!
//! Each panel is a function from the lines to a drawing, or to none where the lines do not have what it draws
//! ([`panels`]).

mod lines;
mod panels;
mod triplets;

use crate::error::{Error, Result};
use crate::show::bytes;
use crate::study::spread::median;
use lines::Lines;
use rankfold_audit::page::{Page, fact, figure};
use std::path::{Path, PathBuf};

/// Whether a run has what a report is made of, and no report.
pub fn is_missing(folder: &Path) -> bool {
    folder.join("metrics.jsonl").exists() && !folder.join("report.html").exists()
}

/// Write the report of the run in `folder`, which was to stay within `limit` bytes if that is given; where it is.
pub fn write(folder: &Path, limit: Option<u64>) -> Result<PathBuf> {
    let metrics = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics).map_err(Error::io(&metrics))?;
    let lines = Lines::parse(&text, limit).map_err(|why| Error::Path { path: metrics, why })?;
    let path = folder.join("report.html");
    rankfold_files::write_atomically(&path, html(&folder.display().to_string(), &lines).as_bytes())?;
    Ok(path)
}

/// The page of a run of this name.
fn html(name: &str, lines: &Lines) -> String {
    let mut page = Page::new(&format!("The run {name}"));
    let body = page.body();
    body.push_str("<dl class=\"facts\">");
    facts(body, lines);
    body.push_str("</dl><div class=\"plots\">");
    for panel in panels::PANELS.iter().filter_map(|panel| panel(lines)) {
        figure(body, &panel.title, &panel.drawing, &panel.caption);
    }
    body.push_str("</div>");
    page.finish()
}

/// What came of it, in figures.
fn facts(page: &mut String, lines: &Lines) {
    let from_to = |points: &[(f64, f64)]| match points {
        [] => None,
        [(_, only)] => Some(format!("{only:.4}")),
        [(_, first), .., (_, last)] => Some(format!("{first:.4} → {last:.4}")),
    };
    let sum = |field: &str| lines.steps(field).iter().map(|(_, y)| y).sum::<f64>();
    let most = |field: &str| lines.steps(field).iter().map(|(_, y)| *y).fold(0.0, f64::max);
    let rates: Vec<f64> = lines.steps("tokens_per_second").iter().map(|(_, rate)| *rate).collect();
    let paged = !lines.steps("paged_in").is_empty();
    let facts = [
        ("Steps", Some(format!("{}", lines.last()))),
        ("Loss", from_to(&lines.steps("loss"))),
        ("Held-out loss", from_to(&lines.evaluations("eval_loss"))),
        ("Tokens a second", median(&rates).map(|rate| format!("{rate:.0}"))),
        ("Memory at the most", Some(most("peak_rss")).filter(|peak| *peak > 0.0).map(|peak| bytes(peak as u64))),
        ("Memory limit", lines.limit.map(bytes)),
        ("Paged in", paged.then(|| bytes(sum("paged_in") as u64))),
        ("Paged out", paged.then(|| bytes(sum("paged_out") as u64))),
        ("Waited for pages", paged.then(|| format!("{:.1} s", sum("stall_seconds")))),
    ];
    for (name, value) in facts {
        if let Some(value) = value {
            fact(page, name, &value);
        }
    }
}

#[cfg(test)]
mod tests;
