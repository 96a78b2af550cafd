//! The kernels of `kernels/columns.cu`, on addresses: what a linear layer has around its products, and what the
//! kernels of the contract that go by columns are made of.

use crate::Argument;
use crate::call::{Call, Grid, Scratch};
use rankfold_backend::{DType, Result};

/// Threads of a block that has a row.
const ROW_THREADS: u32 = 256;

/// factor_r · x_rc in new working memory.
pub(super) fn scale_rows(call: &Call, x: Argument, factors: Argument, [rows, columns]: [usize; 2]) -> Result<Scratch> {
    let out = call.scratch(DType::F32, rows * columns)?;
    let arguments = [x, factors, out.output(), call.size(columns)?];
    call.launch("scale_rows_f32", Grid::blocks(rows, ROW_THREADS), &arguments)?;
    Ok(out)
}

/// (factor_c + shift) · x_rc in new working memory.
pub(super) fn scaled(call: &Call, x: u64, factors: Argument, shift: f32, shape: [usize; 2]) -> Result<Scratch> {
    let [rows, columns] = shape;
    let out = call.scratch(DType::F32, rows * columns)?;
    scale_columns(call, x, factors, shift, out.at(0), shape)?;
    Ok(out)
}

/// out_rc = (factor_c + shift) · x_rc; out may be x.
pub(super) fn scale_columns(
    call: &Call,
    x: u64,
    factors: Argument,
    shift: f32,
    out: u64,
    [rows, columns]: [usize; 2],
) -> Result<()> {
    let (x, out) = (Argument::input(DType::F32, x), Argument::output(DType::F32, out));
    let arguments = [x, factors, shift.into(), out, call.size(columns)?];
    call.launch("scale_columns_f32", Grid::blocks(rows, ROW_THREADS), &arguments)
}

/// out_rc += factor_c · x_rc
pub(super) fn add_scaled_columns(
    call: &Call,
    x: Argument,
    factors: Argument,
    out: Argument,
    [rows, columns]: [usize; 2],
) -> Result<()> {
    let arguments = [x, factors, out, call.size(columns)?];
    call.launch("add_scaled_columns_f32", Grid::blocks(rows, ROW_THREADS), &arguments)
}

/// y += bias.
pub(super) fn add_bias(call: &Call, bias: Argument, y: Argument, [rows, columns]: [usize; 2]) -> Result<()> {
    call.launch("add_bias_f32", Grid::blocks(rows, ROW_THREADS), &[bias, y, call.size(columns)?])
}

/// out_c += factor · Σ_r x_rc y_rc, or without a y Σ_r x_rc; rows are summed in chunks of a fixed size.
pub(super) fn add_column_sums(
    call: &Call,
    x: u64,
    y: Option<u64>,
    factor: f32,
    out: Argument,
    [rows, columns]: [usize; 2],
) -> Result<()> {
    const CHUNK: usize = 64;
    const THREADS: usize = 128;
    let (chunks, blocks) = (rows.div_ceil(CHUNK), columns.div_ceil(THREADS));
    let partials = call.scratch(DType::F32, chunks * columns)?;
    let (x, y) = (Argument::input(DType::F32, x), Argument::input(DType::F32, y.unwrap_or(0)));
    let arguments = [x, y, partials.output(), call.size(rows)?, call.size(columns)?, call.size(CHUNK)?];
    call.launch("column_sums_f32", Grid::cube([blocks, chunks, 1], THREADS as u32), &arguments)?;
    let arguments = [partials.input(), factor.into(), out, call.size(chunks)?, call.size(columns)?];
    call.launch("add_column_sums_f32", Grid::blocks(blocks, THREADS as u32), &arguments)
}
