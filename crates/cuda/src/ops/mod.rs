//! Launch code: the contract's kernels in terms of the entry points of `kernels/`, a file an operation.

pub(crate) mod activate;
pub(crate) mod adamw;
pub(crate) mod attention;
mod columns;
pub(crate) mod cross_entropy;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod hard_concrete;
pub(crate) mod importance;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod quantize4;
pub(crate) mod quantize8;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod row_norms;
pub(crate) mod scale_columns;
pub(crate) mod silu_mul;
