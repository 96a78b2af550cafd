//! Dense products by the kernels of `kernels/gemm.cu`: the host's own, and what a GPU's library is compared with.

use crate::call::{Grid, launch};
use crate::{Argument, Driver, Error, Gemm, Result, Transposition};
use rankfold_backend::DType;

/// Rows and columns of c that a block makes.
const TILE: usize = 64;

/// c = alpha·a·b, or c += that.
pub fn tiled(driver: &dyn Driver, gemm: &Gemm) -> Result<()> {
    let kernel = match (gemm.transposition, gemm.dtype) {
        (Transposition::Nn, DType::F32) => "gemm_nn_f32",
        (Transposition::Nt, DType::F32) => "gemm_nt_f32",
        (Transposition::Tn, DType::F32) => "gemm_tn_f32",
        (Transposition::Nn, _) => "gemm_nn_bf16",
        (Transposition::Nt, _) => "gemm_nt_bf16",
        (Transposition::Tn, _) => "gemm_tn_bf16",
    };
    let [m, n, k] = [gemm.m, gemm.n, gemm.k].map(u32::try_from);
    let (Ok(m), Ok(n), Ok(k)) = (m, n, k) else {
        let why = format!("a product of [{}, {}] and {}: dimensions have 32 bits", gemm.m, gemm.n, gemm.k);
        return Err(Error::Geometry { kernel, why });
    };
    let arguments = [
        Argument::input(gemm.dtype, gemm.a),
        Argument::input(gemm.dtype, gemm.b),
        Argument::output(DType::F32, gemm.c),
        m.into(),
        n.into(),
        k.into(),
        gemm.alpha.into(),
        u32::from(gemm.accumulate).into(),
    ];
    launch(driver, kernel, Grid::cube([gemm.n.div_ceil(TILE), gemm.m.div_ceil(TILE), 1], 256), &arguments)
}
