//! Products of blocks that lie in a near cache: C[m, n] = or += A[m, k] · B[k, n].
//!
//! B and C are row-major with whole vectors a row; A is read one element at a time, so it may have any strides and be
//! transposed at no cost. A tile of [`ROWS`] × 2 vectors of C stays in registers while k runs: 12 accumulators hide
//! the latency of two FMAs a cycle on every machine met.

use crate::simd::{Kernel, Simd};

/// Rows of the largest tile.
pub(super) const ROWS: usize = 6;

/// One product.
pub(super) struct Product<'a> {
    pub(super) m: usize,
    /// A multiple of the vector's lanes.
    pub(super) n: usize,
    pub(super) k: usize,
    /// Element (i, l) at i·strides[0] + l·strides[1].
    pub(super) a: &'a [f32],
    pub(super) strides: [usize; 2],
    /// Element (l, j) at l·b_row + j.
    pub(super) b: &'a [f32],
    pub(super) b_row: usize,
    /// Element (i, j) at i·c_row + j.
    pub(super) c: &'a mut [f32],
    pub(super) c_row: usize,
    pub(super) accumulate: bool,
}

impl Kernel for Product<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { m, n, k, strides, b_row, c_row, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        assert!(n.is_multiple_of(S::LANES) && (m - 1) * c_row + n <= self.c.len());
        assert!(k == 0 || (m - 1) * strides[0] + (k - 1) * strides[1] < self.a.len());
        assert!(k == 0 || (k - 1) * b_row + n <= self.b.len());
        let (a, c) = (self.a.as_ptr(), self.c.as_mut_ptr());
        let mut tile = Tile { k, a, strides, b: self.b.as_ptr(), b_row, c, c_row, accumulate: self.accumulate };
        for i in (0..m).step_by(ROWS) {
            // SAFETY: rows i … i + rows − 1 of A and C, which the assertions above found to lie in their slices.
            unsafe {
                tile.a = a.add(i * strides[0]);
                tile.c = c.add(i * c_row);
                match m - i {
                    1 => tile.row::<S, 1>(n),
                    2 => tile.row::<S, 2>(n),
                    3 => tile.row::<S, 3>(n),
                    4 => tile.row::<S, 4>(n),
                    5 => tile.row::<S, 5>(n),
                    _ => tile.row::<S, ROWS>(n),
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Tile {
    k: usize,
    a: *const f32,
    strides: [usize; 2],
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    accumulate: bool,
}

impl Tile {
    /// R rows of C.
    ///
    /// # Safety
    /// The machine has S; the pointers are valid for R rows of A and C, k rows of B, n columns of B and C.
    #[inline(always)]
    unsafe fn row<S: Simd, const R: usize>(mut self, n: usize) {
        // SAFETY: the caller's.
        unsafe {
            let vectors = n / S::LANES;
            for _ in 0..vectors / 2 {
                self.run::<S, R, 2>();
                self.b = self.b.add(2 * S::LANES);
                self.c = self.c.add(2 * S::LANES);
            }
            if vectors % 2 == 1 {
                self.run::<S, R, 1>();
            }
        }
    }

    /// R rows, N vectors.
    ///
    /// # Safety
    /// As [`Tile::row`], for N vectors.
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize, const N: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[S::splat(0.0); N]; R];
            for l in 0..self.k {
                let mut b = [S::splat(0.0); N];
                for (j, b) in b.iter_mut().enumerate() {
                    *b = S::load(self.b.add(l * self.b_row + j * S::LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = S::splat(*self.a.add(i * self.strides[0] + l * self.strides[1]));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = S::fma(a, b, *sum);
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    let c = self.c.add(i * self.c_row + j * S::LANES);
                    S::store(c, if self.accumulate { S::add(S::load(c), sum) } else { sum });
                }
            }
        }
    }
}
