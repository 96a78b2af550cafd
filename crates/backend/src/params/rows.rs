//! Row by row, column by column: norms of rows, and a factor a column.

use super::{elements, expect, expect_some};
use crate::{Result, View, ViewMut};

/// A matrix [rows, width].
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Rows of x.
    pub rows: usize,
    /// Elements a row.
    pub width: usize,
}

impl Rows {
    fn elements(&self) -> usize {
        elements(&[self.rows, self.width])
    }

    /// Lengths for `row_norms`.
    pub fn check_norms(&self, x: &View, norms: &ViewMut) -> Result<()> {
        expect("row_norms", "x", x.len(), self.elements())?;
        expect("row_norms", "norms", norms.len(), self.rows)
    }

    /// Lengths for `scale_columns`.
    pub fn check_scale(&self, x: &View, factors: &View, y: &ViewMut) -> Result<()> {
        expect("scale_columns", "x", x.len(), self.elements())?;
        expect("scale_columns", "factors", factors.len(), self.width)?;
        expect("scale_columns", "y", y.len(), self.elements())
    }

    /// Lengths for `scale_columns_grad`.
    pub fn check_scale_grad(
        &self,
        x: &View,
        factors: &View,
        dy: &View,
        dx: Option<&ViewMut>,
        dfactors: Option<&ViewMut>,
    ) -> Result<()> {
        let kernel = "scale_columns_grad";
        expect(kernel, "x", x.len(), self.elements())?;
        expect(kernel, "factors", factors.len(), self.width)?;
        expect(kernel, "dy", dy.len(), self.elements())?;
        expect_some(kernel, "dx", dx.map(ViewMut::len), self.elements())?;
        expect_some(kernel, "dfactors", dfactors.map(ViewMut::len), self.width)
    }
}
