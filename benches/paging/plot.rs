//! A plot of all work: above, the time of a step over that without a pager, and dashed what the latter is beside plain
//! reads and writes of the same bytes; below, the bytes that a step moves over those of all its buffers. Both against
//! what may be in memory.

use crate::meter::{Figures, Series};
use std::fmt::Write;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 230.0;
const PANEL: f64 = 240.0;
const TOPS: [f64; 2] = [40.0, 372.0];
const HEIGHT: f64 = 672.0;
const COLOURS: [&str; 7] = ["#1b6ca8", "#7fb2d9", "#b5432a", "#e8a08f", "#3b7d4f", "#9ccaa8", "#5b3f8c"];

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#222}\
                     path{fill:none;stroke-width:2}.beside{stroke-dasharray:4 4;stroke-width:1.3}";

/// One of the two panels: where it lies, and its range upwards, in powers of two or evenly.
struct Panel {
    top: f64,
    range: (f64, f64),
    powers: bool,
}

impl Panel {
    fn y(&self, value: f64) -> f64 {
        let at = |value: f64| if self.powers { value.max(1e-9).log2() } else { value };
        let (low, high) = (at(self.range.0), at(self.range.1));
        self.top + PANEL * (1.0 - (at(value).clamp(low, high) - low) / (high - low))
    }

    /// Grid lines with their numbers, ticks below, and the names of both axes.
    fn frame(&self, svg: &mut String, title: &str, marks: &[(f64, String)], shares: &[f64]) {
        let (right, bottom) = (WIDTH - RIGHT, self.top + PANEL);
        for (value, label) in marks {
            let y = self.y(*value);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 8.0,
                y + 4.5
            );
        }
        for (i, share) in shares.iter().enumerate() {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0} %</text>",
                x(i, shares.len()),
                bottom + 20.0,
                100.0 * share
            );
        }
        let _ = write!(
            svg,
            "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{right}\" y2=\"{bottom}\"/>\
             <text x=\"{LEFT}\" y=\"{:.1}\">{title}</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">of all bytes may be in memory</text>",
            self.top - 14.0,
            (LEFT + right) / 2.0,
            bottom + 40.0
        );
    }

    fn path(&self, svg: &mut String, class: &str, colour: &str, series: &Series, value: impl Fn(&Figures) -> f64) {
        let mut path = String::new();
        for (i, row) in series.rows.iter().enumerate() {
            if let Some(figures) = &row.figures {
                let letter = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{letter}{:.1} {:.1}", x(i, series.rows.len()), self.y(value(figures)));
            }
        }
        let _ = write!(svg, "<path class=\"{class}\" stroke=\"{colour}\" d=\"{path}\"/>");
    }
}

/// Where the i-th of n limits is: they stand at equal distances, the highest first.
fn x(i: usize, n: usize) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * (i as f64 + 0.5) / n as f64
}

/// The drawing.
pub fn plot(series: &[Series]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\
         <title>What paging costs</title><style>{STYLE}</style>\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>"
    );
    let shares: Vec<f64> =
        series.first().map_or_else(Vec::new, |first| first.rows.iter().map(|row| row.share).collect());
    let most = |value: &dyn Fn(&Series, &Figures) -> f64| {
        let of = |series: &Series| {
            series.rows.iter().filter_map(|row| Some(value(series, row.figures.as_ref()?))).fold(0.0, f64::max)
        };
        series.iter().map(of).fold(0.0, f64::max)
    };
    let ratio = |_: &Series, figures: &Figures| figures.ratio;
    let beside = |figures: &Figures| figures.ratio / figures.over;
    let moved = |series: &Series, figures: &Figures| (figures.stored + figures.loaded) / series.bytes as f64;

    let doublings = most(&ratio).max(most(&|_, figures| beside(figures))).max(2.0).log2().ceil() as i32;
    let times = Panel { top: TOPS[0], range: (0.9, 2f64.powi(doublings)), powers: true };
    let marks: Vec<_> = (0..=doublings).map(|i| (2f64.powi(i), format!("{}", 1 << i))).collect();
    times.frame(&mut svg, "time of a step / without a pager (dashed: beside plain reads and writes)", &marks, &shares);

    let halves = (2.0 * most(&moved)).ceil().max(1.0) as usize;
    let bytes = Panel { top: TOPS[1], range: (0.0, halves as f64 / 2.0), powers: false };
    let marks: Vec<_> = (0..=halves).map(|i| (i as f64 / 2.0, format!("{:.1}", i as f64 / 2.0))).collect();
    bytes.frame(&mut svg, "bytes written and read by a step / all bytes", &marks, &shares);

    for (i, (series, colour)) in series.iter().zip(COLOURS).enumerate() {
        times.path(&mut svg, "beside", colour, series, beside);
        times.path(&mut svg, "time", colour, series, |figures| ratio(series, figures));
        bytes.path(&mut svg, "bytes", colour, series, |figures| moved(series, figures));
        let (left, y) = (WIDTH - RIGHT + 18.0, TOPS[0] + 12.0 + 22.0 * i as f64);
        let _ = write!(
            svg,
            "<path stroke=\"{colour}\" d=\"M{left} {:.1}h22\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 4.5,
            left + 30.0,
            series.name
        );
    }
    svg + "</svg>\n"
}
