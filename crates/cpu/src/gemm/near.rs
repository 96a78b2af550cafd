//! Products of blocks that lie in a near cache, for kernels that make an operand as they go: C [m, n] = or += A·B, on
//! the same panels and microkernels, within one task.
//!
//! The caller packs what it multiplies, once for as many products as it can, and names what part of the packed panels
//! a product takes: panels of rows and of columns, and of k from some places ([`Near::floor`]) on.

use super::micro::{self, Geometry, Micro, Product};
use super::operand::{Left, Right, WeightSlice};
use super::tile::Tile;
use super::{pack, plan};
use crate::simd::{Isa, Simd};
use rankfold_backend::Compute;
use std::ops::Range;

/// Products of one precision with some instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    isa: Isa,
    compute: Compute,
    geometry: Geometry,
}

/// A matrix whose rows lie `stride` elements apart; columns beyond the last that is packed need not exist.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    /// Whether its rows run along k.
    pub(crate) along: bool,
}

/// One product: rows of some left panels by some of the columns of right panels.
pub(crate) struct Multiply<'a> {
    /// Rows of C: those that `left` was packed of.
    pub(crate) rows: usize,
    /// The length of the sums, in elements: what `left` was packed of.
    pub(crate) k: usize,
    /// Panels of the left operand.
    pub(crate) left: &'a [f32],
    /// Panels of the right operand.
    pub(crate) right: &'a [f32],
    /// What the right panels were packed of, and the element that the sums start at: one that [`Near::floor`] gives.
    pub(crate) right_k: usize,
    pub(crate) first: usize,
    /// Columns of the right panels: multiples of [`PAD`].
    pub(crate) columns: Range<usize>,
    /// Element (i, j) of C at i·stride + j, j counted from the first of `columns`.
    pub(crate) c: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) accumulate: bool,
}

/// What columns of C are a multiple of: the widest vector.
pub(crate) const PAD: usize = pack::MAX_LANES;

impl Near {
    pub(crate) fn new(isa: Isa, compute: Compute) -> Self {
        Self { isa, compute, geometry: micro::geometry(isa, compute) }
    }

    /// The last place at or before element k that a product's sums may start at.
    pub(crate) fn floor(&self, k: usize) -> usize {
        let step = self.geometry.k * self.geometry.units;
        k / step * step
    }

    /// The most rows of one left panel.
    pub(crate) fn height(&self) -> usize {
        self.geometry.rows
    }

    /// The rows of each left panel of so many.
    pub(crate) fn panels(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let cut = plan::Panels::new(rows, self.geometry);
        (0..cut.count).map(move |panel| cut.rows(panel))
    }

    /// Where the panel that starts at `row` lies within left panels.
    pub(crate) fn left_start(&self, row: usize, k: usize) -> usize {
        row * self.geometry.units(k)
    }

    /// Room for left panels.
    pub(crate) fn left_len(&self, rows: usize, k: usize) -> usize {
        plan::packed_rows(rows, self.geometry) * self.geometry.units(k)
    }

    /// Room for right panels.
    pub(crate) fn right_len(&self, k: usize, columns: usize) -> usize {
        self.geometry.units(k) * columns.next_multiple_of(self.geometry.columns)
    }

    /// Pack rows `rows` of a left operand [m, k], all its panels, of the elements `ks` of k.
    pub(crate) fn left(&self, x: Strided, rows: Range<usize>, ks: Range<usize>, out: &mut [f32]) {
        assert!(self.left_len(rows.len(), ks.len()) <= out.len(), "room for left panels");
        // Of rows that run across k a whole vector is read where the stride says that it is there.
        let read = if x.along { (rows.clone(), ks.end) } else { (ks.clone(), x.stride) };
        x.assert_holds(read.0, read.1);
        let x = Left { data: x.data, stride: x.stride, transposed: !x.along, panels: None };
        micro::run(self.isa, self.compute, PackLeft { x, rows, ks, out });
    }

    /// Pack `columns` of a right operand [k, n], all their panels, of the elements `ks` of k.
    pub(crate) fn right(&self, x: Strided, ks: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        assert!(self.right_len(ks.len(), columns.len()) <= out.len(), "room for right panels");
        let (rows, end) = if x.along { (columns.clone(), ks.end) } else { (ks.clone(), columns.end) };
        x.assert_holds(rows, end);
        let x = Right { data: WeightSlice::from(x.data), stride: x.stride, transposed: x.along };
        micro::run(self.isa, self.compute, PackRight { x, ks, columns, out });
    }

    /// C = or += A·B
    pub(crate) fn multiply(&self, product: Multiply) {
        let Multiply { rows, k, ref columns, stride, .. } = product;
        if rows == 0 || columns.is_empty() {
            return;
        }
        assert!(columns.start.is_multiple_of(PAD) && columns.end.is_multiple_of(PAD), "whole vectors");
        assert!(product.first == self.floor(product.first) && product.first + k <= product.right_k, "a part of k");
        assert!(self.left_len(rows, k) <= product.left.len(), "left panels");
        assert!(self.right_len(product.right_k, columns.end) <= product.right.len(), "right panels");
        assert!((rows - 1) * stride + columns.len() <= product.c.len(), "c");
        micro::run(self.isa, self.compute, product);
    }
}

impl Strided<'_> {
    /// That elements 0 … end − 1 of `rows` exist.
    fn assert_holds(&self, rows: Range<usize>, end: usize) {
        assert!(rows.is_empty() || (rows.end - 1) * self.stride + end <= self.data.len(), "a strided operand");
    }
}

struct PackLeft<'a> {
    x: Left<'a>,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &'a mut [f32],
}

impl Product for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        let Self { x, rows, ks, out } = self;
        let (cut, units) = (plan::Panels::new(rows.len(), M::GEOMETRY), M::GEOMETRY.units(ks.len()));
        // SAFETY: `left` checked the operand and the room.
        unsafe {
            for of_panel in (0..cut.count).map(|panel| cut.rows(panel)) {
                let out = out.as_mut_ptr().add(of_panel.start * units);
                pack::left::<S, M>(x, rows.start + of_panel.start..rows.start + of_panel.end, ks.clone(), out);
            }
        }
    }
}

struct PackRight<'a> {
    x: Right<'a>,
    ks: Range<usize>,
    columns: Range<usize>,
    out: &'a mut [f32],
}

impl Product for PackRight<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        // SAFETY: `right` checked the operand and the room.
        unsafe { pack::right::<S, M>(self.x, self.ks, self.columns, self.out.as_mut_ptr()) }
    }
}

impl Product for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        let Self { rows, k, columns, stride, accumulate, .. } = self;
        let (g, cut) = (M::GEOMETRY, plan::Panels::new(rows, M::GEOMETRY));
        let (units, panel_len) = (g.units(k), g.units(self.right_k) * g.columns);
        let (a, c) = (self.left.as_ptr(), self.c.as_mut_ptr());
        // SAFETY: the machine has what M uses; `multiply` checked that the panels and C are there. Where a tile starts
        // within a panel, that panel has no more columns than the tile's.
        unsafe {
            M::begin();
            for panel in columns.start / g.columns..columns.end.div_ceil(g.columns) {
                let of_panel = panel * g.columns..(panel + 1) * g.columns;
                let (start, end) = (columns.start.max(of_panel.start), columns.end.min(of_panel.end));
                let within = self.first / g.k * g.columns + start - of_panel.start;
                let b = self.right.as_ptr().add(panel * panel_len + within);
                for rows in (0..cut.count).map(|panel| cut.rows(panel)) {
                    let tile = Tile {
                        units,
                        a: a.add(rows.start * units),
                        stride: None,
                        b,
                        c: c.add(rows.start * stride + start - columns.start),
                        c_stride: stride,
                        columns: end - start,
                        accumulate,
                    };
                    M::tile(tile, rows.len());
                }
            }
            M::end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Units;
    use proptest::prelude::*;

    /// Element (i, j) of a matrix of integers that bf16 holds, and whose products and sums f32 holds.
    fn element(i: usize, j: usize, seed: usize) -> f32 {
        ((i * 7 + j * 13 + seed * 5) % 17) as f32 - 8.0
    }

    /// [rows, columns] of them with rows `stride` apart, as rows along k or across it.
    fn stored(rows: usize, columns: usize, stride: usize, transposed: bool, seed: usize) -> Vec<f32> {
        let (lines, len) = if transposed { (columns, rows) } else { (rows, columns) };
        let at = |line: usize, j: usize| if transposed { element(j, line, seed) } else { element(line, j, seed) };
        // What lies between the rows is no part of the matrix.
        let line = |line| (0..stride).map(move |j| if j < len { at(line, j) } else { f32::NAN });
        (0..lines).flat_map(line).collect()
    }

    fn isas() -> impl Iterator<Item = Isa> {
        let emulated = [Units::None, Units::Pairs, Units::Tiles].map(Isa::portable_16);
        Isa::available().into_iter().chain(emulated)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn products_of_parts_of_panels_are_exact(
            [m, panel_k, n] in [1..70usize, 1..100usize, 1..100usize],
            [from, length, start, end] in prop::array::uniform4(0.0..1.0f64),
            [left_along, right_along, accumulate, bf16] in any::<[bool; 4]>(),
            gap in 0..20usize,
        ) {
            let compute = if bf16 { Compute::Bf16 } else { Compute::F32 };
            for isa in isas() {
                let near = Near::new(isa, compute);
                let first = near.floor((from * panel_k as f64) as usize);
                let k = 1 + (length * (panel_k - first) as f64) as usize;
                let k = k.min(panel_k - first);
                let vectors = n.div_ceil(PAD);
                let start = (start * vectors as f64) as usize;
                let end = start + 1 + (end * (vectors - start - 1) as f64) as usize;
                let columns = start * PAD..end * PAD;

                let stride = if left_along { first + k } else { m } + gap;
                let data = stored(m, first + k, stride, !left_along, 1);
                let mut left = vec![f32::NAN; near.left_len(m, k)];
                near.left(Strided { data: &data, stride, along: left_along }, 0..m, first..first + k, &mut left);

                let stride = if right_along { panel_k } else { n } + gap;
                let data = stored(panel_k, n, stride, right_along, 2);
                let mut right = vec![f32::NAN; near.right_len(panel_k, n)];
                near.right(Strided { data: &data, stride, along: right_along }, 0..panel_k, 0..n, &mut right);

                let stride = columns.len() + gap;
                let mut c = vec![1.0; m * stride];
                let (left, right) = (&left[..], &right[..]);
                let of = columns.clone();
                near.multiply(Multiply {
                    rows: m, k, left, right, right_k: panel_k, first, columns: of, c: &mut c, stride, accumulate,
                });
                for (i, row) in c.chunks_exact(stride).enumerate() {
                    for (j, found) in row.iter().enumerate() {
                        let column = columns.start + j;
                        let terms = (first..first + k).map(|l| element(i, l, 1) * element(l, column, 2));
                        let product: f32 = if column < n { terms.sum() } else { 0.0 };
                        let expected = match j < columns.len() {
                            true => product + if accumulate { 1.0 } else { 0.0 },
                            false => 1.0,
                        };
                        prop_assert_eq!(*found, expected, "{}, row {}, column {}", isa, i, j);
                    }
                }
            }
        }
    }
}
