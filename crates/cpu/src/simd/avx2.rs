//! Eight lanes of AVX2 with FMA and F16C.

use super::Simd;
use std::arch::x86_64::*;

/// AVX2 + FMA + F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// A mask whose first `n` lanes are set.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    // SAFETY: the caller's machine has AVX2.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

/// The nearest bf16 in the upper halves.
#[inline(always)]
unsafe fn rounded(v: __m256) -> __m256i {
    // SAFETY: the caller's machine has AVX2.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v)))
    }
}

// SAFETY: in every method the caller's machine has AVX2, FMA and F16C, and pointers are valid as the trait says;
// masked loads and stores do not touch the lanes that are off.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
unsafe impl Simd for Avx2 {
    type V = __m256;
    type Table = (__m256, __m256);
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(p, first(n)) }
    }
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: __m256, n: usize) {
        unsafe { _mm256_maskstore_ps(p, first(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn round_bf16(v: __m256) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_and_si256(rounded(v), _mm256_set1_epi32(0xFFFF_0000u32 as i32))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut half::bf16, v: __m256) {
        unsafe {
            let upper = _mm256_srli_epi32::<16>(rounded(v));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            _mm_storeu_si128(p.cast(), packed);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut half::f16, v: __m256) {
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m256) -> __m256 {
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale_exp2(a: __m256, n: __m256) -> __m256 {
        unsafe {
            // Two powers of two, as one alone may be none that f32 has.
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(n, half)))
        }
    }
    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m256) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> Self::Table {
        unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) }
    }
    #[inline(always)]
    unsafe fn lookup_nibbles((low, high): Self::Table, p: *const u8) -> __m256 {
        unsafe {
            let word = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
            // Byte 0's high nibble, byte 0's low nibble, byte 1's high nibble, …, in the low bits of each lane.
            let nibbles = _mm256_srlv_epi32(word, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
            // The permutation reads 3 bits of a lane; the blend then reads the sign, to where bit 3 is shifted.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(nibbles));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, nibbles), _mm256_permutevar8x32_ps(high, nibbles), upper)
        }
    }
    #[inline(always)]
    unsafe fn encode_nibbles(thresholds: Self::Table, codes: Self::Table, v: __m256, p: *mut u8) {
        unsafe {
            // A binary search of four steps; `upper` holds the first one's outcome, `index` the other three bits.
            let pick = |table: Self::Table, index: __m256i, upper: __m256| {
                let (low, high) = (_mm256_permutevar8x32_ps(table.0, index), _mm256_permutevar8x32_ps(table.1, index));
                _mm256_blendv_ps(low, high, upper)
            };
            let middle = _mm256_permutevar8x32_ps(thresholds.0, _mm256_set1_epi32(7));
            let upper = _mm256_cmp_ps::<_CMP_GT_OQ>(v, middle);
            let mut index = _mm256_setzero_si256();
            for step in [4, 2, 1] {
                let probe = _mm256_add_epi32(index, _mm256_set1_epi32(step - 1));
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, pick(thresholds, probe, upper));
                let step = _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(step));
                index = _mm256_or_si256(index, step);
            }
            let codes = _mm256_castps_si256(pick(codes, index, upper));
            // In each 64-bit lane the low byte becomes first · 16 + second; two bytes of each half are kept.
            let bytes = _mm256_or_si256(_mm256_slli_epi64::<4>(codes), _mm256_srli_epi64::<32>(codes));
            let order = _mm256_setr_epi8(
                0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1,
                -1, -1, -1, -1, -1,
            );
            let bytes = _mm256_shuffle_epi8(bytes, order);
            let word = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            p.cast::<i32>().write_unaligned(_mm_cvtsi128_si32(word));
        }
    }
    #[inline(always)]
    unsafe fn encode_many(thresholds: Self::Table, codes: Self::Table, v: [__m256; 4], p: *mut u8) {
        unsafe {
            // A binary search in which no step looks anything up in 16 entries: the first has one threshold, the
            // second two, the third four, the last eight. What a step finds is kept negated, as comparisons give it:
            // after step s, index = −(thresholds passed, in units of 2^(4 − s)), and tables are ordered by its low bits.
            let (low, high) = thresholds;
            let seven = _mm256_permutevar8x32_ps(low, _mm256_set1_epi32(7));
            let (three, eleven) = {
                let at = _mm256_set1_epi32(3);
                (_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at))
            };
            // Thresholds 1, 13, 9, 5, twice.
            let at = _mm256_setr_epi32(1, 5, 1, 5, 1, 5, 1, 5);
            let (a, b) = (_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at));
            let fours = _mm256_blend_ps::<0b0110_0110>(a, b);
            // Thresholds 0, 14, 12, 10, 8, 6, 4, 2.
            let at = _mm256_setr_epi32(0, 6, 4, 2, 0, 6, 4, 2);
            let (a, b) = (_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at));
            let twos = _mm256_blend_ps::<0b0001_1110>(a, b);
            // The codes as bytes, in both halves.
            let words = _mm256_packs_epi32(_mm256_castps_si256(codes.0), _mm256_castps_si256(codes.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let codes = _mm256_permute4x64_epi64::<0b10_00_10_00>(_mm256_packs_epi16(words, words));

            let mut found = [_mm256_setzero_si256(); 4];
            for (index, v) in found.iter_mut().zip(v) {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, seven);
                let threshold = _mm256_blendv_ps(three, eleven, above);
                let above = _mm256_castps_si256(above);
                let next = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v, threshold));
                let two = _mm256_add_epi32(_mm256_add_epi32(above, above), next);
                let threshold = _mm256_permutevar_ps(fours, two);
                let next = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v, threshold));
                let three = _mm256_add_epi32(_mm256_add_epi32(two, two), next);
                let threshold = _mm256_permutevar8x32_ps(twos, three);
                let next = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v, threshold));
                *index = _mm256_add_epi32(_mm256_add_epi32(three, three), next);
            }
            let (first, second) = (_mm256_packs_epi32(found[0], found[1]), _mm256_packs_epi32(found[2], found[3]));
            // Bytes, four of each vector to a half.
            let index = _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_packs_epi16(first, second));
            let codes = _mm256_shuffle_epi8(codes, index);
            let codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            // Pairs: first · 16 + second · 1, in 16 bits.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            let bytes = _mm256_permute4x64_epi64::<0b10_00_10_00>(_mm256_packus_epi16(pairs, pairs));
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(bytes));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose(r: &mut [__m256]) {
        unsafe {
            let pairs = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (t0, t1) = pairs(r[0], r[1]);
            let (t2, t3) = pairs(r[2], r[3]);
            let (t4, t5) = pairs(r[4], r[5]);
            let (t6, t7) = pairs(r[6], r[7]);
            let u0 = _mm256_shuffle_ps::<0x44>(t0, t2);
            let u1 = _mm256_shuffle_ps::<0xEE>(t0, t2);
            let u2 = _mm256_shuffle_ps::<0x44>(t1, t3);
            let u3 = _mm256_shuffle_ps::<0xEE>(t1, t3);
            let u4 = _mm256_shuffle_ps::<0x44>(t4, t6);
            let u5 = _mm256_shuffle_ps::<0xEE>(t4, t6);
            let u6 = _mm256_shuffle_ps::<0x44>(t5, t7);
            let u7 = _mm256_shuffle_ps::<0xEE>(t5, t7);
            r[0] = _mm256_permute2f128_ps::<0x20>(u0, u4);
            r[1] = _mm256_permute2f128_ps::<0x20>(u1, u5);
            r[2] = _mm256_permute2f128_ps::<0x20>(u2, u6);
            r[3] = _mm256_permute2f128_ps::<0x20>(u3, u7);
            r[4] = _mm256_permute2f128_ps::<0x31>(u0, u4);
            r[5] = _mm256_permute2f128_ps::<0x31>(u1, u5);
            r[6] = _mm256_permute2f128_ps::<0x31>(u2, u6);
            r[7] = _mm256_permute2f128_ps::<0x31>(u3, u7);
        }
    }
}
