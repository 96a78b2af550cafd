//! Matrix products: |error| ≤ γ_(k+1)·(Σ|a b| + |c|).
//!
//! A term is one product and at most k − 1 sums; adding to c is one rounding more.

use super::bound::gamma_of;
use super::draw::{Draw, abs, size, size_or_zero};
use super::harness::*;
use crate::params::{Layout, MatMul};
use crate::{Backend, Compute};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: MatMul,
    seed: u64,
}

struct Data {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

fn case(m: usize, n: usize, k: usize, compute: Compute) -> impl Strategy<Value = Case> {
    let dims = (size_or_zero(m), size_or_zero(n), size_or_zero(k));
    with_dims(dims, compute)
}

fn with_dims(dims: impl Strategy<Value = (usize, usize, usize)>, compute: Compute) -> impl Strategy<Value = Case> {
    let layouts = select(vec![Layout::Nn, Layout::Nt, Layout::Tn]);
    (dims, layouts, any::<bool>(), any::<u64>()).prop_map(move |((m, n, k), layout, accumulate, seed)| Case {
        p: MatMul { m, n, k, layout, accumulate, compute },
        seed,
    })
}

fn draw(case: &Case) -> Data {
    let (MatMul { m, n, k, .. }, mut draw) = (case.p, Draw::new(case.seed));
    Data { a: draw.scaled(m * k), b: draw.scaled(k * n), c: draw.scaled(m * n) }
}

fn call<T: Real>(backend: &dyn Backend, case: &Case, data: &Data) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (a, b) = (desk.real::<T>(&data.a)?, desk.real::<T>(&data.b)?);
    let mut c = desk.output::<T>(case.p.accumulate, &data.c)?;
    backend.matmul(&case.p, a.view(), b.view(), c.view_mut())?;
    Ok(vec![desk.take(&c)?])
}

fn law(candidate: &dyn Backend, oracle: &dyn Backend, case: Case, data: &Data) -> TestCaseResult {
    let found = twice(|| call::<f32>(candidate, &case, data))?;
    let exact = call::<f64>(oracle, &case, data)?;
    let mass = call::<f64>(oracle, &case, &Data { a: abs(&data.a), b: abs(&data.b), c: abs(&data.c) })?;
    agree("c", &found[0], &exact[0], |i| gamma_of(case.p.compute, case.p.k + 1) * mass[0][i])
}

/// All layouts, adding or not, of every size from nothing.
pub fn agrees(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(256, &case(129, 129, 257, Compute::F32), |case| law(candidate, oracle, case, &draw(&case)))
}

/// Sizes beyond one block of any blocking, long in one dimension or wide in two.
pub fn large(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    let long = || select(vec![513, 769, 1031, 2049]);
    let dims = prop_oneof![
        (long(), size(17), size(65)),
        (size(17), long(), size(65)),
        (size(17), size(65), long()),
        (select(vec![193, 257]), select(vec![193, 257]), select(vec![257, 385])),
    ];
    check(24, &with_dims(dims, Compute::F32), |case| law(candidate, oracle, case, &draw(&case)))
}

/// NaN and infinities reach every sum that they are a term of, and no other.
pub fn non_finite(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(64, &case(49, 49, 65, Compute::F32), |case| {
        let mut data = draw(&case);
        let mut draw = Draw::new(!case.seed);
        for tensor in [&mut data.a, &mut data.b, &mut data.c] {
            if !tensor.is_empty() {
                let at = draw.below(tensor.len());
                tensor[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][draw.below(3)];
            }
        }
        law(candidate, oracle, case, &data)
    })
}

/// With both inputs rounded to bf16, whose products are exact: the bound is that of sums in f32, rounded or cut.
pub fn bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    let p = MatMul { m: 1, n: 1, k: 1, layout: Layout::Nn, accumulate: false, compute: Compute::Bf16 };
    let trial = || {
        let [a, b, mut c] = [candidate.upload(&[1f32])?, candidate.upload(&[1f32])?, candidate.upload(&[1f32])?];
        candidate.matmul(&p, a.view(), b.view(), c.view_mut())
    };
    unsupported(trial()).unwrap_or_else(|| {
        check(128, &case(129, 129, 257, Compute::Bf16), |case| law(candidate, oracle, case, &draw(&case)))
    })
}
