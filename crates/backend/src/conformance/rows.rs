//! Norms of rows, and a factor a column.
//!
//! A norm: Σ x² has terms of one sign, so its relative error is at most width roundings, and the root halves that and
//! rounds once; where the sum is formed of scaled elements, the scaling, the product with what was scaled by, and the
//! reciprocal of that are three more: width/2 + 4. Of the squares of an f32 the largest overflows and the least is 0 as
//! f32, and yet the norm has to come out: rows are drawn at both ends of the range.
//!
//! Columns: y and dx are one product, and one sum where dx is added to. A term of dfactors passes its product, the sum
//! over the rows and the addition: rows + 1.

use super::bound::{DENORMAL, UNIT, gamma, second_order};
use super::draw::{Draw, Values, size, size_or_zero, values};
use super::harness::*;
use crate::Backend;
use crate::params::Rows;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: Rows,
    values: Values,
    accumulate: bool,
    /// Which of dx and dfactors are asked for in the second of two calls.
    asked: [bool; 2],
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (size_or_zero(65), size(1025), values(), any::<bool>(), any::<[bool; 2]>(), any::<u64>()).prop_map(
        |(rows, width, values, accumulate, asked, seed)| Case {
            p: Rows { rows, width },
            values,
            accumulate,
            asked,
            seed,
        },
    )
}

/// Norms, of rows of very different sizes: zero, denormal, beyond the root of the largest f32, beyond it altogether.
pub fn norms(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, mut norms) = (desk.real::<T>(x)?, desk.blank(T::DTYPE, case.p.rows)?);
        backend.row_norms(&case.p, x.view(), norms.view_mut())?;
        Ok(vec![desk.take(&norms)?])
    }
    check(128, &cases(), |case| {
        let (p, mut draw) = (case.p, Draw::new(case.seed));
        let row = |_| match draw.below(3) {
            0 => draw.values(case.values, p.width),
            _ => {
                let sigma = [1.0, 1e-3, 1e-30, 1e-41, 1e20, 1e36, 1e38, 0.0][draw.below(8)];
                draw.normal(p.width, sigma)
            }
        };
        let x: Vec<f32> = (0..p.rows).flat_map(row).collect();
        let found = twice(|| call::<f32>(candidate, &case, &x))?;
        let exact = call::<f64>(oracle, &case, &x)?;
        let relative = (p.width as f64 / 2.0 + 4.0) * UNIT;
        agree("norms", &found[0], &exact[0], |i| second_order(relative * exact[0][i], relative) + DENORMAL)
    })
}

/// y = x · factors.
pub fn scale(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32], factors: &[f32]) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, case.seed);
        let (x, factors, mut y) = (desk.real::<T>(x)?, desk.real::<T>(factors)?, desk.blank(T::DTYPE, x.len())?);
        backend.scale_columns(&case.p, x.view(), factors.view(), y.view_mut())?;
        Ok(vec![desk.take(&y)?])
    }
    check(128, &cases(), |case| {
        let (p, mut draw) = (case.p, Draw::new(case.seed));
        let (x, factors) = (draw.values(case.values, p.rows * p.width), draw.values(case.values, p.width));
        let found = twice(|| call::<f32>(candidate, &case, &x, &factors))?;
        let exact = call::<f64>(oracle, &case, &x, &factors)?;
        agree("y", &found[0], &exact[0], |i| UNIT * exact[0][i].abs() + DENORMAL)
    })
}

struct Data {
    x: Vec<f32>,
    factors: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
    dfactors: Vec<f32>,
}

/// dx and dfactors, each what it was where it is not asked for.
fn grad_call<T: Real>(backend: &dyn Backend, case: &Case, data: &Data, asked: [bool; 2]) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (x, factors, dy) = (desk.real::<T>(&data.x)?, desk.real::<T>(&data.factors)?, desk.real::<T>(&data.dy)?);
    let mut dx = desk.output::<T>(case.accumulate, &data.dx)?;
    let mut dfactors = desk.real::<T>(&data.dfactors)?;
    let (into, into_factors) = (asked[0].then(|| dx.view_mut()), asked[1].then(|| dfactors.view_mut()));
    let (x, factors, dy) = (x.view(), factors.view(), dy.view());
    backend.scale_columns_grad(&case.p, x, factors, dy, case.accumulate, into, into_factors)?;
    Ok(vec![desk.take(&dx)?, desk.take(&dfactors)?])
}

/// dx, written or added, and dfactors; the same bits whichever are asked for.
pub fn scale_grad(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(128, &cases(), |case| {
        let (p, mut draw) = (case.p, Draw::new(case.seed));
        let (x, factors, dy) = (draw.scaled(p.rows * p.width), draw.scaled(p.width), draw.scaled(p.rows * p.width));
        let (dx, dfactors) = (draw.scaled(x.len()), draw.scaled(p.width));
        let data = Data { x, factors, dy, dx, dfactors };
        let found = twice(|| grad_call::<f32>(candidate, &case, &data, [true; 2]))?;
        let exact = grad_call::<f64>(oracle, &case, &data, [true; 2])?;
        let some = grad_call::<f32>(candidate, &case, &data, case.asked)?;

        let at = |values: &[f32], i: usize| f64::from(values[i].abs());
        agree("dx", &found[0], &exact[0], |i| {
            let before = if case.accumulate { at(&data.dx, i) } else { 0.0 };
            gamma(2) * (at(&data.dy, i) * at(&data.factors, i % p.width) + before)
        })?;
        let mut mass: Vec<f64> = (0..p.width).map(|j| at(&data.dfactors, j)).collect();
        for i in 0..data.x.len() {
            mass[i % p.width] += at(&data.dy, i) * at(&data.x, i);
        }
        agree("dfactors", &found[1], &exact[1], |j| gamma(p.rows + 1) * mass[j])?;
        same_where_asked(["dx", "dfactors"], case.asked, &some, &found)
    })
}
