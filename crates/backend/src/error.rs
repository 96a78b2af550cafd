//! Everything that can be wrong with a call of a kernel.

use crate::DType;
use std::fmt::Display;

/// The result of a kernel.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, with which argument of which kernel, and what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A view's number of elements disagrees with the parameters.
    #[error("{kernel}: '{tensor}' has {found} elements, expected {expected}")]
    Length { kernel: &'static str, tensor: &'static str, expected: usize, found: usize },
    /// A view's element type is not one that the kernel serves.
    #[error("{kernel}: '{tensor}' is {found}, expected {expected}")]
    DType { kernel: &'static str, tensor: &'static str, expected: &'static str, found: DType },
    /// A buffer was made by another backend.
    #[error("a buffer of another backend was given to the {backend} backend")]
    Foreign { backend: &'static str },
    /// A slice reaches beyond its buffer.
    #[error("elements {offset}..{offset}+{len} were asked of a buffer of {available}")]
    Range { offset: usize, len: usize, available: usize },
    /// A quantisation block that the formats do not have.
    #[error("block {block}: expected a power of two from 32 to 4096")]
    Block { block: usize },
    /// A value that cannot be quantised.
    #[error("element {index} is {value}: only finite values can be quantised")]
    NonFinite { index: usize, value: f64 },
    /// A block's scale that is not finite once its own quantisation is undone.
    #[error("block {block}: its double-quantised scale decodes to {value}, expected a finite number")]
    Scale { block: usize, value: f32 },
    /// A token id that the table lacks.
    #[error("token id {id} at position {position} is beyond the vocabulary of {vocab}")]
    TokenId { position: usize, id: i64, vocab: usize },
    /// A position that the rotary table lacks.
    #[error("position {position} is beyond the {positions} positions of the rotary table")]
    Position { position: usize, positions: usize },
    /// Parameters that contradict each other.
    #[error("{kernel}: {why}")]
    Invalid { kernel: &'static str, why: String },
    /// What this backend does not do.
    #[error("the {backend} backend does not serve {what}")]
    Unsupported { backend: &'static str, what: &'static str },
    /// A device that failed, or a kernel on it.
    #[error("{backend}: {what}")]
    Device { backend: &'static str, what: String },
    /// Memory that a device does not have.
    #[error(
        "{asked} bytes of device memory were asked for, {free} are free: a smaller --batch or --seq takes less, \
         --accumulate makes up for it, --checkpointing keeps fewer activations, and --memory-limit pages what does not \
         fit to the machine's memory"
    )]
    DeviceMemory { asked: usize, free: usize },
    /// Paged memory that could not be brought into place.
    #[error("{kernel}: '{tensor}': {what}")]
    Paging { kernel: &'static str, tensor: &'static str, what: String },
    /// Memory that could not be had.
    #[error("{bytes} bytes of memory could not be allocated")]
    OutOfMemory { bytes: usize },
}

impl Error {
    /// An [`Error::Paging`] of a kernel's tensor, for `map_err` of what a pager returns.
    pub fn paging<E: Display>(kernel: &'static str, tensor: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Paging { kernel, tensor, what: error.to_string() }
    }
}
