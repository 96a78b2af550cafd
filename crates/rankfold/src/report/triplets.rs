//! What AdaLoRA did: its budget over the steps, and the map of the ranks that are left.

use super::lines::Lines;
use super::panels::{Panel, Plot, Series};
use crate::ranks::{Rank, RankMap};
use rankfold_audit::page::escape;
use rankfold_audit::svg::number;
use serde_json::Value;
use std::fmt::Write;

/// The budget and the triplets that there are, step by step.
pub fn budget(lines: &Lines) -> Option<Panel> {
    let kept = lines.steps_by(|line| Some(ranks(line)?.iter().map(|(_, rank)| *rank as f64).sum()));
    let plot = Plot {
        id: "budget",
        title: "Triplets",
        y_name: "triplets, all modules",
        from_zero: true,
        limit: None,
        label: number,
        caption: "What the budget allows after each step, and the triplets that are not zero then: between two masks \
                  masked ones come back.",
    };
    let series = [("budget", lines.steps("budget")), ("kept", kept)];
    plot.panel(lines, series.map(|(name, points)| Series { name, points }).into())
}

/// Ranks by layer and module after the last step: the darker, the more.
pub fn map(lines: &Lines) -> Option<Panel> {
    let map = RankMap::of(&ranks(lines.last_step()?)?);
    let most = map.ranks.iter().flatten().flatten().copied().max().unwrap_or(0).max(1);
    let mut table = String::from("<table><thead><tr><th>layer</th>");
    for module in &map.modules {
        let _ = write!(table, "<th>{}</th>", escape(module));
    }
    table.push_str("</tr></thead><tbody>");
    for (layer, ranks) in map.layers.iter().zip(&map.ranks) {
        let _ = write!(table, "<tr><th>{}</th>", escape(layer));
        for rank in ranks {
            match rank {
                // At 45 % of the colour at most, text keeps its contrast on either background.
                Some(rank) => {
                    let share = 45 * rank / most;
                    let _ = write!(
                        table,
                        "<td style=\"background:color-mix(in srgb,var(--first) {share}%,var(--card))\">{rank}</td>"
                    );
                }
                None => table.push_str("<td></td>"),
            }
        }
        table.push_str("</tr>");
    }
    table.push_str("</tbody></table>");
    let caption = "The triplets that each module has left after the last step. The darker, the more.".into();
    Some(Panel { title: "Ranks".into(), drawing: table, caption })
}

/// A step's ranks, where it has any.
fn ranks(line: &Value) -> Option<Vec<Rank>> {
    let ranks = line["ranks"].as_object()?.iter();
    ranks.map(|(path, rank)| Some((path.clone(), usize::try_from(rank.as_u64()?).ok()?))).collect()
}
