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
//! Elements are taken as units, as the GEMM's are: where a unit is more than an f32 as it is stored, the rows on the left
//! are packed as units first.
//!
//! Rows go [`GROUP`] at a time past each piece of the weight, which the first group brings into the core's caches.
//! Tasks are cut by the shapes alone, and no two add to the same element. An element of `dots` is the sum of LANES
//! chains of FMAs, whatever the number of rows; an element of `columns` is summed as in the GEMM in registers, to the
//! same bits.

mod columns;
mod dots;

use super::micro::{Geometry, Micro, Product};
use super::operand::{Left, Term};
use super::pack::{MAX_LANES, along};
use super::{Gemm, Output, Shared};
use crate::scratch;
use crate::simd::Simd;
use std::ops::Range;

/// The most rows of the left operand for which `dots` beats the GEMM, which must transpose such a weight to pack it.
pub(super) const MOST_DOTS: usize = 24;

/// The most for which `columns` does.
const MOST_COLUMNS: usize = 8;

/// Rows at a time: their sums, a vector of the weight and what decodes it fit the registers.
const GROUP: usize = 4;

/// Whether the registers hold the sums of several rows of the weight at once. Where they do not, fewer variants serve.
const fn roomy<S: Simd>() -> bool {
    S::REGISTERS >= 16
}

/// Weights of fewer elements take less time than waking a thread.
const ALONE: usize = 1 << 18;

/// Whether the product has so few rows that the kernels of this module are faster.
pub(super) fn serves(terms: &[Term], rows: usize) -> bool {
    let stored = |transposed| move |term: &Term| !term.left.transposed && term.right.transposed == transposed;
    (rows <= MOST_DOTS && terms.iter().all(stored(true))) || (rows <= MOST_COLUMNS && terms.iter().all(stored(false)))
}

impl Gemm<'_> {
    /// [`Gemm::product`] where [`serves`] holds.
    pub(super) fn few(&self, geometry: Geometry, terms: &[Term], output: Output) {
        if geometry.stored {
            let lefts: Vec<Rows> =
                terms.iter().map(|term| Rows { units: term.left.data.as_ptr(), stride: term.k }).collect();
            return self.read_weights(geometry, terms, &lefts, output);
        }
        let rows = output.rows;
        let strides: Vec<usize> = terms.iter().map(|term| geometry.units(term.k).next_multiple_of(MAX_LANES)).collect();
        scratch::with(strides.iter().sum::<usize>() * rows, |out| {
            let mut out = Shared(out.as_mut_ptr());
            let mut pack = |(term, stride): (&Term, usize)| {
                let units = out;
                self.run(PackRows { left: term.left, k: term.k, rows, stride, out: units });
                // SAFETY: the next operand's part of the buffer.
                out = unsafe { out.at(stride * rows) };
                Rows { units: units.0, stride }
            };
            let lefts: Vec<Rows> = terms.iter().zip(strides).map(&mut pack).collect();
            self.read_weights(geometry, terms, &lefts, output);
        });
    }

    fn read_weights(&self, geometry: Geometry, terms: &[Term], lefts: &[Rows], output: Output) {
        if terms.first().is_some_and(|term| term.right.transposed) {
            self.dots(terms, lefts, output);
        } else {
            self.columns(geometry, terms, lefts, output);
        }
    }
}

/// The rows of a left operand as units: unit l of row t at t·stride + l.
#[derive(Clone, Copy)]
struct Rows {
    units: *const f32,
    stride: usize,
}

// SAFETY: it is only read while the product that made it runs.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

/// Packs the rows of a left operand as units, zeros after the last.
struct PackRows<'a> {
    left: Left<'a>,
    k: usize,
    rows: usize,
    stride: usize,
    out: Shared,
}

impl Product for PackRows<'_> {
    type Output = ();
    const IN_TILES: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        for t in 0..self.rows {
            for l in (0..self.stride).step_by(S::LANES) {
                let first = l * M::GEOMETRY.k;
                // SAFETY: elements of row t that exist; its `stride` units.
                unsafe {
                    let row = self.left.data.as_ptr().add(t * self.left.stride + first.min(self.k));
                    let v = along::<S, M::Unit>(row, self.k.saturating_sub(first));
                    S::store(self.out.0.add(t * self.stride + l), v);
                }
            }
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
