//! A 4-bit weight in bf16 on tensor cores: `kernels/linear_mma.cu`, the adapter's outer product a slice of its depth.

use super::super::elementwise::cast_at;
use super::super::quantize4;
use super::parts::Update;
use crate::Argument;
use crate::call::{Call, Grid};
use rankfold_backend::params::{Compute, Linear};
use rankfold_backend::{DType, Quantized, Result};

/// Codes of a thread: rows of W are whole numbers of them.
const RUN: usize = 32;
/// Elements of a copy: rows of x are whole numbers of them.
const CHUNK: usize = 8;
const DEPTH: usize = 64;
const PAD: usize = 8;

/// Which way the weight is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// x Wᵀ
    Forward,
    /// dz W
    Backward,
}

/// A block's tile of the result, and the kernels that make it.
struct Shape {
    rows: usize,
    columns: usize,
    threads: usize,
    stages: usize,
    forward: &'static str,
    backward: &'static str,
}

const SHAPES: [Shape; 3] = [
    Shape { rows: 16, columns: 64, threads: 128, stages: 4, forward: "linear_mma_16", backward: "linear_grad_mma_16" },
    Shape { rows: 64, columns: 64, threads: 128, stages: 4, forward: "linear_mma_64", backward: "linear_grad_mma_64" },
    Shape {
        rows: 128,
        columns: 128,
        threads: 256,
        stages: 3,
        forward: "linear_mma_128",
        backward: "linear_grad_mma_128",
    },
];

impl Shape {
    /// Of those that a device's shared memory holds, the least that holds all tokens, else the widest.
    fn of(tokens: usize, way: Way, memory: usize) -> &'static Self {
        let fits = |shape: &&'static Self| shape.shared(way) <= memory;
        let widest = SHAPES.iter().rfind(fits).unwrap_or(&SHAPES[0]);
        SHAPES.iter().filter(fits).find(|shape| tokens <= shape.rows).unwrap_or(widest)
    }

    /// Bytes of `struct Memory`.
    fn shared(&self, way: Way) -> usize {
        let w = match way {
            Way::Forward => self.columns * (DEPTH + PAD),
            Way::Backward => DEPTH * (self.columns + PAD),
        };
        let x = self.rows * (DEPTH + PAD);
        (self.stages * x + 2 * w) * 2 + self.stages * self.threads * 16 + 16 * size_of::<f32>()
    }
}

/// Whether a product is one of these.
pub(super) fn serves(call: &Call, p: &Linear, way: Way) -> bool {
    let depth = if way == Way::Forward { p.inputs } else { p.outputs };
    p.compute == Compute::Bf16
        && (1..=call.on.crossover.tensor).contains(&p.tokens)
        && p.inputs.is_multiple_of(RUN)
        && depth.is_multiple_of(CHUNK)
        && p.inputs > 0
        && p.outputs > 0
}

/// What is added to the base: (scale·inner) · outer, inner [tokens, rank], outer B or A; and around the sum.
#[derive(Clone, Copy)]
pub(super) struct Beside {
    pub(super) inner: Argument,
    pub(super) outer: Argument,
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) factors: Argument,
    pub(super) bias: Argument,
    pub(super) accumulate: bool,
}

impl Beside {
    /// Nothing, in place of what is there or added to it.
    pub(super) fn nothing(accumulate: bool) -> Self {
        let none = Argument::input(DType::F32, 0);
        Self { inner: none, outer: none, rank: 0, scale: 0.0, factors: none, bias: none, accumulate }
    }

    /// An update's outer product behind `inner`, u forward and v backward.
    pub(super) fn update(self, l: &Update, way: Way, inner: Argument) -> Self {
        let outer = if way == Way::Forward { l.b } else { l.a };
        Self { inner, outer, rank: l.rank, scale: l.scale, ..self }
    }
}

/// out = x Wᵀ or x W, of f32 rounded to bf16, and what is beside it.
pub(super) fn product(
    call: &Call,
    p: &Linear,
    way: Way,
    x: u64,
    w: &Quantized,
    beside: Beside,
    out: Argument,
) -> Result<()> {
    let (depth, columns) = if way == Way::Forward { (p.inputs, p.outputs) } else { (p.outputs, p.inputs) };
    let rounded = call.scratch(DType::Bf16, p.tokens * depth)?;
    cast_at(call, (DType::F32, x), (DType::Bf16, rounded.at(0)), p.tokens * depth)?;
    let shape = Shape::of(p.tokens, way, call.driver().shared_memory());
    let mut arguments = vec![rounded.input()];
    arguments.extend(quantize4::weight(call, w)?);
    arguments.extend([beside.inner, beside.outer, call.size(beside.rank)?, beside.scale.into()]);
    let [across, down] = [columns.div_ceil(shape.columns), p.tokens.div_ceil(shape.rows)];
    let splits = splits(across * down, depth);
    let around = [beside.factors, beside.bias, u32::from(beside.accumulate).into()];
    let shares = call.scratch(DType::F32, if splits > 1 { splits * p.tokens * columns } else { 0 })?;
    arguments.push(if splits > 1 { shares.output() } else { out });
    arguments.extend(around);
    arguments.extend([call.size(p.tokens)?, call.size(p.inputs)?, call.size(p.outputs)?]);
    let kernel = if way == Way::Forward { shape.forward } else { shape.backward };
    let grid = Grid::cube([across, down, splits], shape.threads as u32).shared(shape.shared(way));
    call.launch(kernel, grid, &arguments)?;
    if splits == 1 {
        return Ok(());
    }
    let mut arguments = vec![shares.input(), call.size(splits)?, out];
    arguments.extend(around);
    arguments.extend([call.size(p.tokens)?, call.size(columns)?]);
    call.launch("linear_mma_sum", Grid::stride(p.tokens * columns), &arguments)
}

/// In how many shares depth is split: for blocks enough to fill a device, each with eight steps or more to overlap.
///
/// By the problem alone, so that its bits are the same on every device.
fn splits(tiles: usize, depth: usize) -> usize {
    const BLOCKS: usize = 256;
    (BLOCKS / tiles.max(1)).min(depth / (8 * DEPTH)).max(1)
}
