//! A head's strided rows, packed: as rows padded with zeros, or transposed.

use crate::simd::{Float, Kernel, Simd};
use std::ops::Range;

/// Vector lanes as a product takes them: rounded to bf16 with `round`.
#[inline(always)]
pub(super) unsafe fn taken<S: Simd>(round: bool, v: S::V) -> S::V {
    // SAFETY: the caller's machine has S.
    unsafe { if round { S::round_bf16(v) } else { v } }
}

/// out row r = x[rows(r)], padded with zeros to `width`.
pub(super) struct Rows<'a, I> {
    pub(super) x: &'a [f32],
    pub(super) rows: I,
    /// A multiple of the vector's lanes.
    pub(super) width: usize,
    pub(super) round: bool,
    pub(super) out: &'a mut [f32],
}

impl<I: Iterator<Item = Range<usize>>> Kernel for Rows<'_, I> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert!(self.width.is_multiple_of(S::LANES));
        for (row, out) in self.rows.zip(self.out.chunks_exact_mut(self.width)) {
            let x = &self.x[row];
            for d in (0..self.width).step_by(S::LANES) {
                let n = x.len().saturating_sub(d).min(S::LANES);
                // SAFETY: n elements of a row of x, a vector of one of out.
                unsafe {
                    let v = if n == 0 { S::splat(0.0) } else { f32::load_part::<S>(x.as_ptr().add(d), n) };
                    S::store(out.as_mut_ptr().add(d), taken::<S>(self.round, v));
                }
            }
        }
    }
}

/// out[d·columns + j] = x[first + j·stride + d] for d < depth and j < rows; 0 for rows ≤ j < columns.
pub(super) struct Transpose<'a> {
    pub(super) x: &'a [f32],
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) depth: usize,
    /// A multiple of the vector's lanes.
    pub(super) columns: usize,
    pub(super) round: bool,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { first, stride, rows, depth, columns, .. } = self;
        assert!(columns.is_multiple_of(S::LANES) && rows <= columns && depth * columns <= self.out.len());
        assert!(rows == 0 || first + (rows - 1) * stride + depth <= self.x.len());
        for j in (0..columns).step_by(S::LANES) {
            for d in (0..depth).step_by(S::LANES) {
                let n = S::LANES.min(depth - d);
                // SAFETY: n elements of each row of x that exists; n rows of LANES columns of out.
                unsafe {
                    let mut tile = [S::splat(0.0); 16];
                    for (r, v) in tile[..S::LANES].iter_mut().enumerate() {
                        if j + r < rows {
                            let row = self.x.as_ptr().add(first + (j + r) * stride + d);
                            *v = taken::<S>(self.round, f32::load_part::<S>(row, n));
                        }
                    }
                    S::transpose(&mut tile[..S::LANES]);
                    for (r, v) in tile[..n].iter().enumerate() {
                        S::store(self.out.as_mut_ptr().add((d + r) * columns + j), *v);
                    }
                }
            }
        }
    }
}
