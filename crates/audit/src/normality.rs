//! The shape of a tensor's weights, and whether NF4 is made for it.
//!
//! NF4's values are quantiles of N(0, 1) (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, §3 and appendix E), so it
//! spends its sixteen codes evenly on weights that are normally distributed; the paper's appendix F finds that most
//! pretrained weights nearly are. What a block's absmax does to the shape depends on the block's size, so "fits" is
//! a matter of degree (Yoshida 2023, arXiv:2306.06965).
//!
//! With moments m_k = mean((w − mean)^k): standard deviation √m₂, skewness m₃/m₂^1.5 (0 for a normal), excess
//! kurtosis m₄/m₂² − 3 (0 for a normal, −1.2 for a uniform, 3 for a Laplace distribution), and the Kolmogorov
//! distance sup |F(z) − Φ(z)| between the standardised weights' distribution function and the normal one, exact,
//! over all weights. A standardised uniform has 0.057, n draws of a normal about 0.87/√n (Kolmogorov 1933).

use crate::chunks;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Beyond these a shape is called another: a reading aid, not a test. A logistic distribution (excess kurtosis 1.2,
/// distance 0.02) is called heavy-tailed, a triangular one (−0.6) light-tailed.
const HEAVY: f64 = 1.0;
const LIGHT: f64 = -0.5;
const SKEWED: f64 = 0.5;
const DISTANT: f64 = 0.03;
/// √n times the distance that one in twenty samples of n normal numbers passes (Kolmogorov 1933).
const CHANCE: f64 = 1.36;

/// A tensor's weights as a distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Weights.
    pub parameters: u64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, over n.
    pub sd: f64,
    /// m₃/m₂^1.5; 0 where all weights are equal.
    pub skewness: f64,
    /// m₄/m₂² − 3; 0 where all weights are equal.
    pub excess_kurtosis: f64,
    /// sup |F − Φ| of the standardised weights; 0 where all weights are equal.
    pub kolmogorov: f64,
    /// What the figures say of NF4.
    pub fit: Fit,
    /// The same in a sentence.
    pub verdict: String,
}

/// What a shape means for NF4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// Close to normal.
    Normal,
    /// More outliers than a normal distribution has.
    HeavyTails,
    /// Fewer large weights than a normal distribution has.
    LightTails,
    /// Lopsided, or with several peaks.
    OtherShape,
    /// All weights are equal.
    Constant,
}

impl Fit {
    /// In two words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "near normal",
            Self::HeavyTails => "heavy tails",
            Self::LightTails => "light tails",
            Self::OtherShape => "another shape",
            Self::Constant => "constant",
        }
    }
}

impl Shape {
    /// Of finite weights, at least one.
    pub fn of(w: &[f32], threads: usize) -> Self {
        let n = w.len() as f64;
        let at = |i: usize| f64::from(w[i]);
        let sums = chunks::map(threads, w.len(), |range| {
            range.fold((0.0, f64::INFINITY, f64::NEG_INFINITY), |(sum, min, max), i| {
                (sum + at(i), f64::min(min, at(i)), f64::max(max, at(i)))
            })
        });
        let mean = sums.iter().map(|part| part.0).sum::<f64>() / n;
        let min = sums.iter().map(|part| part.1).fold(f64::INFINITY, f64::min);
        let max = sums.iter().map(|part| part.2).fold(f64::NEG_INFINITY, f64::max);
        let powers = chunks::map(threads, w.len(), |range| {
            range.fold([0.0; 3], |[two, three, four], i| {
                let d = at(i) - mean;
                [two + d * d, three + d * d * d, four + (d * d) * (d * d)]
            })
        });
        let moment = |k: usize| powers.iter().map(|part| part[k]).sum::<f64>() / n;
        let (two, three, four) = (moment(0), moment(1), moment(2));
        let mut shape = Self {
            parameters: w.len() as u64,
            min,
            max,
            mean,
            sd: two.sqrt(),
            skewness: 0.0,
            excess_kurtosis: 0.0,
            kolmogorov: 0.0,
            fit: Fit::Constant,
            verdict: String::new(),
        };
        // By the values themselves: the mean of equal numbers need not be that number to the last bit.
        if min < max {
            shape.skewness = three / two.powf(1.5);
            shape.excess_kurtosis = four / (two * two) - 3.0;
            shape.kolmogorov = kolmogorov(w, mean, shape.sd);
            shape.fit = shape.judge();
        }
        shape.verdict = shape.sentence();
        shape
    }

    fn judge(&self) -> Fit {
        let chance = CHANCE / (self.parameters as f64).sqrt();
        if self.excess_kurtosis > HEAVY {
            Fit::HeavyTails
        } else if self.excess_kurtosis < LIGHT {
            Fit::LightTails
        } else if self.skewness.abs() > SKEWED || self.kolmogorov > DISTANT + chance {
            Fit::OtherShape
        } else {
            Fit::Normal
        }
    }

    fn sentence(&self) -> String {
        let Self { excess_kurtosis: kurtosis, skewness, kolmogorov, .. } = self;
        match self.fit {
            Fit::Normal => format!(
                "NF4 fits: the weights are close to normal (Kolmogorov distance {kolmogorov:.3}, excess kurtosis \
                 {kurtosis:.2}), and its values lie where a normal distribution has its weights."
            ),
            Fit::HeavyTails => format!(
                "NF4 fits only in part: the tails are heavier than a normal's (excess kurtosis {kurtosis:.2}), so \
                 outliers set their blocks' scales and crowd the other weights into the middle codes; small blocks \
                 confine them."
            ),
            Fit::LightTails => format!(
                "NF4 does not fit well: the tails are lighter than a normal's (excess kurtosis {kurtosis:.2}; a \
                 uniform has -1.2), so evenly spaced values as Int4's may lose less."
            ),
            Fit::OtherShape => format!(
                "NF4 does not fit well: the weights are lopsided or have several peaks (skewness {skewness:.2}, \
                 Kolmogorov distance {kolmogorov:.3}), and its values are quantiles of one centred bell."
            ),
            Fit::Constant => "Any format fits: all weights are equal, and a block's scale holds them.".into(),
        }
    }
}

/// sup |F(z) − Φ(z)|: on the sorted z it is reached at a step of F, from above or from below.
///
/// F and Φ both rise, so over a run of sorted weights i … j neither difference passes F(j) − Φ(z_i) or
/// Φ(z_j) − F(i): a run that cannot pass the best so far is left out, and few Φ are computed.
fn kolmogorov(w: &[f32], mean: f64, sd: f64) -> f64 {
    const RUN: usize = 1024;
    let mut sorted = w.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let n = w.len() as f64;
    let normal = |i: usize| cumulative((f64::from(sorted[i]) - mean) / sd);
    let mut largest = 0.0f64;
    for start in (0..w.len()).step_by(RUN) {
        let end = w.len().min(start + RUN);
        let reach = (end as f64 / n - normal(start)).max(normal(end - 1) - start as f64 / n);
        if reach <= largest {
            continue;
        }
        for i in start..end {
            let normal = normal(i);
            largest = largest.max((i + 1) as f64 / n - normal).max(normal - i as f64 / n);
        }
    }
    largest
}

/// Φ(x), the normal distribution function, to about 10⁻¹⁵.
///
/// Marsaglia 2004, "Evaluating the Normal Distribution", Journal of Statistical Software 11(4): a Taylor series of
/// Φ/φ about 0, Φ(x) = ½ + φ(x)·(x + x³/3 + x⁵/(3·5) + …). Beyond ±8.3 it is 0 or 1 to that precision.
pub fn cumulative(x: f64) -> f64 {
    if x.abs() > 8.3 {
        return if x < 0.0 { 0.0 } else { 1.0 };
    }
    let (mut sum, mut previous, mut term, mut odd) = (x, 0.0, x, 1.0);
    while sum != previous {
        odd += 2.0;
        term *= x * x / odd;
        previous = sum;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}
