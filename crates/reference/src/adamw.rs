//! Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
//!
//! With g = grad_scale·grad at step t ≥ 1:
//!   param ← param·(1 − lr·weight_decay)
//!   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
//!   param ← param − lr · m̂ / (√v̂ + ε),   m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t)
//!
//! grad, param, m, v: any one length.

use crate::operands::Kernel;
use rankfold_backend::params::AdamW;
use rankfold_backend::{Result, View, ViewMut};

/// One step, in place.
pub(crate) fn adamw(p: &AdamW, grad: View, mut param: ViewMut, mut m: ViewMut, mut v: ViewMut) -> Result<()> {
    p.check(&grad, &param, &m, &v)?;
    let kernel = Kernel("adamw");
    let grad = kernel.floats("grad", grad)?;
    let mut param = kernel.floats_mut("param", &mut param)?;
    let mut m = kernel.floats_mut("m", &mut m)?;
    let mut v = kernel.floats_mut("v", &mut v)?;
    let (mut params, mut means, mut squares) = (param.load(), m.load(), v.load());
    step(p, &grad, [&mut params, &mut means, &mut squares]);
    param.store(params);
    m.store(means);
    v.store(squares);
    Ok(())
}

/// The same on numbers: param, m and v.
pub(crate) fn step(p: &AdamW, grad: &[f64], [params, means, squares]: [&mut [f64]; 3]) {
    let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
    let (correction1, correction2) = (correction(p.beta1), correction(p.beta2));
    for i in 0..grad.len() {
        let g = p.grad_scale * grad[i];
        means[i] = p.beta1 * means[i] + (1.0 - p.beta1) * g;
        squares[i] = p.beta2 * squares[i] + (1.0 - p.beta2) * g * g;
        let (mean, square) = (means[i] / correction1, squares[i] / correction2);
        params[i] = params[i] * (1.0 - p.lr * p.weight_decay) - p.lr * mean / (square.sqrt() + p.eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, buffer, values};

    const P: AdamW = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };

    /// One step from (param, m, v).
    fn step(p: &AdamW, grad: f64, state: [f64; 3]) -> [f64; 3] {
        let [mut param, mut m, mut v] = state.map(|x| buffer(&[x]));
        BACKEND.adamw(p, buffer(&[grad]).view(), param.view_mut(), m.view_mut(), v.view_mut()).unwrap();
        [param, m, v].map(|x| values(&x)[0])
    }

    /// From m = v = 0 the bias correction makes m̂ = g and √v̂ = |g|: the step is lr·sign(g), whatever g's size.
    #[test]
    fn the_first_step_is_the_learning_rate() {
        for grad in [3.0, -0.01] {
            let [param, m, v] = step(&P, grad, [1.0, 0.0, 0.0]);
            assert_close("moments", &[m, v], &[0.1 * grad, 0.01 * grad * grad]);
            // ε shortens the step by lr·ε/(|g| + ε).
            let expected = 1.0 - 0.1 * grad / (grad.abs() + 1e-8);
            assert_close("param", &[param], &[expected]);
        }
    }

    #[test]
    fn weight_decay_is_apart_from_the_gradient() {
        let p = AdamW { weight_decay: 0.5, ..P };
        assert_close("param", &step(&p, 0.0, [2.0, 0.0, 0.0]), &[2.0 * (1.0 - 0.1 * 0.5), 0.0, 0.0]);
    }

    #[test]
    fn the_clips_factor_is_a_factor_of_the_gradient() {
        let clipped = step(&AdamW { grad_scale: 0.25, step: 7, ..P }, 2.0, [1.0, 0.3, 0.2]);
        assert_eq!(clipped, step(&AdamW { step: 7, ..P }, 0.5, [1.0, 0.3, 0.2]));
    }

    #[test]
    fn a_late_step_has_no_correction_left() {
        let [param, m, v] = step(&AdamW { step: 1_000_000, ..P }, 1.0, [0.0, 0.0, 0.0]);
        assert_close("param", &[param], &[-0.1 * m / (v.sqrt() + 1e-8)]);
    }

    #[test]
    fn steps_count_from_1() {
        let [mut param, mut m, mut v] = [0.0; 3].map(|x| buffer(&[x]));
        let p = AdamW { step: 0, ..P };
        assert!(BACKEND.adamw(&p, buffer(&[1.0]).view(), param.view_mut(), m.view_mut(), v.view_mut()).is_err());
    }
}
