//! What a report draws, over the steps of a run.

use super::lines::Lines;
use super::triplets;
use rankfold_audit::page::escape;
use rankfold_audit::svg::{CLASSES, Frame, line_key, number, percent, ticks, ticks_between};

/// A drawing with its heading and its caption.
pub struct Panel {
    /// Its heading.
    pub title: String,
    /// Its legend, where there is more than one line in it, and the plot.
    pub drawing: String,
    /// What it shows.
    pub caption: String,
}

/// All panels, in their order; each of those lines that have what it draws.
pub const PANELS: [fn(&Lines) -> Option<Panel>; 6] = [loss, triplets::budget, triplets::map, memory, paged, stall];

/// The most points of a line: more would be drawn on each other.
const MOST_POINTS: usize = 1000;
/// The most points that are marked.
const MOST_MARKS: usize = 30;

/// A line of a plot.
pub(super) struct Series {
    pub name: &'static str,
    pub points: Vec<(f64, f64)>,
}

/// The training loss of every step, and the held-out loss where it was measured.
fn loss(lines: &Lines) -> Option<Panel> {
    let series = [("training", lines.steps("loss")), ("held-out", lines.evaluations("eval_loss"))];
    let plot = Plot {
        id: "loss",
        title: "Loss",
        y_name: "loss, nat a token",
        from_zero: false,
        limit: None,
        label: number,
        caption: "The objective before each step's update, and the mean loss of held-out tokens. Lower is better.",
    };
    plot.panel(lines, series.map(|(name, points)| Series { name, points }).into())
}

/// The most resident memory so far.
fn memory(lines: &Lines) -> Option<Panel> {
    let points = in_mib(lines.steps("peak_rss"));
    let plot = Plot {
        id: "memory",
        title: "Memory",
        y_name: "most so far, MiB",
        from_zero: true,
        limit: lines.limit.map(|bytes| bytes as f64 / MIB),
        label: number,
        caption: match lines.limit {
            Some(_) => "The process's largest resident memory so far, as the system counts it. Dashed: the limit.",
            None => "The process's largest resident memory so far, as the system counts it.",
        },
    };
    plot.panel(lines, vec![Series { name: "resident", points }])
}

/// Bytes that came and left within each step.
fn paged(lines: &Lines) -> Option<Panel> {
    let series = [("in", "paged_in"), ("out", "paged_out")];
    let plot = Plot {
        id: "paged",
        title: "Paged",
        y_name: "MiB a step",
        from_zero: true,
        limit: None,
        label: number,
        caption: "What each step brought back into memory, and what left it to make room.",
    };
    plot.panel(lines, series.map(|(name, field)| Series { name, points: in_mib(lines.steps(field)) }).into())
}

/// The part of each step's time that went in waiting for pages.
fn stall(lines: &Lines) -> Option<Panel> {
    let points = lines.steps_by(|line| {
        let seconds = line["tokens"].as_f64()? / line["tokens_per_second"].as_f64()?;
        Some(100.0 * line["stall_seconds"].as_f64()? / seconds)
    });
    let plot = Plot {
        id: "stall",
        title: "Waiting for pages",
        y_name: "share of the step's time",
        from_zero: true,
        limit: None,
        label: percent,
        caption: "How long the step waited for pages to come or to leave; what else moved, moved meanwhile.",
    };
    plot.panel(lines, vec![Series { name: "waiting", points }])
}

const MIB: f64 = (1u64 << 20) as f64;

fn in_mib(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    points.into_iter().map(|(step, bytes)| (step, bytes / MIB)).collect()
}

/// A plot over steps.
pub(super) struct Plot {
    pub id: &'static str,
    pub title: &'static str,
    pub y_name: &'static str,
    pub from_zero: bool,
    /// A dashed level.
    pub limit: Option<f64>,
    /// How a tick of the vertical axis is written.
    pub label: fn(f64) -> String,
    pub caption: &'static str,
}

impl Plot {
    /// None where the lines have none of it.
    pub fn panel(self, lines: &Lines, mut series: Vec<Series>) -> Option<Panel> {
        series.retain(|series| !series.points.is_empty());
        let all = || series.iter().flat_map(|series| &series.points).map(|(_, y)| *y).chain(self.limit);
        let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        if series.is_empty() {
            return None;
        }
        let (y_ticks, ends) = ticks_between(if self.from_zero { 0.0 } else { least }, most);
        let last = lines.last().max(1) as f64;
        let steps: Vec<f64> = ticks(last).0.into_iter().filter(|step| step.fract() == 0.0 && *step <= last).collect();
        let names = series.iter().map(|series| series.name).collect::<Vec<_>>().join(", ");
        let description = format!("{} Lines over {last} steps: {names}.", self.caption);
        let mut frame = Frame::new(self.id, self.title, &description, (0.0, last), ends);
        frame.y_axis(self.y_name, &y_ticks.iter().map(|y| (*y, (self.label)(*y))).collect::<Vec<_>>());
        frame.x_axis("step", &steps.iter().map(|step| (*step, step.to_string())).collect::<Vec<_>>());
        if let Some(limit) = self.limit {
            frame.level("even", limit);
        }
        for (series, class) in series.iter().zip(CLASSES) {
            frame.path(class, &thinned(&series.points));
            for point in series.points.iter().filter(|_| series.points.len() <= MOST_MARKS) {
                let hint = format!("{}, step {}: {}", series.name, point.0, (self.label)(point.1));
                frame.dot(class, *point, &hint);
            }
        }
        let legend = if series.len() > 1 { legend(&series) } else { String::new() };
        Some(Panel { title: self.title.into(), drawing: legend + &frame.finish(), caption: self.caption.into() })
    }
}

fn legend(series: &[Series]) -> String {
    let keys = series.iter().zip(CLASSES);
    let keys = keys.map(|(series, class)| format!("<li>{}{}</li>", line_key(class), escape(series.name)));
    format!("<ul class=\"legend\">{}</ul>", keys.collect::<String>())
}

/// No more points than can be told apart, the last one among them.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    points.iter().rev().step_by(every).rev().copied().collect()
}
