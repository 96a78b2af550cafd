//! The Llama family: a pre-norm transformer with rotary positions, grouped-query attention and a gated
//! feed-forward.
//!
//! ```text
//! h = embedding[ids]
//! for each block:  h = h + o(attention(rope(q(n)), rope(k(n)), v(n)))   with n = norm(h)
//!                  h = h + down(silu(gate(n)) ∘ up(n))                  with n = norm(h)
//! logits = head(norm(h))
//! ```
//!
//! Read [`ModelConfig`], then `block.rs`, then [`Model`]; `weights.rs` fills it from files (`blank.rs` from none),
//! [`Cache`] serves generation.

mod blank;
mod block;
mod cache;
mod config;
mod llama;
mod weights;

pub use cache::Cache;
pub use config::{Architecture, ModelConfig};
pub use llama::{DeviceBatch, Model};
pub use weights::{Precision, Quantization};
