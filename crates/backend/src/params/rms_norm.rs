//! Root-mean-square normalisation.

use super::{elements, expect, expect_some};
use crate::{Error, Result, View, ViewMut};

/// Root-mean-square normalisation of `rows` rows.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// Rows of x and y.
    pub rows: usize,
    /// Elements a row, and of the gain.
    pub width: usize,
    /// ε, added to the mean of squares.
    pub eps: f64,
}

impl RmsNorm {
    /// Lengths for `rms_norm`.
    pub fn check(&self, x: &View, gain: &View, y: &ViewMut, inv_rms: &ViewMut) -> Result<()> {
        self.check_inputs("rms_norm", x, gain, inv_rms.len())?;
        expect("rms_norm", "y", y.len(), self.elements())
    }

    /// Lengths for `rms_norm_grad`.
    pub fn check_grad(
        &self,
        x: &View,
        gain: &View,
        inv_rms: &View,
        dy: &View,
        dx: Option<&ViewMut>,
        dgain: Option<&ViewMut>,
    ) -> Result<()> {
        let kernel = "rms_norm_grad";
        self.check_inputs(kernel, x, gain, inv_rms.len())?;
        expect(kernel, "dy", dy.len(), self.elements())?;
        expect_some(kernel, "dx", dx.map(ViewMut::len), self.elements())?;
        expect_some(kernel, "dgain", dgain.map(ViewMut::len), self.width)
    }

    fn elements(&self) -> usize {
        elements(&[self.rows, self.width])
    }

    fn check_inputs(&self, kernel: &'static str, x: &View, gain: &View, inv_rms: usize) -> Result<()> {
        if self.width == 0 && self.rows > 0 {
            return Err(Error::Invalid { kernel, why: "width 0: a row without elements has no mean".into() });
        }
        expect(kernel, "x", x.len(), self.elements())?;
        expect(kernel, "gain", gain.len(), self.width)?;
        expect(kernel, "inv_rms", inv_rms, self.rows)
    }
}
