//! The hard concrete gate (Louizos et al. 2018, eq. 10–12): the mask of diff pruning (Guo et al. 2021, §3.1), 0 or 1
//! with probabilities of their own and differentiable in between.
//!
//! s = σ((ln u − ln(1 − u) + logα)/β), or σ(logα) without noise     (eq. 10)
//! z = clamp(s̄, 0, 1),  s̄ = s·(ζ − γ) + γ                           (eq. 11)
//! P(z ≠ 0) = σ(logα − β·ln(−γ/ζ))                                   (eq. 12)
//!
//! log_alpha, z: any one length. u of element i is (w + ½)/2³², w the Philox word at position i of the stream: never 0
//! or 1, and 1 − u is the u of w with its bits flipped. Saved for backward: log_alpha; the noise is drawn again.

use crate::operands::Kernel;
use crate::silu_mul::sigmoid;
use rankfold_backend::params::HardConcrete;
use rankfold_backend::{Result, View, ViewMut, philox};

/// z, and Σ P(z ≠ 0).
pub(crate) fn hard_concrete(p: &HardConcrete, log_alpha: View, mut z: ViewMut) -> Result<f64> {
    p.check(&log_alpha, &z)?;
    let kernel = Kernel("hard_concrete");
    let log_alpha = kernel.floats("log_alpha", log_alpha)?;
    let gates = log_alpha.iter().enumerate().map(|(i, &log_alpha)| stretched(p, log_alpha, i).clamp(0.0, 1.0));
    kernel.floats_mut("z", &mut z)?.store(gates);
    Ok(log_alpha.iter().map(|&log_alpha| open(p, log_alpha)).sum())
}

/// dlogα += dz · ∂z/∂logα + penalty · ∂P/∂logα
///
/// Where 0 < s̄ < 1: ∂z/∂logα = (ζ − γ)·s(1 − s)/β, from σ' = σ(1 − σ) and the 1/β within σ; without noise there is no
/// β. Where z was clamped it does not move. ∂P/∂logα = P(1 − P).
pub(crate) fn hard_concrete_grad(
    p: &HardConcrete,
    log_alpha: View,
    dz: View,
    penalty: f64,
    mut dlog_alpha: ViewMut,
) -> Result<()> {
    p.check_grad(&log_alpha, &dz, &dlog_alpha)?;
    let kernel = Kernel("hard_concrete_grad");
    let (log_alpha, dz) = (kernel.floats("log_alpha", log_alpha)?, kernel.floats("dz", dz)?);
    let inner = if p.noise.is_some() { 1.0 / p.temperature } else { 1.0 };
    let gradient = |i: usize| {
        let (stretched, open) = (stretched(p, log_alpha[i], i), open(p, log_alpha[i]));
        let s = sigmoid(argument(p, log_alpha[i], i));
        let slope = if stretched <= 0.0 || stretched >= 1.0 { 0.0 } else { (p.high - p.low) * s * (1.0 - s) * inner };
        dz[i] * slope + penalty * open * (1.0 - open)
    };
    kernel.floats_mut("dlog_alpha", &mut dlog_alpha)?.add((0..dz.len()).map(gradient));
    Ok(())
}

/// What s is σ of.
fn argument(p: &HardConcrete, log_alpha: f64, i: usize) -> f64 {
    let Some((seed, stream)) = p.noise else { return log_alpha };
    let word = philox::word(seed, stream, i as u64);
    let u = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    (u(word).ln() - u(!word).ln() + log_alpha) / p.temperature
}

/// s̄
fn stretched(p: &HardConcrete, log_alpha: f64, i: usize) -> f64 {
    sigmoid(argument(p, log_alpha, i)) * (p.high - p.low) + p.low
}

/// P(z ≠ 0)
fn open(p: &HardConcrete, log_alpha: f64) -> f64 {
    sigmoid(log_alpha - p.temperature * (-p.low / p.high).ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};

    /// The paper's constants.
    const P: HardConcrete = HardConcrete { temperature: 2.0 / 3.0, low: -0.1, high: 1.1, noise: Some((7, 3)) };

    fn forward(p: &HardConcrete, log_alpha: &[f64]) -> (Vec<f64>, f64) {
        let mut z = output(log_alpha.len());
        let open = BACKEND.hard_concrete(p, buffer(log_alpha).view(), z.view_mut()).unwrap();
        (values(&z), open)
    }

    fn backward(p: &HardConcrete, log_alpha: &[f64], dz: &[f64], penalty: f64, before: f64) -> Vec<f64> {
        let mut gradient = buffer(&vec![before; dz.len()]);
        let (log_alpha, dz) = (buffer(log_alpha), buffer(dz));
        BACKEND.hard_concrete_grad(p, log_alpha.view(), dz.view(), penalty, gradient.view_mut()).unwrap();
        values(&gradient)
    }

    /// The share of gates that are not 0 is binomial: within 6 standard deviations, √(P(1 − P)/n), of P (two in 10⁹).
    #[test]
    fn gates_are_open_as_often_as_the_formula_says() {
        for log_alpha in [-2.0, 0.0, 1.5] {
            let n = 100_000;
            let (z, sum) = forward(&P, &vec![log_alpha; n]);
            let (found, open) = (z.iter().filter(|&&z| z != 0.0).count() as f64 / n as f64, open(&P, log_alpha));
            let deviation = (open * (1.0 - open) / n as f64).sqrt();
            assert!((found - open).abs() < 6.0 * deviation, "{found} of gates open, expected {open}");
            // n terms of one sign, n roundings of 2⁻⁵³.
            assert!((sum / n as f64 - open).abs() < n as f64 * f64::EPSILON, "{sum} for {n} of {open}");
            assert!(z.iter().all(|z| (0.0..=1.0).contains(z)));
            assert!(z.contains(&1.0) || log_alpha < -1.0);
        }
    }

    /// Without noise the gate at logα = 0 is half open, and closed or open altogether where s is beyond
    /// −γ/(ζ − γ) = 1/12 of either end: at |logα| > ln 11.
    #[test]
    fn without_noise_a_gate_is_a_clamped_sigmoid() {
        let p = HardConcrete { noise: None, ..P };
        let (z, _) = forward(&p, &[0.0, 11f64.ln() + 1e-6, -11f64.ln() - 1e-6, 3f64.ln()]);
        assert_eq!((z[1], z[2]), (1.0, 0.0));
        assert_close("z", &[z[0], z[3]], &[0.5, 0.75 * 1.2 - 0.1]);
    }

    /// numbers() and this noise leave every s̄ farther than 10⁻⁵ from the ends of the clamp, where z has no derivative.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for p in [P, HardConcrete { noise: None, ..P }, HardConcrete { temperature: 0.5, noise: Some((1, 1)), ..P }] {
            let log_alpha: Vec<f64> = numbers(1, 24).into_iter().map(|x| 4.0 * x).collect();
            let dz = numbers(2, 24);
            let gradient = backward(&p, &log_alpha, &dz, 0.3, 0.0);
            assert_gradient("logα", &log_alpha, &gradient, |log_alpha| {
                let (z, open) = forward(&p, log_alpha);
                dot(&z, &dz) + 0.3 * open
            });
            let more: Vec<f64> = gradient.into_iter().map(|g| 0.5 + g).collect();
            assert_eq!(backward(&p, &log_alpha, &dz, 0.3, 0.5), more);
        }
    }

    #[test]
    fn a_clamped_gate_has_the_penaltys_gradient_alone() {
        let p = HardConcrete { noise: None, ..P };
        let found = backward(&p, &[9.0, -9.0], &[1.0; 2], 2.0, 0.0);
        let expected = [9.0, -9.0].map(|log_alpha| 2.0 * open(&p, log_alpha) * (1.0 - open(&p, log_alpha)));
        assert_eq!(found, expected);
    }

    #[test]
    fn ranges_are_checked() {
        for p in [
            HardConcrete { temperature: 0.0, ..P },
            HardConcrete { low: 0.0, ..P },
            HardConcrete { high: 1.0, ..P },
            HardConcrete { temperature: f64::NAN, ..P },
        ] {
            assert!(BACKEND.hard_concrete(&p, output(1).view(), output(1).view_mut()).is_err(), "{p:?}");
        }
    }
}
