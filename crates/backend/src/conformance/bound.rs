//! How far a result in f32 may lie from the exact one: rounding-error analysis (Higham 2002, "Accuracy and Stability
//! of Numerical Algorithms", chapters 2 and 3).
//!
//! **Rounding.** fl(x ∘ y) = (x ∘ y)(1 + δ) + ε with |δ| ≤ u = 2⁻²⁴, and |ε| ≤ 2⁻¹⁵⁰ only where the result is
//! denormal.
//!
//! **Sums of products.** A term that passes n roundings on its way into the result comes out times ∏(1 + δᵢ), which
//! is within γ_n = n·u/(1 − n·u) of 1 (lemma 3.1). So whatever the order of summation, and however many factors a
//! term has, |computed − exact| ≤ γ_n·Σ|terms| with n the longest way of any term. A sum of k products takes k
//! roundings at most: one of the product and k − 1 of the sum. Σ|terms| of a multilinear kernel is the kernel itself
//! on absolute values, so the laws have the oracle compute it.
//!
//! **bf16 units** multiply exactly and sum in f32, but tensor cores do not round each sum: they align a step's products
//! and what was summed before to the largest of them and cut what lies below its last bit (Fasi, Higham, Mikaitis &
//! Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"). A cut loses up to 2u of that largest term where a rounding
//! loses u of the sum, and no term is cut more often than it would be rounded: [`gamma_of`] takes 2u for u.
//!
//! **Composed kernels.** First-order errors are carried through the formula by its derivatives, each weighted with
//! the condition of its step, and [`second_order`] makes up for what that leaves out. Each law writes down its own.
//!
//! **Functions.** exp is specified to 2 ulp, which is a relative error of at most 4u, as is log; division and square
//! root round correctly; a result of exp below 2⁻¹²⁶ may be flushed to zero. tanh is specified to 4 ulp, near 0 too.
//!
//! The oracle's own error, at 2⁻⁵³ an operation, is 2⁻²⁹ of every bound: γ_n already exceeds the n·u that is reached.

use crate::Compute;
use half::bf16;

/// u: half the distance from 1 to the next f32.
pub const UNIT: f64 = 1.0 / 16_777_216.0;

/// The error of one rounding to a denormal: half of the smallest f32, 2⁻¹⁵⁰.
pub const DENORMAL: f64 = f32::MIN_POSITIVE as f64 * UNIT;

/// What flushing a denormal result of exp to zero loses at most: 2⁻¹²⁶.
pub const FLUSHED: f64 = f32::MIN_POSITIVE as f64;

/// The relative error of exp and of log: 2 ulp, an ulp being at most 2u of the value.
pub const EXP: f64 = 4.0 * UNIT;

/// The relative error of tanh: 4 ulp.
pub const TANH: f64 = 8.0 * UNIT;

/// Where rounding to f32 overflows: half a step above the largest f32.
pub const OVERFLOW: f64 = f32::MAX as f64 * (1.0 + UNIT / 2.0);

/// γ_n, the relative error of a term that n roundings were applied to.
pub fn gamma(n: usize) -> f64 {
    let nu = n as f64 * UNIT;
    nu / (1.0 - nu)
}

/// The same for a term of a product that is computed so.
pub fn gamma_of(compute: Compute, n: usize) -> f64 {
    match compute {
        Compute::F32 => gamma(n),
        Compute::Bf16 => gamma(2 * n),
    }
}

/// A bound for all orders from one of first order: what relative errors ε leave out is at most ε² + ε³ + …, hence
/// the factor 1/(1 − ε). `relative` is the largest first-order relative error that went into `bound`.
pub fn second_order(bound: f64, relative: f64) -> f64 {
    bound / (1.0 - relative.min(0.5))
}

/// How far bf16(x̂) may lie from bf16(x) where x̂ is within `error` of x.
///
/// Rounding is monotone, so both lie between the roundings of the two ends; where these are one number, as they
/// mostly are, the rounding absorbs the error altogether. The ends are moved out by 2⁻³⁰ of x because `half` cuts an
/// f64 to 32 bits before it rounds.
pub fn rounded_spread(x: f64, error: f64) -> f64 {
    let error = error + x.abs() * UNIT / 64.0;
    to_bf16(x + error) - to_bf16(x - error)
}

/// x to bf16.
pub fn to_bf16(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

/// σ(x) and the absolute error of computing it in f32 as 1/(1 + e) with e = exp(−x).
///
/// ∂σ/∂e · δe = −σ²·e·EXP = σ(1 − σ)·EXP in magnitude; rounding 1 + e loses at most min(u, e) of it (all of e where
/// the sum rounds to 1), and the division rounds only where the sum is not 1, hence no more than min(u, e) either.
/// Below 2⁻¹²⁶ the result may be flushed.
pub fn sigmoid(x: f64) -> (f64, f64) {
    let e = (-x).exp();
    let value = 1.0 / (1.0 + e);
    let flushed = if value < 2.0 * FLUSHED { FLUSHED } else { 0.0 };
    (value, value * (EXP * (1.0 - value) + 2.0 * UNIT.min(e)) + flushed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_zero_inside_a_step_and_one_step_across_a_tie() {
        assert_eq!(rounded_spread(1.001, 1e-6), 0.0);
        assert_eq!(rounded_spread(1.0 + 1.0 / 256.0, 1e-6), 1.0 / 128.0);
    }

    #[test]
    fn sigmoid_in_f32_stays_within_its_bound() {
        for i in -4000..4000 {
            let x = i as f32 * 0.025;
            let computed = 1.0 / (1.0 + (-x).exp());
            let (exact, error) = sigmoid(f64::from(x));
            assert!((f64::from(computed) - exact).abs() <= error, "x = {x}");
        }
    }
}
