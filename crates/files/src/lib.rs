//! The bytes outside: checkpoints read tensor by tensor, files written whole or not at all.
//!
//! In reading order:
//! - [`header`]: what a safetensors header says and what is checked before any of it is believed;
//! - [`Checkpoint`]: one file or a Hugging Face folder of shards, read by position, never mapped;
//! - [`write_atomically`], [`StagedFolder`]: a file or a folder that appears complete or not at all;
//! - [`Writer`]: a safetensors file written one tensor at a time;
//! - [`quant_state`]: how bitsandbytes describes a 4-bit weight, to the byte;
//! - [`quantized`]: such a weight into a backend and out of it;
//! - [`Error`]: everything that can be wrong with a file.
#![forbid(unsafe_code)]

mod atomic;
mod checkpoint;
mod error;
mod finite;
pub mod header;
mod pairs;
pub mod quant_state;
pub mod quantized;
mod writer;

pub use atomic::{StagedFolder, write_atomically};
pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use header::TensorInfo;
pub use quant_state::QuantState;
pub use writer::{Spec, Writer};

// Tensors go between file and memory as they are, and safetensors is little-endian.
const _: () = assert!(cfg!(target_endian = "little"), "rankfold-files needs a little-endian machine");

/// Bytes a copy between a file and a backend holds at a time, where the backend's memory is not the host's.
pub const PART: usize = 4 << 20;

/// The byte ranges of such parts, in order.
fn parts(bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..bytes).step_by(PART).map(move |start| start..bytes.min(start + PART))
}
