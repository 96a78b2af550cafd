//! Everything that can be wrong with a file that is read or written.

use rankfold_backend::DType;
use std::io;
use std::path::{Path, PathBuf};

/// The result of reading or writing.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, with which tensor of which file, and what was expected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// The operating system refused.
    #[error("{path}: cannot {doing}: {source}")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    /// A folder without a checkpoint.
    #[error("{path}: expected model.safetensors or model.safetensors.index.json in this folder")]
    NoCheckpoint { path: PathBuf },
    /// A file that is not what its name says.
    #[error("{path}: not a safetensors file: {why}")]
    Header { path: PathBuf, why: String },
    /// A file that ends before the data that its header describes.
    #[error("{path}: truncated: {found} bytes, expected {expected}")]
    Truncated { path: PathBuf, expected: u64, found: u64 },
    /// A tensor's description that contradicts itself or its neighbours.
    #[error("{path}: tensor '{tensor}': {why}")]
    Lying { path: PathBuf, tensor: String, why: String },
    /// A name given to two tensors.
    #[error("{path}: tensor '{tensor}' appears twice")]
    Duplicate { path: PathBuf, tensor: String },
    /// An element type that the safetensors format does not have.
    #[error("{path}: tensor '{tensor}' has the unknown dtype '{dtype}'")]
    UnknownDType { path: PathBuf, tensor: String, dtype: String },
    /// An element type that no kernel serves, in a tensor that was asked for.
    #[error("{path}: tensor '{tensor}' is {dtype}, expected F32, BF16, F16, F64, U8, U32 or I64")]
    UnservedDType { path: PathBuf, tensor: String, dtype: safetensors::Dtype },
    /// An index of shards that cannot be followed.
    #[error("{path}: not an index of shards: {why}")]
    Index { path: PathBuf, why: String },
    /// A shard without a tensor that the index places in it.
    #[error("{path}: lacks tensor '{tensor}', which {index} places in it")]
    ShardLacks { path: PathBuf, index: PathBuf, tensor: String },
    /// A tensor that the checkpoint does not have.
    #[error("{path}: no tensor '{tensor}'")]
    Missing { path: PathBuf, tensor: String },
    /// A tensor of another element type than expected.
    #[error("{path}: tensor '{tensor}' is {found}, expected {expected}")]
    DType { path: PathBuf, tensor: String, found: DType, expected: String },
    /// A tensor of another shape than expected.
    #[error("{path}: tensor '{tensor}' has shape {found:?}, expected {expected:?}")]
    Shape { path: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    /// A weight that is no number.
    #[error("{path}: tensor '{tensor}': element {index} is NaN or infinite, expected finite weights")]
    NotFinite { path: PathBuf, tensor: String, index: usize },
    /// Bytes beyond a tensor's end, or a destination of another length.
    #[error("{path}: tensor '{tensor}': bytes {offset}..{offset}+{len} were asked of {bytes}")]
    Range { path: PathBuf, tensor: String, offset: usize, len: usize, bytes: usize },
    /// A 4-bit weight whose parts disagree.
    #[error("{path}: 4-bit weight '{tensor}': {why}")]
    QuantState { path: PathBuf, tensor: String, why: String },
    /// What was given to a writer disagrees with what was declared.
    #[error("{path}: writing tensor '{tensor}': {why}")]
    Declared { path: PathBuf, tensor: String, why: String },
    /// A folder that would be replaced.
    #[error("{path}: exists already, expected a new path")]
    Exists { path: PathBuf },
    /// The backend refused a tensor.
    #[error("{path}: tensor '{tensor}': {source}")]
    Backend { path: PathBuf, tensor: String, source: rankfold_backend::Error },
}

impl Error {
    /// For `map_err`: an I/O error with the file it met and what was being done to it.
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.into(), doing, source }
    }

    /// For `map_err`: a backend's error with the tensor it concerns.
    pub(crate) fn backend(path: &Path, tensor: &str) -> impl FnOnce(rankfold_backend::Error) -> Self {
        move |source| Self::Backend { path: path.into(), tensor: tensor.into(), source }
    }
}
