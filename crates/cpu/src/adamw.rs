//! Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
//!
//! With g = grad_scale·grad at step t ≥ 1:
//!   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
//!   param ← param·(1 − lr·weight_decay) − lr · m̂ / (√v̂ + ε),   m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t)
//!
//! What depends on the step alone is formed in f64 and rounded once.

use crate::elementwise::CHUNK;
use crate::simd::{Float, Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::AdamW;

/// The step's constants.
#[derive(Clone, Copy)]
pub(crate) struct Constants {
    grad_scale: f32,
    beta1: f32,
    one_less_beta1: f32,
    beta2: f32,
    one_less_beta2: f32,
    /// 1 − lr·weight_decay
    decay: f32,
    /// lr / (1 − β1^t)
    rate: f32,
    /// 1 / (1 − β2^t)
    correction2: f32,
    eps: f32,
}

impl Constants {
    pub(crate) fn new(p: &AdamW) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
        Self {
            grad_scale: p.grad_scale as f32,
            beta1: p.beta1 as f32,
            one_less_beta1: (1.0 - p.beta1) as f32,
            beta2: p.beta2 as f32,
            one_less_beta2: (1.0 - p.beta2) as f32,
            decay: (1.0 - p.lr * p.weight_decay) as f32,
            rate: (p.lr / correction(p.beta1)) as f32,
            correction2: (1.0 / correction(p.beta2)) as f32,
            eps: p.eps as f32,
        }
    }
}

/// One step, in place.
pub(crate) fn adamw(threads: &Threads, isa: Isa, p: &AdamW, grad: &[f32], [param, m, v]: [&mut [f32]; 3]) {
    let constants = Constants::new(p);
    let state = [param, m, v].map(Disjoint::new);
    threads.run_chunks(grad.len(), CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        let state = state.each_ref().map(|all| unsafe { all.get(range.clone()) });
        isa.run(Step { constants, grad: &grad[range], state });
    });
}

/// A step of one task's elements.
pub(crate) struct Step<'a> {
    pub(crate) constants: Constants,
    pub(crate) grad: &'a [f32],
    /// param, m, v
    pub(crate) state: [&'a mut [f32]; 3],
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (c, len, [params, ms, vs]) = (self.constants, self.grad.len(), self.state);
        assert!([params.len(), ms.len(), vs.len()] == [len; 3]);
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: elements i … i + n − 1 of all four.
            unsafe {
                let (param, m, v) = (params.as_mut_ptr().add(i), ms.as_mut_ptr().add(i), vs.as_mut_ptr().add(i));
                let g = S::mul(f32::load_part::<S>(self.grad.as_ptr().add(i), n), S::splat(c.grad_scale));
                let (m1, v1) = (f32::load_part::<S>(m, n), f32::load_part::<S>(v, n));
                let m1 = S::add(S::mul(m1, S::splat(c.beta1)), S::mul(g, S::splat(c.one_less_beta1)));
                let v1 = S::add(S::mul(v1, S::splat(c.beta2)), S::mul(S::mul(g, S::splat(c.one_less_beta2)), g));
                let root = S::sqrt(S::mul(v1, S::splat(c.correction2)));
                let step = S::div(S::mul(m1, S::splat(c.rate)), S::add(root, S::splat(c.eps)));
                let decayed = S::mul(f32::load_part::<S>(param, n), S::splat(c.decay));
                f32::store_part::<S>(param, S::sub(decayed, step), n);
                f32::store_part::<S>(m, m1, n);
                f32::store_part::<S>(v, v1, n);
            }
        }
    }
}
