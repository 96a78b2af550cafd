//! Σ|terms| of the linear kernels: the oracle on absolute values.
//!
//! One factor is a difference, (g − 1) of DoRA with dropout, and no absolute value of g gives |g| + 1, which bounds
//! it. So the base is summed apart from the update: with B = 0 and |g| + 2 in place of g the oracle adds up
//! |x||W|ᵀ + (|g| + 1)∘|x̃||W|ᵀ + |bias|, and with W = 0 it adds up |g|∘|s|·|x̃|(|e|∘|A|)ᵀ|B|ᵀ.

use super::case::{Case, Data};
use super::run::{Held, Kernel, call};
use crate::Backend;
use crate::conformance::draw::abs;
use crate::conformance::harness::*;

fn zeros(like: &[f32]) -> Vec<f32> {
    vec![0.0; like.len()]
}

/// Every tensor's absolute values.
pub fn absolute(data: &Data) -> Data {
    Data {
        x: abs(&data.x),
        dy: abs(&data.dy),
        stored: data.stored.clone(),
        w: abs(&data.w),
        a: abs(&data.a),
        b: abs(&data.b),
        s: data.s.abs(),
        e: abs(&data.e),
        g: abs(&data.g),
        bias: abs(&data.bias),
        dx: abs(&data.dx),
        grads: data.grads.each_ref().map(|grad| abs(grad)),
    }
}

/// Σ|terms| of every element of every output.
pub fn mass(oracle: &dyn Backend, kernel: Kernel, case: &Case, data: &Data) -> TestCaseResult<Outputs<f64>> {
    let all = absolute(data);
    if kernel == Kernel::GradWeight {
        return call(oracle, kernel, case, &all, &Held::values);
    }
    let g = if case.dropout().is_some() { all.g.iter().map(|g| g + 2.0).collect() } else { all.g.clone() };
    let base = Data { b: zeros(&all.b), g, ..all.clone() };
    let update = Data { w: zeros(&all.w), bias: zeros(&all.bias), dx: zeros(&all.dx), ..all };
    let mut mass = call::<f64>(oracle, kernel, case, &base, &Held::values)?;
    let update = call::<f64>(oracle, kernel, case, &update, &Held::values)?;
    mass[0].iter_mut().zip(&update[0]).for_each(|(mass, update)| *mass += update);
    Ok(mass)
}
