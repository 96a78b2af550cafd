//! Root-mean-square normalisation.
//!
//! Forward: Σ x² has terms of one sign, so its relative error is at most width roundings; the mean, ε (itself
//! rounded, added) and the sum are three more; the root halves that; root, reciprocal and, for y, two products
//! follow: (width + 3)/2 + 2 roundings for 1/ρ, two more for y.
//!
//! Backward: dx is multilinear in gain, dy, and the x, and cubic in 1/ρ, which is an input. Its terms are
//! gain_i dy_i/ρ and x_i gain_j x_j dy_j/(width·ρ³); the second pass the sum over the row (width roundings, two
//! products a term), and three products with 1/ρ, one with 1/width, one with x_i; then the difference, and adding to
//! what is there: width + 9. A term of dgain passes two products and the sum over rows, and the addition.

use super::bound::{DENORMAL, UNIT, gamma, second_order};
use super::draw::{Draw, size, size_or_zero};
use super::harness::*;
use crate::Backend;
use crate::params::RmsNorm;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: RmsNorm,
    accumulate: bool,
    /// Which of dx and dgain are asked for in the second of two calls.
    asked: [bool; 2],
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let eps = select(vec![1e-6, 1e-5, 0.1]);
    // No row at all may also have no width.
    let dims = prop_oneof![19 => (size_or_zero(65), size(1025)), 1 => Just((0, 0))];
    (dims, eps, any::<bool>(), any::<[bool; 2]>(), any::<u64>()).prop_map(
        |((rows, width), eps, accumulate, asked, seed)| Case {
            p: RmsNorm { rows, width, eps },
            accumulate,
            asked,
            seed,
        },
    )
}

/// Rows of very different sizes, zero among them.
fn rows(draw: &mut Draw, p: &RmsNorm) -> Vec<f32> {
    let row = |_| {
        let sigma = [1.0, 1.0, 30.0, 1e-3, 1e10, 0.0][draw.below(6)];
        draw.normal(p.width, sigma)
    };
    (0..p.rows).flat_map(row).collect()
}

fn forward_call<T: Real>(backend: &dyn Backend, case: &Case, x: &[f32], gain: &[f32]) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (mut y, mut inv_rms) = (desk.blank(T::DTYPE, x.len())?, desk.blank(T::DTYPE, case.p.rows)?);
    let (x, gain) = (desk.real::<T>(x)?, desk.real::<T>(gain)?);
    backend.rms_norm(&case.p, x.view(), gain.view(), y.view_mut(), inv_rms.view_mut())?;
    Ok(vec![desk.take(&y)?, desk.take(&inv_rms)?])
}

/// y and 1/ρ.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(128, &cases(), |case| {
        let mut draw = Draw::new(case.seed);
        let (x, gain) = (rows(&mut draw, &case.p), draw.scaled(case.p.width));
        let found = twice(|| forward_call::<f32>(candidate, &case, &x, &gain))?;
        let exact = forward_call::<f64>(oracle, &case, &x, &gain)?;
        let relative = ((case.p.width + 3) as f64 / 2.0 + 2.0) * UNIT;
        let bound = |value: f64, relative: f64| second_order(value.abs() * relative, relative) + DENORMAL;
        agree("inv_rms", &found[1], &exact[1], |i| bound(exact[1][i], relative))?;
        agree("y", &found[0], &exact[0], |i| bound(exact[0][i], relative + 2.0 * UNIT))
    })
}

struct Data {
    x: Vec<f32>,
    gain: Vec<f32>,
    inv_rms: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
    dgain: Vec<f32>,
}

/// dx and dgain, each what it was where it is not asked for.
fn backward_call<T: Real>(
    backend: &dyn Backend,
    case: &Case,
    data: &Data,
    asked: [bool; 2],
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (x, gain, dy) = (desk.real::<T>(&data.x)?, desk.real::<T>(&data.gain)?, desk.real::<T>(&data.dy)?);
    let inv_rms = desk.real::<T>(&data.inv_rms)?;
    let mut dx = desk.output::<T>(case.accumulate, &data.dx)?;
    let mut dgain = desk.real::<T>(&data.dgain)?;
    let (into, into_gain) = (asked[0].then(|| dx.view_mut()), asked[1].then(|| dgain.view_mut()));
    let (x, gain, inv_rms, dy) = (x.view(), gain.view(), inv_rms.view(), dy.view());
    backend.rms_norm_grad(&case.p, x, gain, inv_rms, dy, case.accumulate, into, into_gain)?;
    Ok(vec![desk.take(&dx)?, desk.take(&dgain)?])
}

/// dx, written or added, and dgain; the same bits whichever are asked for.
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(128, &cases(), |case| {
        let (p, mut draw) = (case.p, Draw::new(case.seed));
        let x = rows(&mut draw, &p);
        let gain = draw.scaled(p.width);
        let inv_rms = forward_call::<f64>(oracle, &case, &x, &gain)?.remove(1);
        let inv_rms: Vec<f32> = inv_rms.into_iter().map(|inverse| inverse as f32).collect();
        let dy = draw.scaled(x.len());
        let (dx, dgain) = (draw.scaled(x.len()), draw.scaled(p.width));
        let data = Data { x, gain, inv_rms, dy, dx, dgain };
        let found = twice(|| backward_call::<f32>(candidate, &case, &data, [true; 2]))?;
        let exact = backward_call::<f64>(oracle, &case, &data, [true; 2])?;
        let some = backward_call::<f32>(candidate, &case, &data, case.asked)?;

        let (mut mass_x, mut mass_gain) =
            (Vec::new(), data.dgain.iter().map(|&g| f64::from(g.abs())).collect::<Vec<_>>());
        for row in 0..p.rows {
            let at = |values: &[f32], i: usize| f64::from(values[row * p.width + i].abs());
            let inverse = f64::from(data.inv_rms[row]);
            let term = |i: usize| f64::from(data.gain[i].abs()) * at(&data.dy, i);
            let pull = (0..p.width).map(|j| term(j) * at(&data.x, j)).sum::<f64>() * inverse.powi(3) / p.width as f64;
            for (i, mass_gain) in mass_gain.iter_mut().enumerate() {
                let before = if case.accumulate { at(&data.dx, i) } else { 0.0 };
                mass_x.push(term(i) * inverse + at(&data.x, i) * pull + before);
                *mass_gain += at(&data.dy, i) * at(&data.x, i) * inverse;
            }
        }
        agree("dx", &found[0], &exact[0], |i| gamma(p.width + 9) * mass_x[i] + DENORMAL)?;
        agree("dgain", &found[1], &exact[1], |i| gamma(p.rows + 3) * mass_gain[i])?;
        same_where_asked(["dx", "dgain"], case.asked, &some, &found)
    })
}
