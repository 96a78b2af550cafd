//! A head's strided rows, packed: as rows padded with zeros, or transposed.

use crate::simd::{Float, Kernel, Simd};
use std::ops::Range;

/// out row r = factor · x[rows(r)], padded with zeros to `width`.
pub(super) fn rows(x: &[f32], factor: f32, width: usize, rows: impl Iterator<Item = Range<usize>>, out: &mut [f32]) {
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        let (out, padding) = out.split_at_mut(row.len());
        out.iter_mut().zip(&x[row]).for_each(|(out, x)| *out = factor * x);
        padding.fill(0.0);
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
                            *v = f32::load_part::<S>(self.x.as_ptr().add(first + (j + r) * stride + d), n);
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
