//! AdamW, step after step: each is compared from the state that the candidate itself has reached, so that errors of
//! one step are not forgiven to the next.
//!
//! The hyper-parameters are f64, and what is formed of them (1 − β, lr·weight_decay, the bias corrections) may be
//! rounded to f32 once. Roundings, then: of m's first term three (β1, product, sum), of its second five (1 − β1,
//! grad_scale, two products, sum); of v's terms up to seven (grad_scale and its product twice, the square, 1 − β2
//! and its product, the sum less one); √v̂ half of that, and the correction, a division, the root; + ε two; the
//! quotient and lr/(1 − β1^t) with its products four. The parameter's own term takes three: the factor, the
//! product, the difference.

use super::bound::{UNIT, gamma, second_order};
use super::draw::{Draw, length};
use super::harness::*;
use crate::Backend;
use crate::params::AdamW;
use proptest::prelude::*;
use proptest::sample::select;

pub(super) struct State {
    pub(super) param: Vec<f32>,
    pub(super) m: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// The new param, m and v.
pub(super) fn call<T: Real>(
    backend: &dyn Backend,
    p: &AdamW,
    seed: u64,
    grad: &[f32],
    state: &State,
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, seed);
    let (grad, mut param) = (desk.real::<T>(grad)?, desk.real::<T>(&state.param)?);
    let (mut m, mut v) = (desk.real::<T>(&state.m)?, desk.real::<T>(&state.v)?);
    backend.adamw(p, grad.view(), param.view_mut(), m.view_mut(), v.view_mut())?;
    Ok(vec![desk.take(&param)?, desk.take(&m)?, desk.take(&v)?])
}

/// Bounds of the new param, m and v of one element.
pub(super) fn bounds(p: &AdamW, grad: f32, param: f32, m: f32, v: f32) -> [f64; 3] {
    let [grad, param, m, v] = [grad, param, m, v].map(f64::from);
    let g = p.grad_scale * grad;
    let (old, new) = ((p.beta1 * m).abs(), ((1.0 - p.beta1) * g).abs());
    let m_error = gamma(3) * old + gamma(5) * new;
    let v_new = p.beta2 * v + (1.0 - p.beta2) * g * g;
    let v_error = gamma(7) * v_new;
    let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
    let divisor = (v_new / correction(p.beta2)).sqrt() + p.eps;
    let step = p.lr / correction(p.beta1) / divisor;
    let m_new = p.beta1 * m + (1.0 - p.beta1) * g;
    let quotient = (3.5 + 3.0 + 2.0 + 4.0) * UNIT;
    let update_error = step * m_error + (step * m_new).abs() * second_order(quotient, quotient);
    let decayed = param * (1.0 - p.lr * p.weight_decay);
    // The last difference rounds both of its terms.
    let param_error = gamma(3) * decayed.abs() + update_error + UNIT * (step * m_new).abs();
    [param_error, m_error, v_error]
}

/// The first of some steps, fresh (1) or of an old state, with and without decay and clipping.
pub(super) fn first_steps() -> impl Strategy<Value = AdamW> {
    let parameters = (
        select(vec![1e-3, 2e-4, 0.1]),
        select(vec![(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]),
        select(vec![1e-8, 1e-6]),
        select(vec![0.0, 0.01, 0.3]),
        select(vec![1, 2, 1000, 1_000_000]),
        select(vec![1.0, 0.25, 0.0123]),
    );
    parameters.prop_map(|(lr, (beta1, beta2), eps, weight_decay, step, grad_scale)| AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        grad_scale,
    })
}

/// Four steps.
pub fn steps(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(32, &(first_steps(), length(), any::<u64>()), |(first, len, seed)| {
        let mut draw = Draw::new(seed);
        let mut state = State { param: draw.scaled(len), m: vec![0.0; len], v: vec![0.0; len] };
        if first.step > 1 {
            state.m = draw.normal(len, 0.1);
            state.v = draw.normal(len, 0.1).iter().map(|v| v * v).collect();
        }
        for step in first.step..first.step + 4 {
            let p = AdamW { step, ..first };
            let grad = draw.scaled(len);
            let found = twice(|| call::<f32>(candidate, &p, seed, &grad, &state))?;
            let exact = call::<f64>(oracle, &p, seed, &grad, &state)?;
            let bound = |i: usize| bounds(&p, grad[i], state.param[i], state.m[i], state.v[i]);
            for (output, tensor) in ["param", "m", "v"].into_iter().enumerate() {
                agree(tensor, &found[output], &exact[output], |i| bound(i)[output])?;
            }
            let [param, m, v] = <[Vec<f32>; 3]>::try_from(found).expect("three outputs");
            state = State { param, m, v };
        }
        Ok(())
    })
}
