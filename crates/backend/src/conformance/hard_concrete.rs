//! The hard concrete gate.
//!
//! Forward: logit = ln u − ln(1 − u) is off by what each logarithm is, and by six roundings of u, 1 − u, their ratio
//! and the difference; the sum with logα rounds, 1/β and its product or a quotient twice. s = σ of that moves by
//! s(1 − s) of it, and has its own error. s̄ = s(ζ − γ) + γ rounds both constants, the product and the sum; the clamp
//! adds nothing. P is σ of logα less a constant that is rounded once, and one difference; Σ P is a sum in f64 of such.
//!
//! Backward: s(1 − s) is off by δs·(1 − s) + s·(δs + u(1 − s)), and (ζ − γ)/β with its products and dz takes six
//! roundings; P(1 − P) and the penalty likewise four; two sums follow. Where s̄ lies within its error of 0 or of 1
//! either side of the clamp may be taken, and the whole slope counts as an error.

use super::bound::{DENORMAL, EXP, UNIT, sigmoid};
use super::draw::{Draw, length};
use super::harness::*;
use crate::params::HardConcrete;
use crate::{Backend, philox};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: HardConcrete,
    len: usize,
    penalty: f64,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let parameters = (
        select(vec![2.0 / 3.0, 0.1, 1.0]),
        select(vec![(-0.1, 1.1), (-1.5, 1.5), (-1e-3, 2.0)]),
        any::<Option<(u64, u64)>>(),
    );
    let penalties = select(vec![0.0, 0.1, -3.0]);
    (parameters, length(), penalties, any::<u64>()).prop_map(
        |((temperature, (low, high), noise), len, penalty, seed)| Case {
            p: HardConcrete { temperature, low, high, noise },
            len,
            penalty,
            seed,
        },
    )
}

/// Gates of every kind: undecided, as good as decided, and beyond what the exponential holds.
fn log_alpha(draw: &mut Draw, len: usize) -> Vec<f32> {
    let one = |draw: &mut Draw| match draw.below(16) {
        0 => [0.0, -30.0, 30.0, 1e3, -1e3][draw.below(5)],
        _ => 2.0 * draw.gauss() as f32,
    };
    (0..len).map(|_| one(draw)).collect()
}

/// A value and how far it may be off.
#[derive(Clone, Copy)]
struct Off {
    value: f64,
    by: f64,
}

impl Off {
    /// σ of it. Within the error the slope σ(1 − σ) changes by a factor of e^error at most.
    fn sigmoid(self) -> Self {
        let (value, own) = sigmoid(self.value);
        Self { value, by: own + value * (1.0 - value) * self.by * self.by.exp() }
    }

    /// factor · x(1 − x), of which `roundings` are products of it.
    fn spread(self, factor: f64, roundings: f64) -> Self {
        let (x, rest) = (self.value, 1.0 - self.value);
        let value = x * rest;
        let by = self.by * rest + (x + self.by) * (self.by + UNIT * rest) + roundings * UNIT * value;
        Self { value: factor * value, by: factor.abs() * by }
    }
}

impl Case {
    /// s of gate i.
    fn s(&self, log_alpha: f32, i: usize) -> Off {
        let (p, log_alpha) = (self.p, f64::from(log_alpha));
        let Some((seed, stream)) = p.noise else { return Off { value: log_alpha, by: 0.0 }.sigmoid() };
        let u = (f64::from(philox::word(seed, stream, i as u64)) + 0.5) / 4_294_967_296.0;
        let (ln, ln_rest) = (u.ln(), (1.0 - u).ln());
        let logit = EXP * (ln.abs() + ln_rest.abs()) + 6.0 * UNIT;
        let sum = ln - ln_rest + log_alpha;
        let value = sum / p.temperature;
        Off { value, by: (logit + UNIT * sum.abs()) / p.temperature + 2.0 * UNIT * value.abs() }.sigmoid()
    }

    /// s̄
    fn stretched(&self, s: Off) -> Off {
        let (span, low) = (self.p.high - self.p.low, self.p.low);
        let value = s.value * span + low;
        Off { value, by: span * s.by + UNIT * (2.0 * span * s.value + low.abs() + value.abs()) }
    }

    /// P(z ≠ 0)
    fn open(&self, log_alpha: f32) -> Off {
        let shift = self.p.temperature * (-self.p.low / self.p.high).ln();
        let value = f64::from(log_alpha) - shift;
        Off { value, by: UNIT * (shift.abs() + value.abs()) }.sigmoid()
    }
}

/// z, and Σ P(z ≠ 0). What is NaN makes both so; an infinite logα decides its gate.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, log_alpha: &[f32]) -> TestCaseResult<(Vec<T>, f64)> {
        let desk = Desk::new(backend, case.seed);
        let (log_alpha, mut z) = (desk.real::<T>(log_alpha)?, desk.blank(T::DTYPE, log_alpha.len())?);
        let open = backend.hard_concrete(&case.p, log_alpha.view(), z.view_mut())?;
        Ok((desk.take(&z)?, open))
    }
    check(96, &cases(), |case| {
        let log_alpha = log_alpha(&mut Draw::new(case.seed), case.len);
        let (found, found_open) = twice(|| call::<f32>(candidate, &case, &log_alpha))?;
        let (exact, exact_open) = call::<f64>(oracle, &case, &log_alpha)?;
        agree("z", &found, &exact, |i| case.stretched(case.s(log_alpha[i], i)).by)?;
        let each: f64 = log_alpha.iter().map(|&log_alpha| case.open(log_alpha).by).sum();
        let bound = each + case.len as f64 * f64::EPSILON * exact_open;
        let off = (found_open - exact_open).abs();
        prop_assert!(off <= bound, "Σ P is {found_open}, the oracle's {exact_open}: bound {bound:e}");

        let decided = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let (z, open) = twice(|| call::<f32>(candidate, &case, &decided[..2]))?;
        prop_assert!(z == [1.0, 0.0] && open == 1.0, "infinite logα: {z:?} and Σ P {open}");
        let (z, open) = twice(|| call::<f32>(candidate, &case, &decided))?;
        prop_assert!(z[2].is_nan() && open.is_nan(), "logα NaN: {z:?} and Σ P {open}");
        Ok(())
    })
}

/// What is added to dlogα.
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, inputs: [&[f32]; 3]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let [log_alpha, dz, before] = inputs;
        let (log_alpha, dz, mut out) = (desk.real::<T>(log_alpha)?, desk.real::<T>(dz)?, desk.real::<T>(before)?);
        backend.hard_concrete_grad(&case.p, log_alpha.view(), dz.view(), case.penalty, out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(96, &cases(), |case| {
        let (p, mut draw) = (case.p, Draw::new(case.seed));
        let log_alpha = log_alpha(&mut draw, case.len);
        let (dz, before) = (draw.scaled(case.len), draw.scaled(case.len));
        let found = twice(|| call::<f32>(candidate, &case, [&log_alpha, &dz, &before]))?;
        let exact = call::<f64>(oracle, &case, [&log_alpha, &dz, &before])?;
        let inner = if p.noise.is_some() { 1.0 / p.temperature } else { 1.0 };
        agree("dlog_alpha", &found[0], &exact[0], |i| {
            let s = case.s(log_alpha[i], i);
            let (stretched, dz) = (case.stretched(s), f64::from(dz[i]));
            let moves = s.spread(dz * (p.high - p.low) * inner, 6.0);
            let at_an_end = [0.0, 1.0].iter().any(|end| (stretched.value - end).abs() <= stretched.by);
            let clamped = !(0.0..=1.0).contains(&stretched.value);
            let moved = match (at_an_end, clamped) {
                (true, _) => moves.value.abs() + moves.by,
                (false, true) => 0.0,
                (false, false) => moves.by,
            };
            let penalty = case.open(log_alpha[i]).spread(case.penalty, 4.0);
            let sums = 2.0 * UNIT * (f64::from(before[i].abs()) + moves.value.abs() + penalty.value.abs());
            moved + penalty.by + sums + 4.0 * DENORMAL * (1.0 + dz.abs())
        })
    })
}
