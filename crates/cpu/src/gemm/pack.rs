//! Packing: a block of an operand rewritten in the order in which the microkernel reads it.
//!
//! A panel of the left operand has h rows (at most a tile's): element (i, k) at k·h + i. A panel of the right operand
//! has 2·LANES columns: element (k, j) at k·2·LANES + j, zeros in the columns that do not exist. Where the stored
//! rows run along k, LANES × LANES tiles are transposed in registers.

use super::operand::{Left, Right};
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
/// The machine has S; the ranges lie within the operand; rows.len() ≤ LANES; `out` is valid for rows · ks elements.
#[inline(always)]
pub(super) unsafe fn left<S: Simd>(operand: Left, rows: Range<usize>, ks: Range<usize>, out: *mut f32) {
    // SAFETY: full loads stay within one stored row, and stores within `out`: one may run beyond its own column into
    // the next, which is stored later; at the end of `out` only what is left is stored.
    unsafe {
        let (height, stride) = (rows.len(), operand.stride);
        let end = height * ks.len();
        if operand.transposed {
            let whole = rows.start + S::LANES <= stride || height == S::LANES;
            for (column, k) in ks.enumerate() {
                let row = operand.data.as_ptr().add(k * stride + rows.start);
                let v = if whole { S::load(row) } else { S::load_first(row, height) };
                store_column::<S>(out, column * height, v, height, end);
            }
            return;
        }
        // Where there are fewer rows than lanes the last stands in for the rest: the lanes are overwritten.
        let row = |i: usize| operand.data.as_ptr().add((rows.start + i.min(height - 1)) * stride + ks.start);
        let sources: [*const f32; MAX_LANES] = std::array::from_fn(row);
        let whole = ks.len() / S::LANES * S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            let mut tile = [S::splat(0.0); MAX_LANES];
            let tile = &mut tile[..S::LANES];
            for (v, source) in tile.iter_mut().zip(sources) {
                *v = S::load(source.add(k));
            }
            S::transpose(tile);
            for (i, v) in tile.iter().enumerate() {
                store_column::<S>(out, (k + i) * height, *v, height, end);
            }
        }
        for k in whole..ks.len() {
            for (i, source) in sources[..height].iter().enumerate() {
                *out.add(k * height + i) = *source.add(k);
            }
        }
    }
}

/// One column of a left panel that ends at `end`.
#[inline(always)]
unsafe fn store_column<S: Simd>(out: *mut f32, at: usize, v: S::V, height: usize, end: usize) {
    // SAFETY: nothing is stored at or beyond `end`.
    unsafe {
        if at + S::LANES <= end {
            S::store(out.add(at), v);
        } else {
            S::store_first(out.add(at), v, height);
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
/// The machine has S; the ranges lie within the operand; `out` is valid for ks · columns elements, columns rounded up
/// to whole panels.
#[inline(always)]
pub(super) unsafe fn right<S: Simd>(operand: Right, ks: Range<usize>, columns: Range<usize>, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe { with_elements!(S, operand.data, elements => panels::<S>(elements, operand, ks, columns, out)) }
}

#[inline(always)]
unsafe fn panels<S: Simd>(
    elements: &impl Elements<S>,
    operand: Right,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        if operand.transposed {
            by_tiles::<S, _>(elements, operand.stride, ks, columns, out);
        } else {
            by_rows::<S, _>(elements, operand.stride, ks, columns, out);
        }
    }
}

/// Panels of an operand stored as [k, n], row by row, so that it is read in the order in which it lies.
///
/// # Safety
/// As for [`right`].
#[inline(always)]
unsafe fn by_rows<S: Simd, E: Elements<S>>(
    elements: &E,
    stride: usize,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
) {
    let panel = ks.len() * 2 * S::LANES;
    let whole = if E::whole(stride) { columns.len() / S::LANES } else { 0 };
    let vectors = 2 * columns.len().div_ceil(2 * S::LANES);
    for (row, k) in ks.enumerate() {
        let first = k * stride + columns.start;
        // SAFETY: vector i of a row is half of panel i / 2's row; elements within the operand.
        unsafe {
            elements.prefetch(first + AHEAD * stride, columns.len());
            let out = out.add(row * 2 * S::LANES);
            let mut i = 0;
            while i < whole {
                let at = first + i * S::LANES;
                let (end, factor) = (whole.min(i + elements.run(at) / S::LANES), elements.factor(at));
                while i < end {
                    let v = elements.within(first + i * S::LANES, factor);
                    S::store(out.add(i / 2 * panel + i % 2 * S::LANES), v);
                    i += 1;
                }
            }
            for i in whole..vectors {
                let left = columns.len().saturating_sub(i * S::LANES).min(S::LANES);
                let v = if left == 0 { S::splat(0.0) } else { elements.vector(first + i * S::LANES, left) };
                S::store(out.add(i / 2 * panel + i % 2 * S::LANES), v);
            }
        }
    }
}

/// Panels of an operand stored as [n, k]: LANES rows at a time, transposed in registers.
///
/// # Safety
/// As for [`right`].
#[inline(always)]
unsafe fn by_tiles<S: Simd, E: Elements<S>>(
    elements: &E,
    stride: usize,
    ks: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
) {
    let panel = ks.len() * 2 * S::LANES;
    for half in 0..2 * columns.len().div_ceil(2 * S::LANES) {
        let first = columns.start + half * S::LANES;
        let height = S::LANES.min(columns.end.saturating_sub(first));
        // SAFETY: half a panel's rows, LANES at each; elements within the operand.
        unsafe {
            let out = out.add(half / 2 * panel + half % 2 * S::LANES);
            let mut k = ks.start;
            if height == S::LANES && E::whole(stride) {
                let end = ks.start + ks.len() / S::LANES * S::LANES;
                while k < end {
                    let mut factors = [S::splat(0.0); MAX_LANES];
                    let mut run = end - k;
                    for (i, factor) in factors[..S::LANES].iter_mut().enumerate() {
                        let at = (first + i) * stride + k;
                        *factor = elements.factor(at);
                        run = run.min(elements.run(at));
                    }
                    for k in (k..k + run).step_by(S::LANES) {
                        let mut tile = [S::splat(0.0); MAX_LANES];
                        let tile = &mut tile[..S::LANES];
                        let ahead = k.is_multiple_of(E::line());
                        for (i, (v, factor)) in tile.iter_mut().zip(factors).enumerate() {
                            *v = elements.within((first + i) * stride + k, factor);
                            if ahead {
                                elements.prefetch((first + S::LANES + i) * stride + k, 1);
                            }
                        }
                        S::transpose(tile);
                        let out = out.add((k - ks.start) * 2 * S::LANES);
                        for (i, v) in tile.iter().enumerate() {
                            S::store(out.add(i * 2 * S::LANES), *v);
                        }
                    }
                    k += run;
                }
            }
            for k in (k..ks.end).step_by(S::LANES) {
                let n = S::LANES.min(ks.end - k);
                let mut tile = [S::splat(0.0); MAX_LANES];
                for (i, v) in tile[..S::LANES].iter_mut().take(height).enumerate() {
                    *v = elements.vector((first + i) * stride + k, n);
                }
                S::transpose(&mut tile[..S::LANES]);
                for (row, v) in tile[..n].iter().enumerate() {
                    S::store(out.add((k - ks.start + row) * 2 * S::LANES), *v);
                }
            }
        }
    }
}
