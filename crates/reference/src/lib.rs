//! The oracle: every kernel of the contract as scalar Rust that reads like the paper.
//!
//! Inputs are read exactly as f64, sums and functions are f64, and each result is rounded once to its output's
//! element type; f64 activations are served too, and then nothing is rounded on the way, so that gradients can be
//! checked by finite differences. Quantisation alone is f32 arithmetic: it is defined to the bit. There are no
//! threads, no SIMD and no `unsafe`: what another backend computes is right where it agrees with this one.
//!
//! In reading order, each file an operation with its formula, its forward and its backward:
//! - `storage`, `operands`: vectors behind buffers; reading floats, and the one rounding;
//! - `elementwise`: fill, copy, cast, scale, add, the sum of squares;
//! - `matmul`, then `linear`: products, and the product with a weight and a low-rank update beside it;
//! - `quantize4`, `quantize8`: blockwise quantisation in 4 and 8 bits; [`mod@derive`], [`thresholds`]: where
//!   their tables and decisions come from;
//! - `embedding`, `rms_norm`, `rope`, `attention`, `silu_mul`, `cross_entropy`: a transformer's other layers;
//! - `row_norms`, `scale_columns`, `activate`: what adapters other than LoRA add to them;
//! - `dropout`, `adamw`, `adamw_8bit`, `importance`, `hard_concrete`: training;
//! - `backend`: the trait, which only delegates.
#![forbid(unsafe_code)]

mod activate;
mod adamw;
mod adamw_8bit;
mod attention;
mod backend;
mod cross_entropy;
pub mod derive;
mod dropout;
mod elementwise;
mod embedding;
mod hard_concrete;
mod importance;
mod linear;
mod matmul;
mod operands;
mod quantize4;
mod quantize8;
mod rms_norm;
mod rope;
mod row_norms;
mod scale_columns;
mod silu_mul;
mod storage;
#[cfg(test)]
mod testing;
pub mod thresholds;

pub use backend::ReferenceBackend;
