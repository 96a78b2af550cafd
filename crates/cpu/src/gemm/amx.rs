//! The microkernel on AMX: C[≤ 32, 32] = or += A·B of bf16, with C in four tiles.
//!
//! ```text
//! tiles 0 1    C      4 A, upper rows    6 7   B, left and right columns
//!       2 3           5    lower rows
//! ```
//!
//! Each step of 16 units (32 of k) loads four tiles and multiplies each of A with each of B: as many products as loads,
//! which is what two load ports keep up with. Where c has fewer than 32 columns or rows that are no multiple of 16, its
//! tiles go through a buffer; rows of A that do not exist are whatever the buffer holds, and their sums are dropped. An
//! element of C is c (or 0), then + (the chain of FMAs of even k + that of odd k) for every 32 of k.

use super::micro::{Geometry, Micro, Order};
use super::tile::Tile;
use super::unit::{Pair, Unit};
use crate::simd::Bf16Units;
use crate::simd::tiles::{ROW, ROWS, Tiles};

/// Rows, and columns, of a tile of C.
const SIDE: usize = 2 * ROWS;

/// Units of a tile.
const TILE: usize = ROWS * ROWS;

/// The microkernel.
pub(crate) struct Matrix;

impl<S: Bf16Units> Micro<S> for Matrix {
    type Unit = Pair;

    const GEOMETRY: Geometry = Geometry {
        k: <Pair as Unit<S>>::K,
        units: ROWS,
        rows: SIDE,
        columns: 2 * S::LANES,
        left: Order::Tiles,
        stored: false,
    };

    #[inline(always)]
    unsafe fn begin() {
        const { assert!(S::LANES == ROWS) };
        // SAFETY: the caller's machine has the tiles.
        unsafe { S::Tiles::configure() }
    }

    #[inline(always)]
    unsafe fn tile(tile: Tile, rows: usize) {
        // SAFETY: the caller's; the buffer has as many rows and columns as four tiles.
        unsafe {
            if tile.columns == SIDE && rows.is_multiple_of(ROWS) {
                for i in 0..rows {
                    let row = tile.c.add(i * tile.c_stride).cast::<u8>();
                    S::prefetch(row);
                    S::prefetch(row.add(ROW));
                }
                return multiply::<S::Tiles>(&tile, tile.c, tile.c_stride, rows);
            }
            let mut buffer = [[0.0f32; SIDE]; SIDE];
            if tile.accumulate {
                for (i, row) in buffer[..rows].iter_mut().enumerate() {
                    tile.c.add(i * tile.c_stride).copy_to_nonoverlapping(row.as_mut_ptr(), tile.columns);
                }
            }
            multiply::<S::Tiles>(&tile, buffer.as_mut_ptr().cast(), SIDE, rows);
            for (i, row) in buffer[..rows].iter().enumerate() {
                tile.c.add(i * tile.c_stride).copy_from_nonoverlapping(row.as_ptr(), tile.columns);
            }
        }
    }

    #[inline(always)]
    unsafe fn end() {
        // SAFETY: the tiles were configured.
        unsafe { S::Tiles::release() }
    }
}

/// c [32 or 16, 32], its rows `stride` elements apart, = or += A·B; of the columns only the first 16 where no others exist.
#[inline(always)]
unsafe fn multiply<T: Tiles>(tile: &Tile, c: *mut f32, stride: usize, rows: usize) {
    // SAFETY: whole tiles of c; tiles of a as `Order::Tiles` has them, of b as any right panel.
    unsafe {
        let (lower, right, row) = (rows > ROWS, tile.columns > ROWS, stride * size_of::<f32>());
        let c_lower = c.wrapping_add(ROWS * stride);
        if tile.accumulate {
            T::load::<0>(c, row);
            if right {
                T::load::<1>(c.add(ROWS), row);
            }
            if lower {
                T::load::<2>(c_lower, row);
            }
            if lower && right {
                T::load::<3>(c_lower.add(ROWS), row);
            }
        } else {
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
        }
        let a_lower = tile.a.wrapping_add(ROWS * tile.units);
        for step in 0..tile.units / ROWS {
            let b = tile.b.add(step * ROWS * SIDE);
            T::load::<6>(b, 2 * ROW);
            T::load::<4>(tile.a.add(step * TILE), ROW);
            T::multiply_add::<0, 4, 6>();
            if right {
                T::load::<7>(b.add(ROWS), 2 * ROW);
                T::multiply_add::<1, 4, 7>();
            }
            if lower {
                T::load::<5>(a_lower.add(step * TILE), ROW);
                T::multiply_add::<2, 5, 6>();
            }
            if lower && right {
                T::multiply_add::<3, 5, 7>();
            }
        }
        T::store::<0>(c, row);
        if right {
            T::store::<1>(c.add(ROWS), row);
        }
        if lower {
            T::store::<2>(c_lower, row);
        }
        if lower && right {
            T::store::<3>(c_lower.add(ROWS), row);
        }
    }
}
