//! Packing: a block of an operand rewritten in the order in which the microkernel reads it, as units.
//!
//! How panels lie is `micro.rs`'s to say. Units beyond the last element of k are zeros, and so are the columns of a
//! right panel that do not exist. Where the stored rows run along k, LANES × LANES tiles are transposed in registers.

use super::micro::{Micro, Order};
use super::operand::{Left, Right};
use super::unit::Unit;
use crate::simd::{Float, Simd};
use std::ops::Range;

/// The most lanes of any instruction set.
pub(super) const MAX_LANES: usize = 16;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Stored rows that are asked for ahead: rows longer than a page defeat the machine's own prefetching.
const AHEAD: usize = 8;

/// A panel of the left operand: `rows` by `ks`.
///
/// # Safety
/// The machine has S; the ranges lie within the operand; rows.len() is at most a tile's; `out` is valid for the panel.
#[inline(always)]
pub(super) unsafe fn left<S: Simd, M: Micro<S>>(operand: Left, rows: Range<usize>, ks: Range<usize>, out: *mut f32) {
    let units = M::GEOMETRY.units(ks.len());
    // SAFETY: the caller's.
    unsafe {
        match M::GEOMETRY.left {
            Order::Columns => {
                let panel = Columns { out, height: rows.len(), units };
                if operand.transposed {
                    columns_across::<S, M::Unit>(operand, rows, ks, panel);
                } else {
                    columns_along::<S, M::Unit>(operand, rows, ks, panel);
                }
            }
            Order::Tiles => {
                for (i, first) in rows.clone().step_by(S::LANES).enumerate() {
                    let rows = first..rows.end.min(first + S::LANES);
                    tiles::<S, M::Unit>(operand, rows, ks.clone(), out.add(i * S::LANES * units), units);
                }
            }
        }
    }
}

/// A left panel as [`Order::Columns`] has it.
#[derive(Clone, Copy)]
struct Columns {
    out: *mut f32,
    height: usize,
    units: usize,
}

impl Columns {
    /// Column l: the first `height` lanes. A whole vector may run beyond the column into the next, which is stored
    /// later; at the panel's end only what is left is stored.
    ///
    /// # Safety
    /// The machine has S; the panel is valid; its columns are stored in their order.
    #[inline(always)]
    unsafe fn store<S: Simd>(self, l: usize, v: S::V) {
        let at = l * self.height;
        // SAFETY: nothing is stored at or beyond the panel's end.
        unsafe {
            if at + S::LANES <= self.height * self.units {
                S::store(self.out.add(at), v);
            } else {
                S::store_first(self.out.add(at), v, self.height);
            }
        }
    }
}

/// Of an operand stored as [k, m].
#[inline(always)]
unsafe fn columns_across<S: Simd, U: Unit<S>>(operand: Left, rows: Range<usize>, ks: Range<usize>, panel: Columns) {
    // SAFETY: vectors within one stored row, whole ones where it or the panel is wide enough.
    unsafe {
        for l in 0..panel.units {
            let k = ks.start + l * U::K;
            panel.store::<S>(l, across::<S, U>(operand, rows.clone(), k..ks.end));
        }
    }
}

/// The unit at `ks.start` of up to LANES rows of an operand stored as [k, m].
#[inline(always)]
unsafe fn across<S: Simd, U: Unit<S>>(operand: Left, rows: Range<usize>, ks: Range<usize>) -> S::V {
    let whole = rows.start + S::LANES <= operand.stride || rows.len() == S::LANES;
    // SAFETY: as the caller's.
    unsafe {
        let mut v = [S::splat(0.0); 2];
        for (k, v) in ks.zip(&mut v[..U::K]) {
            let row = operand.data.as_ptr().add(k * operand.stride + rows.start);
            *v = if whole { S::load(row) } else { S::load_first(row, rows.len()) };
        }
        U::across(v)
    }
}

/// LANES units along k of one stored row: its `n` elements from `row` on, as far as they are needed, then zeros.
///
/// # Safety
/// The machine has S; the elements exist.
#[inline(always)]
pub(super) unsafe fn along<S: Simd, U: Unit<S>>(row: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's n elements.
    unsafe {
        let mut v = [S::splat(0.0); 2];
        for (i, v) in v[..U::K].iter_mut().enumerate() {
            let (start, n) = (i * S::LANES, n.saturating_sub(i * S::LANES).min(S::LANES));
            if n > 0 {
                *v = f32::load_part::<S>(row.add(start), n);
            }
        }
        U::along(v)
    }
}

/// Of an operand stored as [m, k].
#[inline(always)]
unsafe fn columns_along<S: Simd, U: Unit<S>>(operand: Left, rows: Range<usize>, ks: Range<usize>, panel: Columns) {
    let step = U::K * S::LANES;
    // Where there are fewer rows than lanes the last stands in for the rest: the lanes are overwritten.
    // SAFETY: elements of rows that exist; columns of the panel.
    unsafe {
        let row =
            |i: usize| operand.data.as_ptr().add((rows.start + i.min(rows.len() - 1)) * operand.stride + ks.start);
        let sources: [*const f32; MAX_LANES] = std::array::from_fn(row);
        for k in (0..ks.len()).step_by(step) {
            let n = step.min(ks.len() - k);
            let mut tile = [S::splat(0.0); MAX_LANES];
            let tile = &mut tile[..S::LANES];
            for (v, source) in tile.iter_mut().zip(sources) {
                *v = along::<S, U>(source.add(k), n);
            }
            S::transpose(tile);
            for (i, v) in tile[..n.div_ceil(U::K)].iter().enumerate() {
                panel.store::<S>(k / U::K + i, *v);
            }
        }
    }
}

/// Up to LANES rows as [`Order::Tiles`] has them; rows that do not exist are left as they are.
#[inline(always)]
unsafe fn tiles<S: Simd, U: Unit<S>>(operand: Left, rows: Range<usize>, ks: Range<usize>, out: *mut f32, units: usize) {
    let step = U::K * S::LANES;
    // SAFETY: elements of rows that exist; tiles of LANES rows of LANES units.
    unsafe {
        for l in (0..units).step_by(S::LANES) {
            let out = out.add(l * S::LANES);
            let first = ks.start + l * U::K;
            if operand.transposed {
                let mut tile = [S::splat(0.0); MAX_LANES];
                let tile = &mut tile[..S::LANES];
                for (i, v) in tile.iter_mut().enumerate() {
                    let k = first + i * U::K;
                    if k < ks.end {
                        *v = across::<S, U>(operand, rows.clone(), k..ks.end);
                    }
                }
                S::transpose(tile);
                for (i, v) in tile[..rows.len()].iter().enumerate() {
                    S::store(out.add(i * S::LANES), *v);
                }
            } else {
                let n = step.min(ks.end.saturating_sub(first));
                for (i, row) in rows.clone().enumerate() {
                    let source = operand.data.as_ptr().add(row * operand.stride + first);
                    S::store(out.add(i * S::LANES), along::<S, U>(source, n));
                }
            }
        }
    }
}

/// The elements of a stored right operand, flattened: runs of them share a factor.
pub(super) trait Elements<S: Simd> {
    /// Elements from `first` on that share its factor.
    fn run(&self, first: usize) -> usize;

    /// The factor of the run in which an element lies.
    ///
    /// # Safety
    /// The machine has S; the element exists.
    unsafe fn factor(&self, first: usize) -> S::V;

    /// Whether every vector that starts at a multiple of LANES in a row of this length lies within a run.
    fn whole(stride: usize) -> bool;

    /// LANES elements within one run, that of the factor.
    ///
    /// # Safety
    /// The machine has S; the elements exist; `first` is a multiple of LANES in a row for which `whole` holds.
    unsafe fn within(&self, first: usize, factor: S::V) -> S::V;

    /// Elements in a cache line.
    fn line() -> usize;

    /// Ask for the cache lines of `n` elements that need not exist.
    ///
    /// # Safety
    /// The machine has S.
    unsafe fn prefetch(&self, first: usize, n: usize);

    /// Elements `first` … `first + n − 1`, wherever they lie, zeros in the other lanes.
    ///
    /// # Safety
    /// The machine has S; 0 < n ≤ LANES; the elements exist.
    unsafe fn vector(&self, first: usize, n: usize) -> S::V;
}

impl<S: Simd, T: Float> Elements<S> for *const T {
    #[inline(always)]
    fn run(&self, _: usize) -> usize {
        usize::MAX
    }
    #[inline(always)]
    unsafe fn factor(&self, _: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::splat(1.0) }
    }
    #[inline(always)]
    fn whole(_: usize) -> bool {
        true
    }
    #[inline(always)]
    unsafe fn within(&self, first: usize, _: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { T::load::<S>(self.add(first)) }
    }
    #[inline(always)]
    fn line() -> usize {
        LINE / size_of::<T>()
    }
    #[inline(always)]
    unsafe fn prefetch(&self, first: usize, n: usize) {
        for i in (first..first + n).step_by(<Self as Elements<S>>::line()) {
            // SAFETY: the caller's.
            unsafe { S::prefetch(self.wrapping_add(i).cast()) }
        }
    }
    #[inline(always)]
    unsafe fn vector(&self, first: usize, n: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { T::load_part::<S>(self.add(first), n) }
    }
}

/// `body` on the [`Elements`] of a `WeightSlice`, compiled for each kind of them.
macro_rules! with_elements {
    ($S:ident, $data:expr, $elements:ident => $body:expr) => {
        match $data {
            $crate::gemm::operand::WeightSlice::Dense(dense) => match dense {
                $crate::slices::Floats::F32(data) => {
                    let $elements = &data.as_ptr();
                    $body
                }
                $crate::slices::Floats::Bf16(data) => {
                    let $elements = &data.as_ptr();
                    $body
                }
                $crate::slices::Floats::F16(data) => {
                    let $elements = &data.as_ptr();
                    $body
                }
            },
            $crate::gemm::operand::WeightSlice::Quantized(data) => {
                let $elements = &$crate::gemm::quantized::Decoder::<$S>::new(data);
                $body
            }
        }
    };
}
pub(super) use with_elements;

/// Panels of the right operand: `ks` by `columns`, panel after panel.
///
/// # Safety
/// The machine has S; the ranges lie within the operand; `out` is valid for the units of ks · columns, columns rounded
/// up to whole panels.
#[inline(always)]
pub(super) unsafe fn right<S: Simd, M: Micro<S>>(
    operand: Right,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe { with_elements!(S, operand.data, elements => panels::<S, M>(elements, operand, ks, columns, out)) }
}

#[inline(always)]
unsafe fn panels<S: Simd, M: Micro<S>>(
    elements: &impl Elements<S>,
    operand: Right,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
) {
    let units = M::GEOMETRY.units(ks.len());
    // SAFETY: the caller's.
    unsafe {
        if operand.transposed {
            by_tiles::<S, M::Unit, _>(elements, operand.stride, ks, columns, out, units);
        } else {
            by_rows::<S, M::Unit, _>(elements, operand.stride, ks, columns, out, units);
        }
    }
}

/// The factors of the first K vectors from `first` on, and for how many steps of K vectors they hold.
///
/// # Safety
/// The machine has S; whole vectors of the row exist from `first` on.
#[inline(always)]
pub(super) unsafe fn factors<S: Simd, U: Unit<S>>(elements: &impl Elements<S>, first: usize) -> ([S::V; 2], usize) {
    // SAFETY: the caller's.
    unsafe {
        let (mut factors, mut steps) = ([S::splat(0.0); 2], usize::MAX);
        for (i, factor) in factors[..U::K].iter_mut().enumerate() {
            let at = first + i * S::LANES;
            *factor = elements.factor(at);
            steps = steps.min((elements.run(at) - S::LANES) / (U::K * S::LANES) + 1);
        }
        (factors, steps)
    }
}

/// LANES units along k of one stored row, each vector with its factor.
///
/// # Safety
/// As for [`Elements::within`], K vectors.
#[inline(always)]
pub(super) unsafe fn along_within<S: Simd, U: Unit<S>>(
    elements: &impl Elements<S>,
    first: usize,
    factors: [S::V; 2],
) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let mut v = [S::splat(0.0); 2];
        for (i, v) in v[..U::K].iter_mut().enumerate() {
            *v = elements.within(first + i * S::LANES, factors[i]);
        }
        U::along(v)
    }
}

/// LANES units along k of `n` elements from `first` on, wherever they lie, then zeros.
///
/// # Safety
/// The machine has S; the elements exist.
#[inline(always)]
pub(super) unsafe fn along_anywhere<S: Simd, U: Unit<S>>(elements: &impl Elements<S>, first: usize, n: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let mut v = [S::splat(0.0); 2];
        for (i, v) in v[..U::K].iter_mut().enumerate() {
            let n = n.saturating_sub(i * S::LANES).min(S::LANES);
            if n > 0 {
                *v = elements.vector(first + i * S::LANES, n);
            }
        }
        U::along(v)
    }
}

/// Panels of an operand stored as [k, n], row by row, so that it is read in the order in which it lies.
///
/// # Safety
/// As for [`right`].
#[inline(always)]
unsafe fn by_rows<S: Simd, U: Unit<S>, E: Elements<S>>(
    elements: &E,
    stride: usize,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
    units: usize,
) {
    let panel = units * 2 * S::LANES;
    let vectors = 2 * columns.len().div_ceil(2 * S::LANES);
    for l in 0..units {
        let k = ks.start + l * U::K;
        let rows = U::K.min(ks.end.saturating_sub(k));
        // Rows that do not exist are zeros.
        let whole = if E::whole(stride) && rows == U::K { columns.len() / S::LANES } else { 0 };
        let first = k * stride + columns.start;
        // SAFETY: vector i of a row of units is half of panel i / 2's row; elements within the operand.
        unsafe {
            for row in 0..rows {
                elements.prefetch(first + (AHEAD * U::K + row) * stride, columns.len());
            }
            let out = out.add(l * 2 * S::LANES);
            let mut i = 0;
            while i < whole {
                let (mut factors, mut run) = ([S::splat(0.0); 2], whole - i);
                for (row, factor) in factors[..U::K].iter_mut().enumerate() {
                    let at = first + row * stride + i * S::LANES;
                    *factor = elements.factor(at);
                    run = run.min(elements.run(at) / S::LANES);
                }
                let end = i + run;
                while i < end {
                    let mut v = [S::splat(0.0); 2];
                    for (row, v) in v[..U::K].iter_mut().enumerate() {
                        *v = elements.within(first + row * stride + i * S::LANES, factors[row]);
                    }
                    S::store(out.add(i / 2 * panel + i % 2 * S::LANES), U::across(v));
                    i += 1;
                }
            }
            for i in whole..vectors {
                let n = columns.len().saturating_sub(i * S::LANES).min(S::LANES);
                let mut v = [S::splat(0.0); 2];
                for (row, v) in v[..rows].iter_mut().enumerate() {
                    if n > 0 {
                        *v = elements.vector(first + row * stride + i * S::LANES, n);
                    }
                }
                S::store(out.add(i / 2 * panel + i % 2 * S::LANES), U::across(v));
            }
        }
    }
}

/// Panels of an operand stored as [n, k]: LANES rows at a time, transposed in registers.
///
/// # Safety
/// As for [`right`].
#[inline(always)]
unsafe fn by_tiles<S: Simd, U: Unit<S>, E: Elements<S>>(
    elements: &E,
    stride: usize,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
    units: usize,
) {
    let (panel, step) = (units * 2 * S::LANES, U::K * S::LANES);
    for half in 0..2 * columns.len().div_ceil(2 * S::LANES) {
        let first = columns.start + half * S::LANES;
        let height = S::LANES.min(columns.end.saturating_sub(first));
        // SAFETY: half a panel's rows, LANES at each; elements within the operand.
        unsafe {
            let out = out.add(half / 2 * panel + half % 2 * S::LANES);
            let mut k = ks.start;
            if height == S::LANES && E::whole(stride) {
                let end = ks.start + ks.len() / step * step;
                while k < end {
                    let mut of_rows = [[S::splat(0.0); 2]; MAX_LANES];
                    let mut steps = (end - k) / step;
                    for (i, of_row) in of_rows[..S::LANES].iter_mut().enumerate() {
                        let (factors, hold) = factors::<S, U>(elements, (first + i) * stride + k);
                        *of_row = factors;
                        steps = steps.min(hold);
                    }
                    for k in (k..k + steps * step).step_by(step) {
                        let mut tile = [S::splat(0.0); MAX_LANES];
                        let tile = &mut tile[..S::LANES];
                        let ahead = k.is_multiple_of(E::line());
                        for (i, (v, factors)) in tile.iter_mut().zip(of_rows).enumerate() {
                            *v = along_within::<S, U>(elements, (first + i) * stride + k, factors);
                            if ahead {
                                elements.prefetch((first + S::LANES + i) * stride + k, step);
                            }
                        }
                        S::transpose(tile);
                        let out = out.add((k - ks.start) / U::K * 2 * S::LANES);
                        for (i, v) in tile.iter().enumerate() {
                            S::store(out.add(i * 2 * S::LANES), *v);
                        }
                    }
                    k += steps * step;
                }
            }
            let done = (k - ks.start) / U::K;
            for l in (done..units).step_by(S::LANES) {
                let k = ks.start + l * U::K;
                let n = step.min(ks.end.saturating_sub(k));
                let mut tile = [S::splat(0.0); MAX_LANES];
                for (i, v) in tile[..S::LANES].iter_mut().take(height).enumerate() {
                    *v = along_anywhere::<S, U>(elements, (first + i) * stride + k, n);
                }
                S::transpose(&mut tile[..S::LANES]);
                for (row, v) in tile[..S::LANES.min(units - l)].iter().enumerate() {
                    S::store(out.add((l + row) * 2 * S::LANES), *v);
                }
            }
        }
    }
}
