//! The hard concrete gate: a mask in [0, 1] that is 0 or 1 with a probability of its own.

use super::expect;
use crate::{Error, Result, View, ViewMut};

/// The stretched and clamped binary concrete distribution (Louizos et al. 2018, eq. 10–12):
///
/// s = σ((ln u − ln(1 − u) + logα)/β), z = clamp(s·(ζ − γ) + γ, 0, 1); without noise s = σ(logα).
///
/// P(z ≠ 0) = σ(logα − β·ln(−γ/ζ)).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HardConcrete {
    /// β, the temperature, above 0.
    pub temperature: f64,
    /// γ, below 0.
    pub low: f64,
    /// ζ, above 1.
    pub high: f64,
    /// (seed, stream) of u; none in evaluation. u of element i is (w + ½)/2³², w the Philox word at position i.
    pub noise: Option<(u64, u64)>,
}

impl HardConcrete {
    /// Ranges, and lengths for `hard_concrete`.
    pub fn check(&self, log_alpha: &View, z: &ViewMut) -> Result<()> {
        self.check_ranges("hard_concrete")?;
        expect("hard_concrete", "z", z.len(), log_alpha.len())
    }

    /// Ranges, and lengths for `hard_concrete_grad`.
    pub fn check_grad(&self, log_alpha: &View, dz: &View, dlog_alpha: &ViewMut) -> Result<()> {
        let kernel = "hard_concrete_grad";
        self.check_ranges(kernel)?;
        expect(kernel, "dz", dz.len(), log_alpha.len())?;
        expect(kernel, "dlog_alpha", dlog_alpha.len(), log_alpha.len())
    }

    fn check_ranges(&self, kernel: &'static str) -> Result<()> {
        let Self { temperature, low, high, .. } = *self;
        if temperature > 0.0
            && temperature.is_finite()
            && low < 0.0
            && low.is_finite()
            && high > 1.0
            && high.is_finite()
        {
            return Ok(());
        }
        let why = format!("temperature {temperature}, low {low}, high {high}: expected > 0, < 0 and > 1, all finite");
        Err(Error::Invalid { kernel, why })
    }
}
