//! Pointwise non-linearities, from denormal arguments to those where nothing but the limit is left; a NaN stays one.
//!
//! relu and what passes it are exact. silu is [`super::elementwise::silu_mul`] with a factor of 1. tanh is within its
//! own specification; its slope, 4e/(1 + e)² with e = e^−2|x|, moves relatively by no more than e does, and two
//! roundings of 1 + e, the square's, the quotient's and the product's with dy follow; where e is flushed to zero so is
//! the slope.

use super::bound::{DENORMAL, EXP, FLUSHED, TANH, UNIT, second_order};
use super::draw::{Draw, Values, length, values};
use super::elementwise::{silu_error, silu_slope_error};
use super::harness::*;
use crate::Backend;
use crate::params::Activation;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    f: Activation,
    len: usize,
    values: Values,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let functions = select(vec![Activation::Relu, Activation::Silu, Activation::Tanh]);
    (functions, length(), values(), any::<u64>()).prop_map(|(f, len, values, seed)| Case { f, len, values, seed })
}

impl Case {
    /// Half of a kind, half of either sign from 2⁻³⁰ to 2⁷.
    fn arguments(&self, draw: &mut Draw) -> Vec<f32> {
        let mut x = draw.values(self.values, self.len);
        for x in &mut x {
            if draw.once_in(2) {
                *x = draw.sign() * 2f32.powi(draw.below(38) as i32 - 30) * (1.0 + draw.below(1 << 20) as f32 / 1e6);
            }
        }
        x
    }
}

/// y = f(x).
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, mut y) = (desk.real::<T>(x)?, desk.blank(T::DTYPE, case.len)?);
        backend.activate(case.f, x.view(), y.view_mut())?;
        Ok(vec![desk.take(&y)?])
    }
    check(192, &cases(), |case| {
        let x = case.arguments(&mut Draw::new(case.seed));
        let found = twice(|| call::<f32>(candidate, &case, &x))?;
        let exact = call::<f64>(oracle, &case, &x)?;
        agree("y", &found[0], &exact[0], |i| match case.f {
            Activation::Relu => 0.0,
            Activation::Silu => silu_error(x[i].into(), 1.0),
            Activation::Tanh => TANH * exact[0][i].abs() + 2.0 * DENORMAL,
        })
    })
}

/// dx = dy · f'(x).
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32], dy: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, dy, mut dx) = (desk.real::<T>(x)?, desk.real::<T>(dy)?, desk.blank(T::DTYPE, case.len)?);
        backend.activate_grad(case.f, x.view(), dy.view(), dx.view_mut())?;
        Ok(vec![desk.take(&dx)?])
    }
    check(192, &cases(), |case| {
        let mut draw = Draw::new(case.seed);
        let (x, dy) = (case.arguments(&mut draw), draw.scaled(case.len));
        let found = twice(|| call::<f32>(candidate, &case, &x, &dy))?;
        let exact = call::<f64>(oracle, &case, &x, &dy)?;
        agree("dx", &found[0], &exact[0], |i| match case.f {
            Activation::Relu => 0.0,
            Activation::Silu => silu_slope_error(x[i].into(), 1.0, dy[i].into()),
            Activation::Tanh => {
                let relative = EXP + 5.0 * UNIT;
                let flushed =
                    if exact[0][i].abs() < 8.0 * FLUSHED * f64::from(dy[i].abs()) { 4.0 * FLUSHED } else { 0.0 };
                let denormal = 2.0 * DENORMAL * (1.0 + f64::from(dy[i].abs()));
                second_order(relative * exact[0][i].abs(), relative) + flushed * f64::from(dy[i].abs()) + denormal
            }
        })
    })
}
