//! Pointwise non-linearities.

use super::expect;
use crate::{Result, View, ViewMut};

/// y = f(x), elementwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0), NaN of NaN; its derivative at 0 is 0.
    Relu,
    /// x·σ(x)
    Silu,
    /// tanh x
    Tanh,
}

impl Activation {
    /// Lengths for `activate`.
    pub fn check(self, x: &View, y: &ViewMut) -> Result<()> {
        expect("activate", "y", y.len(), x.len())
    }

    /// Lengths for `activate_grad`.
    pub fn check_grad(self, x: &View, dy: &View, dx: &ViewMut) -> Result<()> {
        expect("activate_grad", "dy", dy.len(), x.len())?;
        expect("activate_grad", "dx", dx.len(), x.len())
    }
}
