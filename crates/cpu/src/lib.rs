//! The fast CPU backend: SIMD, threads, a buffer pool.
//!
//! [`CpuBackend`] implements [`rankfold_backend::Backend`] within the contract's bounds of `rankfold-reference`: f32
//! activations, weights in f32, bf16, f16 or 4 bits. Its bits depend on the instruction set, never on the number of
//! threads.
//!
//! In reading order:
//! - [`simd`]: one vector type, the instruction sets behind it, and the choice at run time;
//! - `crew`, `threads`, `scratch`, `storage`: who works, on which working memory, and where buffers live;
//! - `slices`, `backend`: from checked views to slices, whose memory is held while the kernel runs, one line a kernel;
//! - `gemm`, then `linear` and `matmul` on it: products;
//! - `attention`: its own small products and an online softmax;
//! - `elementwise`, `dropout`, `silu_mul`, `activate`, `rms_norm`, `row_norms`, `scale_columns`, `rope`, `embedding`,
//!   `cross_entropy`, `quantize4`, `quantize8`, `adamw`, `adamw_8bit`, `importance`, `hard_concrete`: one file an
//!   operation, forward beside backward.

mod activate;
mod adamw;
mod adamw_8bit;
mod attention;
mod backend;
mod crew;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod gemm;
mod hard_concrete;
mod importance;
mod kernels;
mod linear;
mod quantize4;
mod quantize8;
mod rms_norm;
mod rope;
mod row_norms;
mod scale_columns;
mod scratch;
mod silu_mul;
pub mod simd;
mod slices;
mod storage;
mod threads;
mod weights;

pub use backend::CpuBackend;
pub use storage::MemoryFigures;
