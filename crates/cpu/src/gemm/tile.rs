//! The microkernel: C[R, 2·LANES] = or += Σ_k a_k b_kᵀ, in registers.
//!
//! A tile of C lives in 2·R vectors while k runs; each step loads two vectors of b, broadcasts R elements of a, and
//! does 2·R FMAs. With AVX2 (16 registers) R is 6: 12 accumulators, 8 loads for 12 FMAs; with AVX-512 (32) it is 14:
//! 28 accumulators, 16 loads for 28 FMAs. Each element of C is one chain of FMAs from 0 in the order of k, whatever
//! R its tile has, so the bits do not depend on how rows are cut into tiles.

use crate::simd::Simd;

/// Rows of the largest tile.
pub(super) const fn rows(lanes: usize) -> usize {
    if lanes == 16 { 14 } else { 6 }
}

/// Columns of every tile, and of a packed panel of the right operand.
pub(super) const fn columns(lanes: usize) -> usize {
    2 * lanes
}

/// One tile's operands.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// The length of the sums.
    pub k: usize,
    /// Element (i, k) of the left operand: at k·rows + i, packed; at i·stride + k, as it is stored.
    pub a: *const f32,
    /// `None` where `a` is packed.
    pub stride: Option<usize>,
    /// Packed: element (k, j) at k·2·LANES + j.
    pub b: *const f32,
    /// Element (i, j) of the result at i·c_stride + j.
    pub c: *mut f32,
    /// See `c`.
    pub c_stride: usize,
    /// 1 … 2·LANES: columns of c that exist.
    pub columns: usize,
    /// Add to c instead of overwriting it.
    pub accumulate: bool,
}

impl Tile {
    /// The tile of `rows` rows.
    ///
    /// # Safety
    /// The machine has S; rows is 1 … rows(LANES); the pointers are valid for the elements named.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(self, rows: usize) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => self.rows::<S, 1>(),
                2 => self.rows::<S, 2>(),
                3 => self.rows::<S, 3>(),
                4 => self.rows::<S, 4>(),
                5 => self.rows::<S, 5>(),
                6 => self.rows::<S, 6>(),
                7 if S::LANES == 16 => self.rows::<S, 7>(),
                8 if S::LANES == 16 => self.rows::<S, 8>(),
                9 if S::LANES == 16 => self.rows::<S, 9>(),
                10 if S::LANES == 16 => self.rows::<S, 10>(),
                11 if S::LANES == 16 => self.rows::<S, 11>(),
                12 if S::LANES == 16 => self.rows::<S, 12>(),
                13 if S::LANES == 16 => self.rows::<S, 13>(),
                14 if S::LANES == 16 => self.rows::<S, 14>(),
                _ => debug_assert!(false, "a tile of {rows} rows"),
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            // A tile of c comes from L3 or memory while its sums are formed.
            for i in 0..R {
                let row = self.c.add(i * self.c_stride).cast::<u8>();
                S::prefetch(row);
                S::prefetch(row.wrapping_add(4 * (2 * S::LANES - 1)));
            }
            let sums = match self.stride {
                None => self.sums::<S, R, true>(0),
                Some(stride) => self.sums::<S, R, false>(stride),
            };
            self.store::<S, R>(sums);
        }
    }

    /// The loop over k.
    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const PACKED: bool>(self, stride: usize) -> [[S::V; 2]; R] {
        // SAFETY: k rows of two vectors of b; R elements of a for each k.
        unsafe {
            let mut sums = [[S::splat(0.0); 2]; R];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.k {
                let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
                for (i, [left, right]) in sums.iter_mut().enumerate() {
                    let x = S::splat(*a.add(if PACKED { i } else { i * stride }));
                    *left = S::fma(x, b0, *left);
                    *right = S::fma(x, b1, *right);
                }
                a = a.add(if PACKED { R } else { 1 });
                b = b.add(2 * S::LANES);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const R: usize>(self, sums: [[S::V; 2]; R]) {
        // SAFETY: only the columns that exist are touched.
        unsafe {
            let second = self.columns.saturating_sub(S::LANES);
            for (i, [v0, v1]) in sums.into_iter().enumerate() {
                let c = self.c.add(i * self.c_stride);
                if second == S::LANES {
                    let right = c.add(S::LANES);
                    if self.accumulate {
                        S::store(c, S::add(S::load(c), v0));
                        S::store(right, S::add(S::load(right), v1));
                    } else {
                        S::store(c, v0);
                        S::store(right, v1);
                    }
                } else {
                    self.store_part::<S>(c, v0, self.columns.min(S::LANES));
                    self.store_part::<S>(c.add(S::LANES.min(self.columns)), v1, second);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store_part<S: Simd>(self, c: *mut f32, v: S::V, n: usize) {
        // SAFETY: n elements of c.
        unsafe {
            if n == S::LANES {
                S::store(c, if self.accumulate { S::add(S::load(c), v) } else { v });
            } else if n > 0 {
                S::store_first(c, if self.accumulate { S::add(S::load_first(c, n), v) } else { v }, n);
            }
        }
    }
}
