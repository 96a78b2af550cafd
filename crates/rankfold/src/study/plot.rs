//! A study's drawings: means with their 95 % intervals over an axis of numbers or of names, in [`rankfold_audit`]'s
//! frames.

use super::spread::Spread;
use rankfold_audit::page::{Drawing, drawings};
use rankfold_audit::svg::{self, CLASSES, Frame, ticks_between};

/// What is measured of one thing: at most three of them in a plot.
#[derive(Debug)]
pub struct Series {
    /// What it is, with its unit where it is not the axis's.
    pub name: String,
    /// Places on the horizontal axis, with what was measured there.
    pub points: Vec<(f64, Spread)>,
    /// Whether a line joins them: where the axis is one of numbers.
    pub is_line: bool,
}

/// One drawing.
#[derive(Debug)]
pub struct Plot {
    /// Its title.
    pub title: String,
    /// The horizontal axis's name, with its unit.
    pub x_name: String,
    /// Its ticks: places and labels.
    pub ticks: Vec<(f64, String)>,
    /// The vertical axis's name, with its unit.
    pub y_name: String,
    /// What means and intervals are over.
    pub over: &'static str,
    /// What is drawn.
    pub series: Vec<Series>,
    /// A dashed level, and what it is.
    pub level: Option<(f64, String)>,
}

impl Series {
    /// One point a place, no line.
    pub fn points(name: &str, points: impl IntoIterator<Item = (f64, Spread)>) -> Self {
        Self { name: name.into(), points: points.into_iter().collect(), is_line: false }
    }

    /// Points with a line through them.
    pub fn line(name: &str, points: impl IntoIterator<Item = (f64, Spread)>) -> Self {
        Self { is_line: true, ..Self::points(name, points) }
    }
}

/// Plots one below the other, as a file.
pub fn file(plots: &[Plot]) -> String {
    let drawing = |(number, plot): (usize, &Plot)| Drawing {
        title: plot.title.clone(),
        legend: plot.legend(),
        svg: plot.draw(number),
    };
    drawings(&plots.iter().enumerate().map(drawing).collect::<Vec<_>>())
}

impl Plot {
    fn legend(&self) -> Vec<(&'static str, String)> {
        let series = CLASSES.into_iter().zip(&self.series).map(|(class, series)| (class, series.name.clone()));
        series.chain(self.level.iter().map(|(_, name)| ("even", name.clone()))).collect()
    }

    fn draw(&self, number: usize) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let ends = |values: Vec<f64>| {
            (
                values.iter().copied().fold(f64::INFINITY, f64::min),
                values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            )
        };
        let (left, right) = ends(points().map(|(x, _)| *x).chain(self.ticks.iter().map(|(x, _)| *x)).collect());
        let width = (right - left).max(1.0);
        let margin = width / (2 * self.ticks.len().max(2)) as f64;
        let level = self.level.iter().map(|(y, _)| *y);
        let heights = points().flat_map(|(_, y)| <[f64; 2]>::from(ends_of(y))).chain(level).collect();
        let (least, most) = ends(heights);
        let (y_ticks, y_ends) = ticks_between(least, most);
        let names: Vec<&str> = self.series.iter().map(|series| series.name.as_str()).collect();
        let description =
            format!("Means over {}, with bars over their 95 % intervals: {}.", self.over, names.join(", "));
        let x_ends = (left - margin, right + margin);
        let mut frame = Frame::new(&format!("plot-{number}"), &self.title, &description, x_ends, y_ends);
        frame.y_axis(&self.y_name, &y_ticks.iter().map(|y| (*y, svg::number(*y))).collect::<Vec<_>>());
        frame.x_axis(&self.x_name, &self.ticks);
        if let Some((y, _)) = self.level {
            frame.level("even", y);
        }
        for (place, (series, class)) in self.series.iter().zip(CLASSES).enumerate() {
            // Beside each other, so that bars at one place can be told apart.
            let aside = (place as f64 - (self.series.len() as f64 - 1.0) / 2.0) * width / 60.0;
            let points: Vec<(f64, Spread)> = series.points.iter().map(|(x, y)| (x + aside, *y)).collect();
            if series.is_line {
                frame.path(class, &points.iter().map(|(x, y)| (*x, y.mean)).collect::<Vec<_>>());
            }
            for (x, y) in points {
                frame.interval(class, x, ends_of(&y));
                frame.dot(class, (x, y.mean), &format!("{}: {}", series.name, y.text(4)));
            }
        }
        frame.finish()
    }
}

/// Of a mean's bar: nothing to either side of a single number.
fn ends_of(spread: &Spread) -> (f64, f64) {
    let half = spread.half_width().unwrap_or(0.0);
    (spread.mean - half, spread.mean + half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers<'a>(svg: &'a str, before: &str) -> Vec<f64> {
        let parts = svg.split(before).skip(1);
        parts.map(|rest: &'a str| rest.split(['"', ' ', 'L', 'M']).next().unwrap().parse().unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A frame is 480 × 320, its plot from 84 to 462 and from 14 to 266.
        #[test]
        fn every_point_is_within_its_plot_in_the_middle_of_its_bar(
            values in proptest::collection::vec([-5.0..5.0f64, -5.0..5.0], 1..7), lines: bool
        ) {
            let spreads = values.iter().map(|pair| Spread::of(pair));
            let points: Vec<(f64, Spread)> = (0..).map(f64::from).zip(spreads).collect();
            let series = |name: &str| Series { name: name.into(), points: points.clone(), is_line: lines };
            let plot = Plot {
                title: "A <title>".into(),
                x_name: "place".into(),
                ticks: points.iter().map(|(x, _)| (*x, x.to_string())).collect(),
                y_name: "value, nat".into(),
                over: "coins",
                series: vec![series("one"), series("two")],
                level: Some((0.0, "nothing".into())),
            };
            let svg = file(&[plot]);
            let (x, y) = (numbers(&svg, " cx=\""), numbers(&svg, " cy=\""));
            prop_assert_eq!((x.len(), y.len()), (2 * values.len(), 2 * values.len()));
            for (x, y) in x.iter().zip(&y) {
                prop_assert!((84.0..=462.0).contains(x) && (14.0..=266.0).contains(y), "{x}, {y}");
            }
            for ((bar, x), y) in svg.split("class=\"interval ").skip(1).zip(&x).zip(&y) {
                // Three strokes: a cap, the bar from its low end to its high one, a cap.
                let stroke = bar.split('M').nth(2).unwrap();
                let ends: Vec<f64> = stroke.split(['L', ' ']).map(|text| text.parse().unwrap()).collect();
                prop_assert!((ends[0] - x).abs() < 0.06 && (ends[2] - x).abs() < 0.06, "{stroke}: {x}");
                // Each coordinate is rounded to a tenth.
                prop_assert!(((ends[1] + ends[3]) / 2.0 - y).abs() < 0.11 && ends[1] >= ends[3], "{stroke}: {y}");
            }
            // A larger value is higher up.
            for (spreads, heights) in points.windows(2).zip(y.windows(2)) {
                let rises = spreads[0].1.mean < spreads[1].1.mean;
                prop_assert!(rises == (heights[0] > heights[1]) || (heights[0] - heights[1]).abs() < 0.11);
            }
            for said in ["A &lt;title&gt;", ">place<", ">value, nat<", ">one<", ">two<", ">nothing<", "over coins"] {
                prop_assert!(svg.contains(said), "{said}");
            }
            prop_assert!(!svg.contains("NaN") && !svg.contains("inf"));
        }
    }
}
