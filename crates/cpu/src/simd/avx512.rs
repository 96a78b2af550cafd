//! Sixteen lanes of AVX-512.

use super::{Avx2, Simd};
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// The nearest bf16 in the upper halves.
#[inline(always)]
unsafe fn rounded(v: __m512) -> __m512i {
    // SAFETY: the caller's machine has AVX-512.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

// SAFETY: in every method the caller's machine has the features of `run_avx512`, and pointers are valid as the
// trait says; masked loads and stores do not touch the lanes that are off.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
unsafe impl Simd for Avx512 {
    type V = __m512;
    type Table = __m512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(first(n), p) }
    }
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: __m512, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, first(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn round_bf16(v: __m512) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(rounded(v), _mm512_set1_epi32(0xFFFF_0000u32 as i32))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut half::bf16, v: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded(v)))) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut half::f16, v: __m512) {
        unsafe {
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale_exp2(a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            Avx2::sum(eight)
        }
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            Avx2::max_lane(eight)
        }
    }
    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> __m512 {
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn lookup_nibbles(table: __m512, p: *const u8) -> __m512 {
        unsafe {
            let (low, high) = (p.cast::<i32>().read_unaligned(), p.add(4).cast::<i32>().read_unaligned());
            let words = _mm512_inserti64x4::<1>(_mm512_set1_epi32(low), _mm256_set1_epi32(high));
            let shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
            // The permutation reads 4 bits of a lane: no mask is needed.
            _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table)
        }
    }
    #[inline(always)]
    unsafe fn encode_nibbles(thresholds: __m512, codes: __m512, v: __m512, p: *mut u8) {
        unsafe {
            // A binary search of four steps.
            let mut index = _mm512_setzero_si512();
            for step in [8, 4, 2, 1] {
                let probe = _mm512_add_epi32(index, _mm512_set1_epi32(step - 1));
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, _mm512_permutexvar_ps(probe, thresholds));
                index = _mm512_mask_or_epi32(index, above, index, _mm512_set1_epi32(step));
            }
            let codes = _mm512_castps_si512(_mm512_permutexvar_ps(index, codes));
            // In each 64-bit lane the low byte becomes first · 16 + second.
            let bytes = _mm512_or_si512(_mm512_slli_epi64::<4>(codes), _mm512_srli_epi64::<32>(codes));
            _mm_storel_epi64(p.cast(), _mm512_cvtepi64_epi8(bytes));
        }
    }
    #[inline(always)]
    unsafe fn encode_many(thresholds: __m512, codes: __m512, v: [__m512; 4], p: *mut u8) {
        unsafe {
            // AVX2's search, which keeps what it finds in vectors, is faster than one through mask registers.
            let halves = |v| (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let ((a, b), (c, d)) = (halves(v[0]), halves(v[1]));
            Avx2::encode_many(halves(thresholds), halves(codes), [a, b, c, d], p);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose(r: &mut [__m512]) {
        unsafe {
            // 4 × 4 transposes within 128-bit lanes, then the lanes themselves as a 4 × 4 matrix.
            for q in 0..4 {
                let (a, b, c, d) = (r[4 * q], r[4 * q + 1], r[4 * q + 2], r[4 * q + 3]);
                let (ab0, ab1) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd0, cd1) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                r[4 * q] = _mm512_shuffle_ps::<0x44>(ab0, cd0);
                r[4 * q + 1] = _mm512_shuffle_ps::<0xEE>(ab0, cd0);
                r[4 * q + 2] = _mm512_shuffle_ps::<0x44>(ab1, cd1);
                r[4 * q + 3] = _mm512_shuffle_ps::<0xEE>(ab1, cd1);
            }
            for i in 0..4 {
                let (a, b, c, d) = (r[i], r[4 + i], r[8 + i], r[12 + i]);
                // 128-bit lanes (0, 2) of two, then (1, 3): the first step of the lanes' own transpose.
                let (ab0, ab1) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
                let (cd0, cd1) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xDD>(c, d));
                r[i] = _mm512_shuffle_f32x4::<0x88>(ab0, cd0);
                r[4 + i] = _mm512_shuffle_f32x4::<0x88>(ab1, cd1);
                r[8 + i] = _mm512_shuffle_f32x4::<0xDD>(ab0, cd0);
                r[12 + i] = _mm512_shuffle_f32x4::<0xDD>(ab1, cd1);
            }
        }
    }
}
