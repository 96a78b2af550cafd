//! Rotary positions.

use super::{elements, expect};
use crate::{Error, Result, View, ViewMut};

/// Rotary position embedding of x [tokens, heads, head_dim].
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// Rows of x; positions has one entry each.
    pub tokens: usize,
    /// Heads a row.
    pub heads: usize,
    /// Elements a head: even.
    pub head_dim: usize,
    /// Turn back: the transpose of the rotation, which is its gradient.
    pub inverse: bool,
}

impl Rope {
    /// Lengths; returns the number of positions that the tables hold.
    pub fn check(&self, x: &View, positions: &View, cos: &View, sin: &View, y: &ViewMut) -> Result<usize> {
        let (kernel, half) = ("rope", self.head_dim / 2);
        if !self.head_dim.is_multiple_of(2) || half == 0 {
            return Err(Error::Invalid { kernel, why: format!("head_dim {}: expected an even number", self.head_dim) });
        }
        let elements = elements(&[self.tokens, self.heads, self.head_dim]);
        expect(kernel, "x", x.len(), elements)?;
        expect(kernel, "positions", positions.len(), self.tokens)?;
        expect(kernel, "cos", cos.len(), cos.len() / half * half)?;
        expect(kernel, "sin", sin.len(), cos.len())?;
        expect(kernel, "y", y.len(), elements)?;
        Ok(cos.len() / half)
    }
}
