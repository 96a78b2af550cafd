//! What differs from seed to seed, and when a difference is one.
//!
//! A claim is held against the 95 % interval of a mean of n seeds, mean ± t·s/√n with Student's t of n − 1 degrees
//! (Student 1908): it holds where the whole interval is on its side of the bound, fails where the whole is on the
//! other, and else so many seeds do not tell. Two methods are compared seed by seed: what a seed does to both cancels.

use serde::Serialize;
use std::fmt;

/// The mean of some numbers and their spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The standard deviation of the sample; 0 of one number.
    pub deviation: f64,
    /// How many.
    pub n: usize,
}

/// Student's t that 97.5 % lie below, by degrees of freedom from 1; beyond the table its last, which is more than due.
const T: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];

impl Spread {
    /// Of at least one number.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len();
        let mean = values.iter().sum::<f64>() / n.max(1) as f64;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Self { mean, deviation: (squares / n.saturating_sub(1).max(1) as f64).sqrt(), n }
    }

    /// Of the differences a − b, seed by seed.
    pub fn between(a: &[f64], b: &[f64]) -> Self {
        Self::of(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
    }

    /// Where the mean of ever more seeds is to be expected, 19 times in 20; everywhere after one seed.
    pub fn interval(&self) -> (f64, f64) {
        let half = self.half_width().unwrap_or(f64::INFINITY);
        (self.mean - half, self.mean + half)
    }

    /// How far the interval reaches to either side; one number has none.
    pub fn half_width(&self) -> Option<f64> {
        let t = T[self.n.checked_sub(2)?.min(T.len() - 1)];
        Some(t * self.deviation / (self.n as f64).sqrt())
    }

    /// "3.4567 ± 0.0123": the mean and the interval's half-width; of one number the mean alone.
    pub fn text(&self, decimals: usize) -> String {
        let half = self.half_width().map(|half| format!(" ± {half:.decimals$}"));
        format!("{:.decimals$}{}", self.mean, half.unwrap_or_default())
    }
}

/// The middle one of some numbers, the upper of two.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It holds.
    Reproduces,
    /// It does not.
    DoesNotReproduce,
    /// The seeds do not tell.
    Undecided,
}

impl Verdict {
    /// That a mean is at most `bound`.
    pub fn at_most(spread: &Spread, bound: f64) -> Self {
        match spread.interval() {
            (_, high) if high <= bound => Self::Reproduces,
            (low, _) if low > bound => Self::DoesNotReproduce,
            _ => Self::Undecided,
        }
    }

    /// Of what is certain.
    pub fn of(holds: bool) -> Self {
        if holds { Self::Reproduces } else { Self::DoesNotReproduce }
    }

    /// Of a claim of several parts: all must hold, and one that fails decides.
    pub fn all(parts: impl IntoIterator<Item = Self>) -> Self {
        let parts: Vec<Self> = parts.into_iter().collect();
        let decisive = [Self::DoesNotReproduce, Self::Undecided].into_iter().find(|verdict| parts.contains(verdict));
        decisive.unwrap_or(Self::Reproduces)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reproduces => "The claim reproduces at this scale",
            Self::DoesNotReproduce => "The claim does not reproduce at this scale",
            Self::Undecided => "These runs do not decide the claim",
        })
    }
}

/// Spearman's rank correlation (1904), equal values sharing their mean rank; 0 where one side is constant.
pub fn rank_correlation(x: &[f64], y: &[f64]) -> f64 {
    let (x, y) = (ranks(x), ranks(y));
    let (of_x, of_y) = (Spread::of(&x).mean, Spread::of(&y).mean);
    let moment = |a: &[f64], b: &[f64], of_a: f64, of_b: f64| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - of_a) * (b - of_b)).sum()
    };
    let scale = (moment(&x, &x, of_x, of_x) * moment(&y, &y, of_y, of_y)).sqrt();
    if scale > 0.0 { moment(&x, &y, of_x, of_y) / scale } else { 0.0 }
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let rank = |value: &f64| {
        let below = values.iter().filter(|other| *other < value).count();
        let equal = values.iter().filter(|other| *other == value).count();
        below as f64 + (equal as f64 - 1.0) / 2.0
    };
    values.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rankfold_backend::philox;

    #[test]
    fn an_interval_holds_the_true_mean_19_times_in_20() {
        let cases = 4000;
        for n in [2, 3, 5] {
            let held = (0..cases).filter(|case| {
                let values: Vec<f64> = (0..n).map(|i| 7.0 + philox::normal(1, *case, i)).collect();
                let (low, high) = Spread::of(&values).interval();
                (low..=high).contains(&7.0)
            });
            let share = held.count() as f64 / cases as f64;
            // Five standard deviations of a share of 0.95: 5·√(0.95·0.05/4000) = 0.017.
            assert!((share - 0.95).abs() < 0.017, "{n} seeds: {share}");
        }
    }

    #[test]
    fn what_is_printed_is_the_interval_that_decides() {
        let spread = Spread::of(&[1.0, 2.0, 6.0]);
        // t of two degrees times √7/√3.
        assert_eq!(spread.text(2), "3.00 ± 6.57");
        assert!((spread.interval().1 - 9.57).abs() < 0.005);
        assert_eq!(Spread::of(&[1.0]).text(1), "1.0");
    }

    #[test]
    fn a_verdict_needs_the_whole_interval_on_one_side() {
        let of = |values: &[f64]| Verdict::at_most(&Spread::of(values), 1.0);
        assert_eq!(of(&[0.1, 0.2, 0.15]), Verdict::Reproduces);
        assert_eq!(of(&[3.1, 3.2, 3.15]), Verdict::DoesNotReproduce);
        assert_eq!(of(&[0.0, 2.5, 0.3]), Verdict::Undecided);
        assert_eq!(of(&[0.0]), Verdict::Undecided);
        let (yes, no, open) = (Verdict::Reproduces, Verdict::DoesNotReproduce, Verdict::Undecided);
        assert_eq!([Verdict::all([yes, open]), Verdict::all([open, no]), Verdict::all([yes, yes])], [open, no, yes]);
    }

    #[test]
    fn rank_correlation_sees_order_alone() {
        let x = [1.0, 2.0, 5.0, 3.0];
        assert_eq!(rank_correlation(&x, &x.map(f64::exp)), 1.0);
        assert_eq!(rank_correlation(&x, &x.map(|x| -x)), -1.0);
        assert_eq!(rank_correlation(&x, &[2.0; 4]), 0.0);
        // Ranks 0, 1, 3, 2 and 0.5, 0.5, 2.5, 2.5 about 1.5: Σ = 1.5 + 0.5 + 1.5 + 0.5 over √(5·4).
        assert!((rank_correlation(&x, &[1.0, 1.0, 9.0, 9.0]) - 4.0 / 20f64.sqrt()).abs() < 1e-15);
    }
}
