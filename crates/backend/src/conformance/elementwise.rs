//! Kernels that work element by element, and the sum of squares.

use super::bound::{DENORMAL, OVERFLOW, UNIT, gamma, second_order, sigmoid};
use super::draw::{Draw, Values, length, values};
use super::harness::*;
use crate::params::Dropout;
use crate::{Backend, philox};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    len: usize,
    values: Values,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (length(), values(), any::<u64>()).prop_map(|(len, values, seed)| Case { len, values, seed })
}

impl Case {
    fn draw<const N: usize>(&self) -> [Vec<f32>; N] {
        let mut draw = Draw::new(self.seed);
        std::array::from_fn(|_| draw.values(self.values, self.len))
    }
}

/// x ← f·x: f may be rounded to f32, then the product is; two roundings.
pub fn scale_in_place(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, factor: f64, x: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let mut x = desk.real::<T>(x)?;
        backend.scale_in_place(factor, x.view_mut())?;
        Ok(vec![desk.take(&x)?])
    }
    let factors = select(vec![0.0, 1.0, -1.0, 0.5, 1.0 / 3.0, 0.1, -1.7e6, 1e-12]);
    check(128, &(case(), factors), |(case, factor)| {
        let [x] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, factor, &x))?;
        let exact = call::<f64>(oracle, &case, factor, &x)?;
        agree("x", &found[0], &exact[0], |i| gamma(2) * exact[0][i].abs() + DENORMAL)
    })
}

/// One rounding; a sum that is denormal is exact.
pub fn add(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, a: &[f32], b: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (a, b, mut out) = (desk.real::<T>(a)?, desk.real::<T>(b)?, desk.blank(T::DTYPE, case.len)?);
        backend.add(a.view(), b.view(), out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(128, &case(), |case| {
        let [a, b] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &a, &b))?;
        let exact = call::<f64>(oracle, &case, &a, &b)?;
        agree("out", &found[0], &exact[0], |i| UNIT * exact[0][i].abs())
    })
}

/// One rounding of the quotient; 0 where the divisor is, whatever is divided.
pub fn divide(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, a: &[f32], b: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (a, b, mut out) = (desk.real::<T>(a)?, desk.real::<T>(b)?, desk.blank(T::DTYPE, case.len)?);
        backend.divide(a.view(), b.view(), out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(128, &case(), |case| {
        let [a, mut b] = case.draw();
        b.iter_mut().step_by(5).for_each(|b| *b = 0.0);
        let found = twice(|| call::<f32>(candidate, &case, &a, &b))?;
        let exact = call::<f64>(oracle, &case, &a, &b)?;
        agree("out", &found[0], &exact[0], |i| UNIT * exact[0][i].abs() + DENORMAL)
    })
}

/// As [`add`].
pub fn add_in_place(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32], out: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, mut out) = (desk.real::<T>(x)?, desk.real::<T>(out)?);
        backend.add_in_place(x.view(), out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(128, &case(), |case| {
        let [x, out] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &x, &out))?;
        let exact = call::<f64>(oracle, &case, &x, &out)?;
        agree("out", &found[0], &exact[0], |i| UNIT * exact[0][i].abs())
    })
}

/// The square of an f32 is exact in f64, where the sum is formed: n roundings of 2⁻⁵³, of the candidate's and of the
/// oracle's.
pub fn sum_squares(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32]) -> TestCaseResult<Outputs<f64>> {
        let desk = Desk::new(backend, case.seed);
        Ok(vec![vec![backend.sum_squares(desk.real::<T>(x)?.view())?]])
    }
    check(128, &case(), |case| {
        let [x] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &x))?[0][0];
        let exact = call::<f64>(oracle, &case, &x)?[0][0];
        let bound = 2.0 * case.len as f64 * (f64::EPSILON / 2.0) * exact;
        let agrees = (found - exact).abs() <= bound || found == exact || found.is_nan() && exact.is_nan();
        prop_assert!(agrees, "Σ x² is {found:e}, the oracle's {exact:e}: bound {bound:e}");
        Ok(())
    })
}

/// One product, with a factor that is an f32: one rounding. What is dropped is 0, whatever it was, and which is
/// dropped is Philox's to say.
pub fn dropout(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, p: &Dropout, x: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, mut y) = (desk.real::<T>(x)?, desk.blank(T::DTYPE, case.len)?);
        backend.dropout(p, x.view(), y.view_mut())?;
        Ok(vec![desk.take(&y)?])
    }
    let dropouts = (select(vec![0.0, 0.1, 0.5, 0.9]), any::<u64>(), any::<u64>())
        .prop_map(|(probability, seed, stream)| Dropout { probability, seed, stream });
    check(128, &(case(), dropouts), |(case, p)| {
        let [x] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &p, &x))?;
        let exact = call::<f64>(oracle, &case, &p, &x)?;
        agree("y", &found[0], &exact[0], |i| UNIT * exact[0][i].abs() + DENORMAL)?;
        for (i, &y) in found[0].iter().enumerate() {
            let kept = philox::word(p.seed, p.stream, i as u64) >= p.threshold();
            prop_assert!(kept || y == 0.0, "y[{i}] is {y}, but it was to be dropped");
        }
        Ok(())
    })
}

/// out = gate·σ·up: σ's own error, and the two products' roundings. A denormal intermediate product is off by
/// 2⁻¹⁵⁰, times the factor that is still to come.
pub fn silu_mul(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, gate: &[f32], up: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (gate, up, mut out) = (desk.real::<T>(gate)?, desk.real::<T>(up)?, desk.blank(T::DTYPE, case.len)?);
        backend.silu_mul(gate.view(), up.view(), out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(128, &case(), |case| {
        let [gate, up] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &gate, &up))?;
        let exact = call::<f64>(oracle, &case, &gate, &up)?;
        agree("out", &found[0], &exact[0], |i| silu_error(gate[i].into(), up[i].into()))
    })
}

/// The error of gate·σ(gate)·factor.
pub(super) fn silu_error(gate: f64, factor: f64) -> f64 {
    let (sigma, error) = sigmoid(gate);
    let relative = error + 2.0 * UNIT * sigma;
    let denormal = DENORMAL * (1.0 + gate.abs() + factor.abs());
    second_order((gate * factor).abs() * relative, gamma(16)) + denormal
}

/// dup = dout·gate·σ as the forward; dgate = dout·up·silu'(gate). Each has the same bits whichever are asked for.
pub fn silu_mul_grad(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(
        backend: &dyn Backend,
        case: &Case,
        inputs: &[Vec<f32>; 3],
        asked: [bool; 2],
    ) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let [gate, up, dout] = inputs;
        let (gate, up, dout) = (desk.real::<T>(gate)?, desk.real::<T>(up)?, desk.real::<T>(dout)?);
        let (mut dgate, mut dup) = (desk.blank(T::DTYPE, case.len)?, desk.blank(T::DTYPE, case.len)?);
        let (into_gate, into_up) = (asked[0].then(|| dgate.view_mut()), asked[1].then(|| dup.view_mut()));
        backend.silu_mul_grad(gate.view(), up.view(), dout.view(), into_gate, into_up)?;
        Ok(vec![desk.take(&dgate)?, desk.take(&dup)?])
    }
    check(128, &(case(), any::<[bool; 2]>()), |(case, asked)| {
        let inputs: [Vec<f32>; 3] = case.draw();
        let found = twice(|| call::<f32>(candidate, &case, &inputs, [true; 2]))?;
        let exact = call::<f64>(oracle, &case, &inputs, [true; 2])?;
        let some = call::<f32>(candidate, &case, &inputs, asked)?;
        let at = |i: usize| [0, 1, 2].map(|tensor: usize| f64::from(inputs[tensor][i]));
        agree("dgate", &found[0], &exact[0], |i| {
            let [gate, up, dout] = at(i);
            silu_slope_error(gate, up, dout)
        })?;
        agree("dup", &found[1], &exact[1], |i| {
            let [gate, _, dout] = at(i);
            silu_error(gate, dout)
        })?;
        same_where_asked(["dgate", "dup"], asked, &some, &found)
    })
}

/// The error of dout·up·silu'(gate) with silu' = σ·h, h = 1 + gate(1 − σ), whose error is |gate|(δσ + u(1 − σ)) from
/// 1 − σ, and a rounding each of the product and of the sum; three products follow. The other way to write it,
/// σ + gate·σ(1 − σ), takes as many roundings of terms that are each no larger than those of σ(1 + |gate|(1 − σ)),
/// which the bound therefore weighs: four roundings of each term.
pub(super) fn silu_slope_error(gate: f64, up: f64, dout: f64) -> f64 {
    let (sigma, error) = sigmoid(gate);
    let (h, rest) = (1.0 + gate * (1.0 - sigma), 1.0 - sigma);
    let slope = sigma * gate.abs() * error + h.abs() * error + 4.0 * UNIT * sigma * (1.0 + gate.abs() * rest);
    let denormal = DENORMAL * (1.0 + up.abs() + dout.abs() + (up * dout).abs()) * (1.0 + h.abs());
    second_order((dout * up).abs() * slope, gamma(16)) + denormal
}

/// The largest product that the elementwise laws form stays below overflow, so that only what the kernel does
/// decides whether a result is finite.
const _: () = assert!(1e18 * 1e18 * 1.1 < OVERFLOW);
