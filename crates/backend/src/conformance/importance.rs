//! AdaLoRA's importance, step after step, each compared from the state that the candidate itself has reached.
//!
//! The decays and the factor are f64, and they and 1 − β may be rounded to f32 once. I = |w · (grad_scale·grad)| takes
//! three roundings. Of mean's first term three (β1, product, sum), of its second I's and three more (1 − β1, product,
//! sum). |I − mean| is off by what both are, and by one rounding; in deviation it takes three more, and so does
//! β2 deviation. A score's terms carry the errors of mean and of deviation, each times the other; the product, the sum
//! over the triplet, its mean and the count take elements + 2 roundings.

use super::bound::{UNIT, gamma};
use super::draw::{Draw, abs, size};
use super::harness::*;
use crate::Backend;
use crate::params::{Importance, Triplets};
use proptest::prelude::*;
use proptest::sample::select;

struct State {
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

/// The new mean and deviation, and the scores.
fn call<T: Real>(
    backend: &dyn Backend,
    p: &Importance,
    seed: u64,
    [weight, grad]: [&[f32]; 2],
    state: &State,
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, seed);
    let (weight, grad) = (desk.real::<T>(weight)?, desk.real::<T>(grad)?);
    let (mut mean, mut deviation) = (desk.real::<T>(&state.mean)?, desk.real::<T>(&state.deviation)?);
    let mut scores = desk.blank(T::DTYPE, p.split().0)?;
    let (m, d, s) = (mean.view_mut(), deviation.view_mut(), scores.view_mut());
    backend.importance(p, weight.view(), grad.view(), m, d, s)?;
    Ok(vec![desk.take(&mean)?, desk.take(&deviation)?, desk.take(&scores)?])
}

/// The new mean and deviation of one element, and their bounds.
fn element(p: &Importance, weight: f32, grad: f32, mean: f32, deviation: f32) -> ([f64; 2], [f64; 2]) {
    let [weight, grad, mean, deviation] = [weight, grad, mean, deviation].map(f64::from);
    let sensitivity = (weight * p.grad_scale * grad).abs();
    let [old, new] = [p.beta1 * mean, (1.0 - p.beta1) * sensitivity];
    let mean_error = gamma(3) * old + gamma(6) * new;
    let apart = (sensitivity - (old + new)).abs();
    let apart_error = gamma(3) * sensitivity + mean_error + UNIT * apart;
    let apart_error = apart_error * (1.0 + gamma(1));
    let [old_deviation, new_deviation] = [p.beta2 * deviation, (1.0 - p.beta2) * apart];
    let rest = gamma(3) * (old_deviation + new_deviation);
    let deviation_error = rest + (1.0 - p.beta2) * apart_error * (1.0 + gamma(3));
    ([old + new, old_deviation + new_deviation], [mean_error, deviation_error])
}

/// Three steps, the first of them of nothing or of an old state.
pub fn steps(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    let cases = (
        (size(65), size(1025), any::<bool>()),
        select(vec![Triplets::Rows, Triplets::Columns]),
        select(vec![(0.85, 0.85), (0.0, 0.5), (0.99, 0.0)]),
        select(vec![1.0, 0.25, 0.0123]),
        any::<bool>(),
        any::<u64>(),
    );
    check(64, &cases, |((short, long, tall), triplets, (beta1, beta2), grad_scale, fresh, seed)| {
        let (rows, width) = if tall { (long, short) } else { (short, long) };
        let (p, mut draw) = (Importance { rows, width, triplets, beta1, beta2, grad_scale }, Draw::new(seed));
        let n = rows * width;
        let mut state = State { mean: vec![0.0; n], deviation: vec![0.0; n] };
        if !fresh {
            state = State { mean: abs(&draw.scaled(n)), deviation: abs(&draw.scaled(n)) };
        }
        for _ in 0..3 {
            let (weight, grad) = (draw.scaled(n), draw.scaled(n));
            let found = twice(|| call::<f32>(candidate, &p, seed, [&weight, &grad], &state))?;
            let exact = call::<f64>(oracle, &p, seed, [&weight, &grad], &state)?;
            let (triplets, elements) = p.split();
            let (mut errors, mut score_errors) = (Vec::with_capacity(n), vec![0.0; triplets]);
            for i in 0..n {
                let ([mean, deviation], [mean_error, deviation_error]) =
                    element(&p, weight[i], grad[i], state.mean[i], state.deviation[i]);
                let carried = mean_error * (deviation + deviation_error) + mean * deviation_error;
                let triplet = if p.triplets == Triplets::Rows { i / width } else { i % width };
                let summed = gamma(elements + 2) * (mean * deviation + carried);
                score_errors[triplet] += (carried + summed) / elements as f64;
                errors.push([mean_error, deviation_error]);
            }
            agree("mean", &found[0], &exact[0], |i| errors[i][0])?;
            agree("deviation", &found[1], &exact[1], |i| errors[i][1])?;
            agree("scores", &found[2], &exact[2], |i| score_errors[i])?;
            let [mean, deviation, _] = <[Vec<f32>; 3]>::try_from(found).expect("three outputs");
            state = State { mean, deviation };
        }
        Ok(())
    })
}
