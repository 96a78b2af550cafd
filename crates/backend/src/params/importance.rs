//! AdaLoRA's measure of what a triplet is worth.

use super::{elements, expect};
use crate::{Error, Result, View, ViewMut};

/// Along which direction a factor's triplets lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Triplets {
    /// A row each: A [rank, inputs], and E [rank, 1].
    Rows,
    /// A column each: B [outputs, rank].
    Columns,
}

/// One step of the smoothed sensitivity and its uncertainty (Zhang et al. 2023, eq. 8–10) of a factor [rows, width].
#[derive(Clone, Copy, Debug)]
pub struct Importance {
    /// Rows of the factor.
    pub rows: usize,
    /// Columns of the factor.
    pub width: usize,
    /// Which of the two are the triplets.
    pub triplets: Triplets,
    /// Decay of the sensitivity's mean, in [0, 1).
    pub beta1: f64,
    /// Decay of the deviation from it, in [0, 1).
    pub beta2: f64,
    /// What the gradient is multiplied by first: 1, or the clip's factor.
    pub grad_scale: f64,
}

impl Importance {
    /// Triplets, and elements of each.
    pub fn split(&self) -> (usize, usize) {
        match self.triplets {
            Triplets::Rows => (self.rows, self.width),
            Triplets::Columns => (self.width, self.rows),
        }
    }

    /// Lengths, decays in range, and no triplet without an element.
    pub fn check(
        &self,
        weight: &View,
        grad: &View,
        mean: &ViewMut,
        deviation: &ViewMut,
        scores: &ViewMut,
    ) -> Result<()> {
        let (kernel, n) = ("importance", elements(&[self.rows, self.width]));
        let invalid = |why: String| Err(Error::Invalid { kernel, why });
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return invalid(format!("{name} is {beta}: expected at least 0 and below 1"));
            }
        }
        let (triplets, elements) = self.split();
        if triplets > 0 && elements == 0 {
            return invalid("triplets without an element have no mean".into());
        }
        expect(kernel, "weight", weight.len(), n)?;
        expect(kernel, "grad", grad.len(), n)?;
        expect(kernel, "mean", mean.len(), n)?;
        expect(kernel, "deviation", deviation.len(), n)?;
        expect(kernel, "scores", scores.len(), triplets)
    }
}
