//! A 4-bit weight and a few tokens: one launch of `kernels/linear_few.cu`.

use super::super::quantize4;
use super::parts::Update;
use crate::Argument;
use crate::call::{Call, Grid};
use rankfold_backend::params::{Compute, Linear};
use rankfold_backend::{DType, Quantized, Result};

/// The most tokens that the kernels have room for.
pub(super) const MOST_TOKENS: usize = 4;

/// Rows of W that a block multiplies.
const ROWS: usize = 16;

/// Codes of a lane: rows are whole numbers of them.
const RUN: usize = 32;

/// Bytes of shared memory that the kernel has beside x and u, rounded up.
const BESIDE: usize = 1 << 10;

/// Bytes of x and u: the kernel is there for one token and for four, and keeps one run more than x has.
fn shared(p: &Linear, rank: usize) -> usize {
    let places = if p.tokens == 1 { 1 } else { MOST_TOKENS };
    (places * (p.inputs + RUN)).saturating_add(p.tokens.saturating_mul(rank)).saturating_mul(size_of::<f32>())
}

/// Whether a product is one of these.
pub(super) fn serves(call: &Call, p: &Linear, update: Option<&Update>) -> bool {
    (1..=MOST_TOKENS.min(call.on.crossover.few)).contains(&p.tokens)
        && p.inputs.is_multiple_of(RUN)
        && p.outputs > 0
        && shared(p, update.map_or(0, |l| l.rank)).saturating_add(BESIDE) <= call.driver().shared_memory()
        && update.is_none_or(|l| l.dropout.is_none())
}

/// y = g ∘ (x Wᵀ + s·(x (e∘A)ᵀ) Bᵀ) + bias.
pub(super) fn linear(
    call: &Call,
    p: &Linear,
    x: Argument,
    w: &Quantized,
    update: Option<&Update>,
    bias: Option<Argument>,
    y: Argument,
) -> Result<()> {
    let kernel = match (p.tokens, p.compute) {
        (1, Compute::F32) => "linear_one_f32",
        (1, Compute::Bf16) => "linear_one_bf16",
        (_, Compute::F32) => "linear_few_f32",
        (_, Compute::Bf16) => "linear_few_bf16",
    };
    let none = Argument::input(DType::F32, 0);
    let rank = update.map_or(0, |l| l.rank);
    let u = call.scratch(DType::F32, p.tokens * rank)?;
    let mut arguments = vec![x];
    arguments.extend(quantize4::weight(call, w)?);
    arguments.extend(update.map_or([none; 4], |l| [l.a, l.b, l.e.unwrap_or(none), l.g.unwrap_or(none)]));
    arguments.extend([bias.unwrap_or(none), call.size(rank)?, update.map_or(0.0, |l| l.scale).into(), u.output()]);
    arguments.extend([call.counters(), y, call.size(p.tokens)?, call.size(p.inputs)?, call.size(p.outputs)?]);
    let grid = Grid::blocks(rank + p.outputs.div_ceil(ROWS), 128);
    // A launch that stops halfway, as the host's may, leaves the counters as they then are.
    call.launch(kernel, grid.shared(shared(p, rank)), &arguments).or_else(|error| {
        call.on.clear_counters()?;
        Err(error)
    })
}
