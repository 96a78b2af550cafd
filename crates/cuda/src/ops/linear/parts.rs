//! A linear layer's tensors as addresses, and what is formed of them before its products.

use super::super::columns::{scale_rows, scaled};
use super::super::matmul::{Matrix, Product};
use super::super::quantize4;
use crate::Argument;
use crate::call::{Call, Scratch};
use rankfold_backend::params::{Compute, Dropout, Layout, Linear, LowRank, Weight};
use rankfold_backend::{DType, Quantized, Result};

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
        let ea = scale_rows(call, self.a, e, [self.rank, p.inputs])?;
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
