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

    let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
    let (correction1, correction2) = (correction(p.beta1), correction(p.beta2));
    let (mut params, mut means, mut squares) = (param.load(), m.load(), v.load());
    for i in 0..grad.len() {
        let g = p.grad_scale * grad[i];
        means[i] = p.beta1 * means[i] + (1.0 - p.beta1) * g;
        squares[i] = p.beta2 * squares[i] + (1.0 - p.beta2) * g * g;
        let (mean, square) = (means[i] / correction1, squares[i] / correction2);
        params[i] = params[i] * (1.0 - p.lr * p.weight_decay) - p.lr * mean / (square.sqrt() + p.eps);
    }
    param.store(params);
    m.store(means);
    v.store(squares);
    Ok(())
}
