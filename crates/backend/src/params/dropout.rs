//! Dropout by counter.

use super::expect;
use crate::{Error, Result, View, ViewMut};

/// Counter-based dropout: element i is kept where the Philox word at position i of `stream` is at least
/// `threshold()`, and then multiplied by `1/(1 − p)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of dropping an element, in [0, 1).
    pub probability: f32,
    /// The run's seed.
    pub seed: u64,
    /// Which draw of the run: no two may share one.
    pub stream: u64,
}

impl Dropout {
    /// Words below it are dropped.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0).round() as u32
    }

    /// What a kept element is multiplied by.
    pub fn keep_scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    pub(super) fn check_probability(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        let why = format!("probability {}: expected at least 0 and below 1", self.probability);
        Err(Error::Invalid { kernel: "dropout", why })
    }

    /// The probability's range and the lengths.
    pub fn check(&self, x: &View, y: &ViewMut) -> Result<()> {
        self.check_probability()?;
        expect("dropout", "y", y.len(), x.len())
    }
}
