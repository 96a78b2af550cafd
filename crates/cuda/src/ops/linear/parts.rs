//! A linear layer's tensors as addresses, and the small kernels around its products (`kernels/columns.cu`).

use super::super::matmul::{Matrix, Product};
use super::super::quantize4;
use crate::Argument;
use crate::call::{Call, Grid, Scratch};
use rankfold_backend::params::{Compute, Dropout, Layout, Linear, LowRank, Weight};
use rankfold_backend::{DType, Error, Quantized, Result};

/// Threads of a block that has a row.
const ROW_THREADS: u32 = 256;

/// The weight in the type that a product takes, and what keeps it there.
pub(super) struct Held {
    pub(super) matrix: Matrix,
    _decoded: Option<Scratch>,
}

/// The weight, checked: dense as it is stored, or still in 4 bits.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a>(&'a Weight<'a>);

impl<'a> Stored<'a> {
    /// That it is this backend's, of types that it serves.
    pub(super) fn new(call: &Call, w: &'a Weight<'a>) -> Result<Self> {
        match w {
            Weight::Dense(view) => {
                call.float("weight", view.dtype())?;
                call.check("weight", view.dtype(), view)?;
            }
            Weight::Quantized(q) => quantize4::check(call, q)?,
        }
        Ok(Self(w))
    }

    /// Its codes, where it is in 4 bits.
    pub(super) fn quantized(self) -> Option<&'a Quantized> {
        match *self.0 {
            Weight::Dense(_) => None,
            Weight::Quantized(q) => Some(q),
        }
    }

    /// As a matrix: 4 bits are decoded, to bf16 where that is what the product rounds to anyway.
    pub(super) fn matrix(self, call: &Call, compute: Compute) -> Result<Held> {
        match self.0 {
            Weight::Dense(view) => {
                Ok(Held { matrix: Matrix { dtype: view.dtype(), address: call.at("weight", *view)? }, _decoded: None })
            }
            Weight::Quantized(q) => {
                let dtype = if compute == Compute::Bf16 { DType::Bf16 } else { DType::F32 };
                let decoded = call.scratch(dtype, q.elements())?;
                quantize4::decode(call, q, dtype, decoded.at(0))?;
                let matrix = Matrix { dtype, address: decoded.at(0) };
                Ok(Held { matrix, _decoded: Some(decoded) })
            }
        }
    }
}

/// The low-rank part, checked.
#[derive(Clone, Copy)]
pub(super) struct Update {
    pub(super) rank: usize,
    pub(super) a: Argument,
    pub(super) b: Argument,
    pub(super) scale: f32,
    pub(super) e: Option<Argument>,
    pub(super) g: Option<Argument>,
    pub(super) dropout: Option<Dropout>,
}

impl Update {
    pub(super) fn new(call: &Call, l: &LowRank) -> Result<Self> {
        Ok(Self {
            rank: l.rank,
            a: call.f32("a", l.a)?,
            b: call.f32("b", l.b)?,
            scale: l.scale,
            e: l.per_rank.map(|e| call.f32("per_rank", e)).transpose()?,
            g: l.row_scale.map(|g| call.f32("row_scale", g)).transpose()?,
            dropout: l.dropout,
        })
    }

    /// A, as a product takes it.
    pub(super) fn a_matrix(&self) -> Matrix {
        Matrix::f32(self.a.value())
    }

    /// B, as a product takes it.
    pub(super) fn b_matrix(&self) -> Matrix {
        Matrix::f32(self.b.value())
    }

    /// x̃ = dropout(x), or a gradient through it; x itself where nothing is dropped.
    pub(super) fn dropped(&self, call: &Call, x: u64, elements: usize) -> Result<Held> {
        let Some(dropout) = &self.dropout else { return Ok(Held { matrix: Matrix::f32(x), _decoded: None }) };
        let dropped = call.scratch(DType::F32, elements)?;
        super::super::dropout::dropped(call, dropout, Argument::input(DType::F32, x), dropped.output(), elements)?;
        Ok(Held { matrix: Matrix::scratch(&dropped), _decoded: Some(dropped) })
    }

    /// u = x̃ (e∘A)ᵀ [tokens, rank].
    pub(super) fn inner(&self, call: &Call, p: &Linear, dropped_x: Matrix) -> Result<Scratch> {
        let u = call.scratch(DType::F32, p.tokens * self.rank)?;
        let product = product(p, Layout::Nt, [p.tokens, self.rank, p.inputs]);
        let Some(e) = self.e else {
            product.run(call, dropped_x, self.a_matrix(), u.at(0))?;
            return Ok(u);
        };
        let ea = call.scratch(DType::F32, self.rank * p.inputs)?;
        let arguments = [self.a, e, ea.output(), size(p.inputs)?];
        call.launch("scale_rows_f32", Grid::blocks(self.rank, ROW_THREADS), &arguments)?;
        product.run(call, dropped_x, Matrix::scratch(&ea), u.at(0))?;
        Ok(u)
    }

    /// dz = g∘dy, or dy itself.
    pub(super) fn grad_z(&self, call: &Call, p: &Linear, dy: u64) -> Result<Held> {
        match self.g {
            None => Ok(Held { matrix: Matrix::f32(dy), _decoded: None }),
            Some(g) => {
                let dz = scaled(call, dy, g, 0.0, [p.tokens, p.outputs])?;
                Ok(Held { matrix: Matrix::scratch(&dz), _decoded: Some(dz) })
            }
        }
    }

    /// dz B [tokens, rank].
    pub(super) fn grad_inner(&self, call: &Call, p: &Linear, dz: Matrix) -> Result<Scratch> {
        let dz_b = call.scratch(DType::F32, p.tokens * self.rank)?;
        product(p, Layout::Nn, [p.tokens, self.rank, p.outputs]).run(call, dz, self.b_matrix(), dz_b.at(0))?;
        Ok(dz_b)
    }

    /// x ← x∘e for x [tokens, rank].
    pub(super) fn times_e(&self, call: &Call, p: &Linear, x: Scratch) -> Result<Scratch> {
        match self.e {
            None => Ok(x),
            Some(e) => scaled(call, x.at(0), e, 0.0, [p.tokens, self.rank]),
        }
    }
}

/// A product of the call's precision, of factor 1, that overwrites.
pub(super) fn product(p: &Linear, layout: Layout, dims: [usize; 3]) -> Product {
    Product { layout, dims, alpha: 1.0, accumulate: false, compute: p.compute }
}

/// A dimension as an argument.
pub(super) fn size(n: usize) -> Result<Argument> {
    let why = || Error::Invalid { kernel: "linear", why: format!("a dimension of {n}: expected at most 2³² − 1") };
    Ok(u32::try_from(n).map_err(|_| why())?.into())
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
    let arguments = [x, factors, shift.into(), out, size(columns)?];
    call.launch("scale_columns_f32", Grid::blocks(rows, ROW_THREADS), &arguments)
}

/// y += bias.
pub(super) fn add_bias(call: &Call, bias: Argument, y: Argument, [rows, columns]: [usize; 2]) -> Result<()> {
    call.launch("add_bias_f32", Grid::blocks(rows, ROW_THREADS), &[bias, y, size(columns)?])
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
    let arguments = [x, y, partials.output(), size(rows)?, size(columns)?, size(CHUNK)?];
    call.launch("column_sums_f32", Grid::cube([blocks, chunks, 1], THREADS as u32), &arguments)?;
    let arguments = [partials.input(), factor.into(), out, size(chunks)?, size(columns)?];
    call.launch("add_column_sums_f32", Grid::blocks(blocks, THREADS as u32), &arguments)
}
