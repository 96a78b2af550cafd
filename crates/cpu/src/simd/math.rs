//! exp, the logistic function and tanh, on vectors.

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
        // n reaches 144 above and −150 below.
        S::scale_exp2(p, n)
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

/// tanh x, within 4 ulp; ±1 far out. A NaN stays one.
///
/// tanh x = t/(t + 2) with t = e²ˣ − 1, formed as 2ⁿ(eʳ − 1) + (2ⁿ − 1) with n and r of [`exp`], and eʳ − 1 by its
/// Taylor polynomial: near 0 n is 0 and t is r to first order, so that nothing cancels.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's machine has S.
    unsafe {
        // Beyond ±20 t + 2 is t, or t is −1. The argument second: a NaN passes through.
        let twice = S::min(S::splat(40.0), S::max(S::splat(-40.0), S::add(x, x)));
        let n = S::round(S::mul(twice, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), twice);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        let power = S::scale_exp2(S::splat(1.0), n);
        let t = S::fma(power, S::mul(p, r), S::sub(power, S::splat(1.0)));
        S::div(t, S::add(t, S::splat(2.0)))
    }
}
