//! exp and the logistic function, on vectors.

use super::Simd;

/// eˣ, within 2 ulp for x in [−87.3, 88.7]; below, denormal results and then 0; above, +∞. A NaN stays one.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, ln 2 in two parts (Cody & Waite 1980) so that r is exact to the last bit
/// that matters; then eʳ by its Taylor polynomial of degree 7, whose remainder r⁸/8! is below 2⁻²⁷ there.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's machine has S.
    unsafe {
        // The argument second: a NaN passes through.
        let x = S::min(S::splat(100.0), S::max(S::splat(-104.0), x));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        // 2ⁿ in two steps: n reaches 144 above and −150 below.
        let half = S::round(S::mul(n, S::splat(0.5)));
        S::scale_exp2(S::scale_exp2(p, half), S::sub(n, half))
    }
}

/// 1 / (1 + e⁻ˣ), within 4 ulp.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's machine has S.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), x));
        S::div(S::splat(1.0), S::add(S::splat(1.0), e))
    }
}
