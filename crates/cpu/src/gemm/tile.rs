//! The microkernel in registers: C[R, 2·LANES] = or += Σ_l a_l b_lᵀ over units l of k.
//!
//! A tile of C lives in 2·R vectors while l runs; each step loads two vectors of b, broadcasts R units of a, and
//! does 2·R multiply-adds. The registers say how large R may be: with AVX2 (16) it is 6, 12 accumulators and 8 loads for
//! 12 multiply-adds; with AVX-512 (32) 14, 28 accumulators and 16 loads for 28. Each element of C is one chain of them
//! from 0 in the order of l, whatever R its tile has, so the bits do not depend on how rows are cut into tiles.

use super::micro::{Geometry, Micro, Order};
use super::unit::Unit;
use crate::simd::Simd;
use std::marker::PhantomData;

/// One tile's operands.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// The length of the sums, in units.
    pub units: usize,
    /// The left operand: a packed panel, or its first unit (i, l) at i·stride + l as it is stored.
    pub a: *const f32,
    /// `None` where `a` is packed.
    pub stride: Option<usize>,
    /// Packed: unit (l, j) at l·2·LANES + j.
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

/// Rows of a tile that leave registers for two vectors of b and a unit of a.
const fn most_rows<S: Simd>() -> usize {
    (S::REGISTERS - 3) / 2
}

/// The microkernel on vectors of U.
pub(crate) struct Registers<U>(PhantomData<U>);

impl<S: Simd, U: Unit<S>> Micro<S> for Registers<U> {
    type Unit = U;

    const GEOMETRY: Geometry = Geometry {
        k: U::K,
        units: 1,
        rows: most_rows::<S>(),
        columns: 2 * S::LANES,
        left: Order::Columns,
        stored: U::STORED,
    };

    #[inline(always)]
    unsafe fn tile(tile: Tile, rows: usize) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => tile.rows::<S, U, 1>(),
                2 if const { most_rows::<S>() >= 2 } => tile.rows::<S, U, 2>(),
                3 if const { most_rows::<S>() >= 3 } => tile.rows::<S, U, 3>(),
                4 if const { most_rows::<S>() >= 4 } => tile.rows::<S, U, 4>(),
                5 if const { most_rows::<S>() >= 5 } => tile.rows::<S, U, 5>(),
                6 if const { most_rows::<S>() >= 6 } => tile.rows::<S, U, 6>(),
                7 if const { most_rows::<S>() >= 7 } => tile.rows::<S, U, 7>(),
                8 if const { most_rows::<S>() >= 8 } => tile.rows::<S, U, 8>(),
                9 if const { most_rows::<S>() >= 9 } => tile.rows::<S, U, 9>(),
                10 if const { most_rows::<S>() >= 10 } => tile.rows::<S, U, 10>(),
                11 if const { most_rows::<S>() >= 11 } => tile.rows::<S, U, 11>(),
                12 if const { most_rows::<S>() >= 12 } => tile.rows::<S, U, 12>(),
                13 if const { most_rows::<S>() >= 13 } => tile.rows::<S, U, 13>(),
                14 if const { most_rows::<S>() >= 14 } => tile.rows::<S, U, 14>(),
                _ => debug_assert!(false, "a tile of {rows} rows"),
            }
        }
    }
}

impl Tile {
    #[inline(always)]
    unsafe fn rows<S: Simd, U: Unit<S>, const R: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            // A tile of c comes from L3 or memory while its sums are formed.
            for i in 0..R {
                let row = self.c.add(i * self.c_stride).cast::<u8>();
                S::prefetch(row);
                S::prefetch(row.wrapping_add(4 * (2 * S::LANES - 1)));
            }
            // Where no column of the second vector exists, half of the work is none.
            match (self.stride, self.columns > S::LANES) {
                (None, true) => self.store::<S, R, 2>(self.sums::<S, U, R, 2, true>(0)),
                (None, false) => self.store::<S, R, 1>(self.sums::<S, U, R, 1, true>(0)),
                (Some(stride), true) => self.store::<S, R, 2>(self.sums::<S, U, R, 2, false>(stride)),
                (Some(stride), false) => self.store::<S, R, 1>(self.sums::<S, U, R, 1, false>(stride)),
            }
        }
    }

    /// The loop over units, for N vectors of columns.
    #[inline(always)]
    unsafe fn sums<S: Simd, U: Unit<S>, const R: usize, const N: usize, const PACKED: bool>(
        self,
        stride: usize,
    ) -> [[S::V; N]; R] {
        // SAFETY: a row of N vectors of b and R units of a for each step.
        unsafe {
            let mut sums = [[S::splat(0.0); N]; R];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.units {
                let mut of_b = [S::splat(0.0); N];
                for (j, v) in of_b.iter_mut().enumerate() {
                    *v = S::load(b.add(j * S::LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = S::splat(*a.add(if PACKED { i } else { i * stride }));
                    for (sum, v) in sums.iter_mut().zip(of_b) {
                        *sum = U::multiply_add(x, v, *sum);
                    }
                }
                a = a.add(if PACKED { R } else { 1 });
                b = b.add(2 * S::LANES);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const R: usize, const N: usize>(self, sums: [[S::V; N]; R]) {
        // SAFETY: only the columns that exist are touched.
        unsafe {
            for (i, sums) in sums.into_iter().enumerate() {
                let c = self.c.add(i * self.c_stride);
                for (j, v) in sums.into_iter().enumerate() {
                    self.store_part::<S>(c.add(j * S::LANES), v, (self.columns - j * S::LANES).min(S::LANES));
                }
            }
        }
    }

    /// The `n` > 0 columns of c that a vector holds.
    #[inline(always)]
    unsafe fn store_part<S: Simd>(self, c: *mut f32, v: S::V, n: usize) {
        // SAFETY: n elements of c.
        unsafe {
            if n == S::LANES {
                S::store(c, if self.accumulate { S::add(S::load(c), v) } else { v });
            } else {
                S::store_first(c, if self.accumulate { S::add(S::load_first(c, n), v) } else { v }, n);
            }
        }
    }
}
