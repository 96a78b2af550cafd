//! What panels are made of: units, each as wide as an f32, of one or two elements along k.
//!
//! With [`Compute::F32`](rankfold_backend::Compute::F32) a unit is an element. With bf16 it is a pair of bf16 where the
//! machine has units that multiply pairs, and elsewhere an f32 that was rounded to bf16. Packing and the kernels for a
//! few rows know no more of the precision than this file; nor does anything else of the microkernel in registers.

use crate::simd::{Bf16Units, Simd};

/// The unit of a product's operands.
pub(crate) trait Unit<S: Simd>: 'static {
    /// Elements along k.
    const K: usize;
    /// Whether a unit is an f32 element as it is stored.
    const STORED: bool;

    /// LANES units beside each other along k: of K·LANES consecutive elements, the first K vectors.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn along(elements: [S::V; 2]) -> S::V;

    /// LANES units, one a column: of K rows, the first K vectors.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn across(rows: [S::V; 2]) -> S::V;

    /// c + Σ a·b over the elements of a unit, in every lane.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn multiply_add(a: S::V, b: S::V, c: S::V) -> S::V;
}

/// An f32.
pub(crate) struct Full;

impl<S: Simd> Unit<S> for Full {
    const K: usize = 1;
    const STORED: bool = true;

    #[inline(always)]
    unsafe fn along([elements, _]: [S::V; 2]) -> S::V {
        elements
    }
    #[inline(always)]
    unsafe fn across([row, _]: [S::V; 2]) -> S::V {
        row
    }
    #[inline(always)]
    unsafe fn multiply_add(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::fma(a, b, c) }
    }
}

/// An f32 rounded to bf16: its products are exact, as those of bf16 units are.
pub(crate) struct Rounded;

impl<S: Simd> Unit<S> for Rounded {
    const K: usize = 1;
    const STORED: bool = false;

    #[inline(always)]
    unsafe fn along([elements, _]: [S::V; 2]) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::round_bf16(elements) }
    }
    #[inline(always)]
    unsafe fn across([row, _]: [S::V; 2]) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::round_bf16(row) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::fma(a, b, c) }
    }
}

/// Two bf16.
pub(crate) struct Pair;

impl<S: Bf16Units> Unit<S> for Pair {
    const K: usize = 2;
    const STORED: bool = false;

    #[inline(always)]
    unsafe fn along([first, second]: [S::V; 2]) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::pair_along(first, second) }
    }
    #[inline(always)]
    unsafe fn across([first, second]: [S::V; 2]) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::pair_across(first, second) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::dot(a, b, c) }
    }
}
