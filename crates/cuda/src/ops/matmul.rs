//! Products of dense matrices, with the inputs as they are or rounded to bf16.

use super::elementwise::cast_at;
use crate::call::{Call, Scratch};
use crate::{CudaBackend, Gemm, Transposition};
use rankfold_backend::params::{Compute, Layout, MatMul};
use rankfold_backend::{DType, Result, View, ViewMut};

/// A matrix on the device, of any float type.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) dtype: DType,
    pub(crate) address: u64,
}

impl Matrix {
    /// Of f32.
    pub(crate) fn f32(address: u64) -> Self {
        Self { dtype: DType::F32, address }
    }

    /// Working memory of f32.
    pub(crate) fn scratch(scratch: &Scratch) -> Self {
        Self::f32(scratch.at(0))
    }
}

/// c [m, n] = alpha·a·b or c += that, of f32.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) layout: Layout,
    pub(crate) dims: [usize; 3],
    pub(crate) alpha: f32,
    pub(crate) accumulate: bool,
    pub(crate) compute: Compute,
}

impl Product {
    /// Into c, which lies apart from a and b.
    pub(crate) fn run(self, call: &Call, a: Matrix, b: Matrix, c: u64) -> Result<()> {
        let [m, n, k] = self.dims;
        let dtype = match self.compute {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::Bf16,
        };
        let a = Input::new(call, a, m * k, dtype)?;
        let b = Input::new(call, b, k * n, dtype)?;
        let transposition = match self.layout {
            Layout::Nn => Transposition::Nn,
            Layout::Nt => Transposition::Nt,
            Layout::Tn => Transposition::Tn,
        };
        let (a, b) = (a.address, b.address);
        let Self { alpha, accumulate, .. } = self;
        Ok(call.driver().gemm(&Gemm { m, n, k, transposition, dtype, a, b, c, alpha, accumulate })?)
    }
}

/// A product's input in the type that it is taken in, cast where it has another.
struct Input {
    address: u64,
    /// Keeps what was cast until the product is launched.
    _cast: Option<Scratch>,
}

impl Input {
    fn new(call: &Call, matrix: Matrix, elements: usize, dtype: DType) -> Result<Self> {
        if matrix.dtype == dtype {
            return Ok(Self { address: matrix.address, _cast: None });
        }
        let cast = call.scratch(dtype, elements)?;
        cast_at(call, (matrix.dtype, matrix.address), (dtype, cast.at(0)), elements)?;
        Ok(Self { address: cast.at(0), _cast: Some(cast) })
    }
}

/// c = a·b or c += a·b.
pub(crate) fn matmul(on: &CudaBackend, p: &MatMul, a: View, b: View, mut c: ViewMut) -> Result<()> {
    let call = &on.call("matmul");
    p.check(&a, &b, &c)?;
    let product =
        Product { layout: p.layout, dims: [p.m, p.n, p.k], alpha: 1.0, accumulate: p.accumulate, compute: p.compute };
    let [a, b] = [call.f32("a", a)?, call.f32("b", b)?].map(|x| Matrix::f32(x.value()));
    product.run(call, a, b, call.f32_mut("c", &mut c)?.value())
}
