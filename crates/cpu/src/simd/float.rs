//! The three float types that vectors are loaded from and stored to, whole or in part.

use super::Simd;
use half::{bf16, f16};
use rankfold_backend::Element;

/// f32, bf16 or f16.
pub(crate) trait Float: Element {
    /// The nearest value, ties to even.
    fn from_f64(x: f64) -> Self;
    /// The same value.
    fn to_f32(self) -> f32;
    /// LANES elements, widened.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// LANES elements, rounded to nearest even.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);

    /// The first `n` ≤ LANES elements, 0 in the rest.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V {
        // SAFETY: n elements are read of p, LANES ≤ 16 of the copy.
        unsafe {
            if n == S::LANES {
                return Self::load::<S>(p);
            }
            let mut copy = [Self::zeroed(); 16];
            p.copy_to_nonoverlapping(copy.as_mut_ptr(), n);
            Self::load::<S>(copy.as_ptr())
        }
    }

    /// Only the first `n` ≤ LANES elements.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    unsafe fn store_part<S: Simd>(p: *mut Self, v: S::V, n: usize) {
        // SAFETY: n elements are written to p, LANES ≤ 16 to the copy.
        unsafe {
            if n == S::LANES {
                return Self::store::<S>(p, v);
            }
            let mut copy = [Self::zeroed(); 16];
            Self::store::<S>(copy.as_mut_ptr(), v);
            p.copy_from_nonoverlapping(copy.as_ptr(), n);
        }
    }
}

/// x as an f32 whose last bit says whether anything was cut off: rounding it again, to a type with at least two bits
/// less, gives what rounding x once gives (Boldo & Melquiond 2008).
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let value = f64::from(nearest);
    if value == x || x.is_nan() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    // The neighbour on the other side of x is odd; that of an infinity is the largest number.
    f32::from_bits(if value.abs() < x.abs() { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 })
}

// SAFETY (of every block below): the caller's machine has S, and pointers are valid as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
mod impls {
    use super::*;

    impl Float for f32 {
        fn from_f64(x: f64) -> Self {
            x as Self
        }
        #[inline(always)]
        fn to_f32(self) -> f32 {
            self
        }
        #[inline(always)]
        unsafe fn load<S: Simd>(p: *const Self) -> S::V {
            unsafe { S::load(p) }
        }
        #[inline(always)]
        unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
            unsafe { S::store(p, v) }
        }
        #[inline(always)]
        unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V {
            unsafe { if n == S::LANES { S::load(p) } else { S::load_first(p, n) } }
        }
        #[inline(always)]
        unsafe fn store_part<S: Simd>(p: *mut Self, v: S::V, n: usize) {
            unsafe { if n == S::LANES { S::store(p, v) } else { S::store_first(p, v, n) } }
        }
    }

    impl Float for bf16 {
        fn from_f64(x: f64) -> Self {
            Self::from_f32(to_odd(x))
        }
        #[inline(always)]
        fn to_f32(self) -> f32 {
            self.to_f32()
        }
        #[inline(always)]
        unsafe fn load<S: Simd>(p: *const Self) -> S::V {
            unsafe { S::load_bf16(p) }
        }
        #[inline(always)]
        unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
            unsafe { S::store_bf16(p, v) }
        }
    }

    impl Float for f16 {
        fn from_f64(x: f64) -> Self {
            Self::from_f32(to_odd(x))
        }
        #[inline(always)]
        fn to_f32(self) -> f32 {
            self.to_f32()
        }
        #[inline(always)]
        unsafe fn load<S: Simd>(p: *const Self) -> S::V {
            unsafe { S::load_f16(p) }
        }
        #[inline(always)]
        unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
            unsafe { S::store_f16(p, v) }
        }
    }
}
