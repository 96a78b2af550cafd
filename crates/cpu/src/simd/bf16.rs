//! bf16 on machines with units for it: two bf16 in the place of an f32, multiplied and summed by one instruction.
//!
//! The units round to nearest even and take denormals for 0, whatever the thread's modes are.

use super::Simd;
use super::tiles::Tiles;

/// Vectors whose lanes hold pairs of bf16 in an f32's bits, the first of a pair in the lower half.
///
/// # Safety
/// As for [`Simd`], and the machine has the units: see [`super::Isa::run_bf16`].
pub(crate) unsafe trait Bf16Units: Simd {
    /// The matrix units of machines that have them too.
    type Tiles: Tiles;
    /// 2·LANES consecutive elements, rounded: lane i is the pair of elements 2i and 2i + 1.
    unsafe fn pair_along(first: Self::V, second: Self::V) -> Self::V;
    /// Two rows, rounded: lane i is the pair of their elements i.
    unsafe fn pair_across(first: Self::V, second: Self::V) -> Self::V;
    /// c + a₀·b₀ + a₁·b₁ in every lane, the product of the second of a pair joining the sum first.
    unsafe fn dot(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Bf16Units;
    use crate::simd::Avx512;
    use std::arch::x86_64::*;

    /// The words of two halves, by turns: 0, 16, 1, 17, …
    const BY_TURNS: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        order
    };

    // SAFETY: the caller's machine has the features of `run_bf16`.
    #[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
    unsafe impl Bf16Units for Avx512 {
        type Tiles = crate::simd::tiles::Amx;

        #[inline(always)]
        unsafe fn pair_along(first: __m512, second: __m512) -> __m512 {
            unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
        }
        #[inline(always)]
        unsafe fn pair_across(first: __m512, second: __m512) -> __m512 {
            unsafe {
                let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_loadu_si512(BY_TURNS.as_ptr().cast()), words))
            }
        }
        #[inline(always)]
        unsafe fn dot(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe {
                let bits = |v| std::mem::transmute::<__m512, __m512bh>(v);
                _mm512_dpbf16_ps(c, bits(a), bits(b))
            }
        }
    }
}

/// The units in plain Rust, so that what is written for them is tried on any machine.
#[cfg(test)]
mod emulated {
    use super::Bf16Units;
    use crate::simd::{Portable, tiles};
    use half::bf16;

    /// x to bf16 as the units take it, its sixteen bits.
    fn taken(x: f32) -> u32 {
        u32::from(bf16::from_f32(flushed(x)).to_bits())
    }

    fn flushed(x: f32) -> f32 {
        if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
    }

    fn pair(first: f32, second: f32) -> f32 {
        f32::from_bits(taken(first) | taken(second) << 16)
    }

    /// What the bits of a lane stand for.
    fn halves(x: f32) -> (f32, f32) {
        (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xFFFF_0000))
    }

    // SAFETY: plain Rust.
    unsafe impl<const N: usize> Bf16Units for Portable<N> {
        type Tiles = tiles::emulated::Emulated;

        #[inline(always)]
        unsafe fn pair_along(first: Self::V, second: Self::V) -> Self::V {
            let element = |i: usize| if i < N { first[i] } else { second[i - N] };
            std::array::from_fn(|i| pair(element(2 * i), element(2 * i + 1)))
        }
        #[inline(always)]
        unsafe fn pair_across(first: Self::V, second: Self::V) -> Self::V {
            std::array::from_fn(|i| pair(first[i], second[i]))
        }
        #[inline(always)]
        unsafe fn dot(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            std::array::from_fn(|i| {
                let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
                flushed(a0.mul_add(b0, flushed(a1.mul_add(b1, flushed(c[i])))))
            })
        }
    }
}
