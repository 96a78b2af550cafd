//! Products with few rows on the left: bound by reading the weight, which is read once, straight from storage, decoded
//! in registers and written nowhere.
//!
//! The GEMM packs the weight so that many rows of activations can use it again; with a few tokens the packing itself
//! is what takes the time. Here every element of the weight goes from memory into a register, through one FMA a
//! token, and is gone:
//!
//! - x·Wᵀ, the weight stored along k: sums of products along its rows (`dots.rs`);
//! - dy·W, the weight stored along c: its rows, times an element of dy each, added to sums (`columns.rs`).
//!
//! Rows go [`GROUP`] at a time past each piece of the weight, which the first group brings into the core's caches.
//! Tasks are cut by the shapes alone, and no two add to the same element. An element of `dots` is the sum of LANES
//! chains of FMAs, whatever the number of rows; an element of `columns` is summed as in the GEMM, to the same bits.

mod columns;
mod dots;

use super::operand::Term;
use super::{Gemm, Output};
use std::ops::Range;

/// The most rows of the left operand for which `dots` beats the GEMM, which must transpose such a weight to pack it.
const MOST_DOTS: usize = 24;

/// The most for which `columns` does.
const MOST_COLUMNS: usize = 8;

/// Rows at a time: their sums, a vector of the weight and what decodes it fit the registers.
const GROUP: usize = 4;

/// Weights of fewer elements take less time than waking a thread.
const ALONE: usize = 1 << 18;

/// Whether the product has so few rows that the kernels of this module are faster.
pub(super) fn serves(terms: &[Term], rows: usize) -> bool {
    let stored = |transposed| move |term: &Term| !term.left.transposed && term.right.transposed == transposed;
    (rows <= MOST_DOTS && terms.iter().all(stored(true))) || (rows <= MOST_COLUMNS && terms.iter().all(stored(false)))
}

impl Gemm<'_> {
    /// [`Gemm::product`] where [`serves`] holds.
    pub(super) fn few(&self, terms: &[Term], output: Output) {
        if terms.first().is_some_and(|term| term.right.transposed) {
            self.dots(terms, output);
        } else {
            self.columns(terms, output);
        }
    }
}

/// The output's scale and bias on some columns of a row of c.
#[inline(always)]
fn finish(c: &mut [f32], output: &Output, columns: Range<usize>) {
    if let Some(scale) = output.scale {
        c.iter_mut().zip(&scale[columns.clone()]).for_each(|(c, scale)| *c *= scale);
    }
    if let Some(bias) = output.bias {
        c.iter_mut().zip(&bias[columns]).for_each(|(c, bias)| *c += bias);
    }
}
