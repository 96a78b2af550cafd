//! Rotary position embedding: two products and a sum an element, γ_2·(|x_i cos| + |x_j sin|).

use super::bound::gamma;
use super::draw::{Draw, abs, size_or_zero};
use super::harness::*;
use crate::Backend;
use crate::params::Rope;
use crate::rope::{Scaling, frequencies, tables};
use proptest::prelude::*;
use proptest::sample::select;

/// Positions that the tables hold.
const POSITIONS: usize = 200;

fn call<T: Real>(
    backend: &dyn Backend,
    p: &Rope,
    seed: u64,
    x: &[f32],
    positions: &[u32],
    (cos, sin): (&[f32], &[f32]),
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, seed);
    let mut y = desk.blank(T::DTYPE, x.len())?;
    let (x, positions, cos, sin) = (desk.real::<T>(x)?, desk.put(positions)?, desk.put(cos)?, desk.put(sin)?);
    backend.rope(p, x.view(), positions.view(), cos.view(), sin.view(), y.view_mut())?;
    Ok(vec![desk.take(&y)?])
}

/// Forward and inverse, with plain and scaled frequencies, at positions in any order.
pub fn agrees(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    let llama3 = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 };
    let scalings = select(vec![Scaling::None, Scaling::Linear { factor: 4.0 }, llama3]);
    let dims = (size_or_zero(65), 1..5usize, select(vec![2, 4, 6, 14, 16, 34, 64, 80, 128]));
    check(128, &(dims, scalings, any::<bool>(), any::<u64>()), |((tokens, heads, head_dim), scaling, inverse, seed)| {
        let p = Rope { tokens, heads, head_dim, inverse };
        let mut draw = Draw::new(seed);
        let x = draw.scaled(tokens * heads * head_dim);
        let positions: Vec<u32> = (0..tokens).map(|_| draw.below(POSITIONS) as u32).collect();
        let (cos, sin) = tables(&frequencies(10_000.0, head_dim, scaling), POSITIONS);
        let found = twice(|| call::<f32>(candidate, &p, seed, &x, &positions, (&cos, &sin)))?;
        let exact = call::<f64>(oracle, &p, seed, &x, &positions, (&cos, &sin))?;
        // y_i subtracts and y_j adds (or the other way round), so |x| under |cos| and |sin| sums up the terms of
        // one of the two; turned with the other sign, those of the other. The larger is all terms.
        let (x, cos, sin) = (abs(&x), abs(&cos), abs(&sin));
        let [one, other] = [false, true]
            .map(|inverse| call::<f64>(oracle, &Rope { inverse, ..p }, seed, &x, &positions, (&cos, &sin)));
        let (one, other) = (one?, other?);
        agree("y", &found[0], &exact[0], |i| gamma(2) * one[0][i].max(other[0][i]))
    })
}
