//! Plots as inline SVG: a frame with axes, and what the plots draw into it.
//!
//! A plot is 480 × 320 user units and scales with its column, so that its text is about 11 px high on a phone and
//! 16 px on a desktop. Colours are the page's variables, so that one drawing serves light and dark; every series also
//! differs by the shape of its marks or its dashes. Each plot carries a title and a description for screen readers.

pub(crate) mod bits;
pub(crate) mod codes;
pub(crate) mod layers;
pub(crate) mod levels;

use crate::page::escape;
use rankfold_backend::Format;
use std::fmt::Write;

/// The colours and dashes of series, in their order.
pub const CLASSES: [&str; 3] = ["first", "second", "third"];

pub(crate) const WIDTH: f64 = 480.0;
pub(crate) const HEIGHT: f64 = 320.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 54.0;

/// A plot in the making.
#[derive(Debug)]
pub struct Frame {
    svg: String,
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    /// An empty plot of `x` and `y` ranges; `id` is unique in the page.
    pub fn new(id: &str, title: &str, description: &str, x: (f64, f64), y: (f64, f64)) -> Self {
        let (title, description) = (escape(title), escape(description));
        let svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">\
             <title id=\"{id}-title\">{title}</title><desc id=\"{id}-desc\">{description}</desc>"
        );
        Self { svg, x, y }
    }

    pub(crate) fn px(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    pub(crate) fn py(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }

    /// Horizontal grid lines with their numbers, and the axis's name.
    pub fn y_axis(&mut self, name: &str, ticks: &[(f64, String)]) {
        let (left, right) = (LEFT, WIDTH - RIGHT);
        for (at, label) in ticks {
            let y = self.py(*at);
            let _ = write!(
                self.svg,
                "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 6.0,
                y + 5.0,
                escape(label)
            );
        }
        let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
        let _ = write!(
            self.svg,
            "<text class=\"axis\" transform=\"translate(16 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(name)
        );
    }

    /// Ticks with their labels under the plot, and the axis's name.
    pub fn x_axis(&mut self, name: &str, ticks: &[(f64, String)]) {
        let bottom = HEIGHT - BOTTOM;
        for (at, label) in ticks {
            let x = self.px(*at);
            let _ = write!(
                self.svg,
                "<line class=\"tick\" x1=\"{x:.1}\" y1=\"{bottom}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 5.0,
                bottom + 20.0,
                escape(label)
            );
        }
        let _ = write!(
            self.svg,
            "<line class=\"tick\" x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{:.1}\" y2=\"{bottom}\"/>\
             <text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            WIDTH - RIGHT,
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 9.0,
            escape(name)
        );
    }

    /// A line through points, in the colour and the dashes of a class: a format, or one of [`CLASSES`].
    pub fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, self.px(*x), self.py(*y));
        }
        let _ = write!(self.svg, "<path class=\"line {class}\" d=\"{path}\"/>");
    }

    /// A format's mark at a point: a circle, a square or a triangle; hollow if so asked. `hint` is its tooltip.
    pub(crate) fn mark(&mut self, format: Format, is_hollow: bool, (x, y): (f64, f64), hint: &str) {
        let class = format!("mark {format}{}", if is_hollow { " hollow" } else { "" });
        let shape = mark(format, &class, self.px(x), self.py(y), 4.5, Some(hint));
        self.svg.push_str(&shape);
    }

    /// A point in the colour of a class. `hint` is its tooltip.
    pub fn dot(&mut self, class: &str, (x, y): (f64, f64), hint: &str) {
        let (x, y, hint) = (self.px(x), self.py(y), escape(hint));
        let _ = write!(
            self.svg,
            "<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"><title>{hint}</title></circle>"
        );
    }

    /// A vertical bar with caps from `low` to `high`, in the colour of a class: the spread of a point.
    pub fn interval(&mut self, class: &str, x: f64, (low, high): (f64, f64)) {
        let (x, low, high) = (self.px(x), self.py(low), self.py(high));
        let (left, right) = (x - 4.0, x + 4.0);
        let _ = write!(
            self.svg,
            "<path class=\"interval {class}\" d=\"M{left:.1} {low:.1}L{right:.1} {low:.1}\
             M{x:.1} {low:.1}L{x:.1} {high:.1}M{left:.1} {high:.1}L{right:.1} {high:.1}\"/>"
        );
    }

    /// A vertical line over the whole height.
    pub(crate) fn rule(&mut self, class: &str, x: f64) {
        let x = self.px(x);
        let _ = write!(
            self.svg,
            "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>",
            HEIGHT - BOTTOM
        );
    }

    /// A horizontal line over the whole width, of a class: `even` is dashed, in the colour of text.
    pub fn level(&mut self, class: &str, y: f64) {
        let y = self.py(y);
        let right = WIDTH - RIGHT;
        let _ = write!(self.svg, "<line class=\"{class}\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>");
    }

    /// A bar from the axis up.
    pub(crate) fn bar(&mut self, class: &str, (from, to): (f64, f64), y: f64, hint: &str) {
        let (left, right, top) = (self.px(from), self.px(to), self.py(y));
        let _ = write!(
            self.svg,
            "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\">\
             <title>{}</title></rect>",
            right - left,
            (HEIGHT - BOTTOM - top).max(0.0),
            escape(hint)
        );
    }

    /// The drawing.
    pub fn finish(self) -> String {
        self.svg + "</svg>"
    }
}

/// A format's mark about a point of the drawing, `r` its radius.
fn mark(format: Format, class: &str, x: f64, y: f64, r: f64, hint: Option<&str>) -> String {
    let title = hint.map_or_else(String::new, |hint| format!("<title>{}</title>", escape(hint)));
    match format {
        Format::Nf4 => format!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\">{title}</circle>"),
        Format::Fp4 => {
            let (left, top, side) = (x - 0.9 * r, y - 0.9 * r, 1.8 * r);
            format!(
                "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{side:.1}\" height=\"{side:.1}\">\
                 {title}</rect>"
            )
        }
        Format::Int4 => {
            let (top, base, half) = (y - 1.2 * r, y + 0.8 * r, 1.15 * r);
            format!(
                "<path class=\"{class}\" d=\"M{x:.1} {top:.1}L{:.1} {base:.1}L{:.1} {base:.1}Z\">{title}</path>",
                x + half,
                x - half
            )
        }
    }
}

/// The line of a class for a legend, as [`Frame::path`] draws it.
pub fn line_key(class: &str) -> String {
    key_of(class, "")
}

/// A format's mark and dashes for a legend.
pub(crate) fn key(format: Format) -> String {
    key_of(&format.to_string(), &mark(format, &format!("mark {format}"), 18.0, 7.0, 4.5, None))
}

fn key_of(class: &str, mark: &str) -> String {
    format!(
        "<svg class=\"key\" viewBox=\"0 0 36 14\" aria-hidden=\"true\">\
         <path class=\"line {class}\" d=\"M1 7L35 7\"/>{mark}</svg>"
    )
}

/// Round numbers from 0 to a little above `most`, about five of them, and where the axis ends.
pub fn ticks(most: f64) -> (Vec<f64>, f64) {
    let (ticks, (_, end)) = ticks_between(0.0, most);
    (ticks, end)
}

/// Round numbers from a little below `least` to a little above `most`, about five of them, and the axis's ends.
pub fn ticks_between(least: f64, most: f64) -> (Vec<f64>, (f64, f64)) {
    let range = most - least;
    if range <= 0.0 || !range.is_finite() {
        let first = if least.is_finite() { least.floor() } else { 0.0 };
        return (vec![first, first + 1.0], (first, first + 1.0));
    }
    let rough = range / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let (first, last) = ((least / step).floor() as i64, (most / step).ceil() as i64);
    ((first..=last).map(|i| i as f64 * step).collect(), (first as f64 * step, last as f64 * step))
}

/// A number without needless zeros.
pub fn number(x: f64) -> String {
    let text = format!("{x:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A percentage, likewise.
pub fn percent(x: f64) -> String {
    format!("{} %", number(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_hold_what_they_were_made_for() {
        for (least, most) in
            [(0.0, 7.3), (1.21, 1.84), (-3.0, 5e6), (2.0, 2.0), (0.0, 0.0), (4e9, 4.1e9), (f64::NAN, 1.0)]
        {
            let (ticks, (first, last)) = ticks_between(least, most);
            assert!((2..=7).contains(&ticks.len()) && ticks.is_sorted(), "{least}..{most}: {ticks:?}");
            assert_eq!((ticks[0], ticks[ticks.len() - 1]), (first, last));
            assert!(least.is_nan() || first <= least && most <= last);
        }
    }
}
