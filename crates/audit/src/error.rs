//! Everything that can be wrong with an audit.

use std::path::PathBuf;

/// The result of an audit.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, with which tensor of which file, and what was expected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A file that cannot be read.
    #[error(transparent)]
    Files(#[from] rankfold_files::Error),
    /// A kernel that refused a tensor.
    #[error("{path}: tensor '{tensor}': {source}")]
    Kernel { path: PathBuf, tensor: String, source: rankfold_backend::Error },
    /// Nothing to compare with: the original weights are gone.
    #[error(
        "{path}: '{tensor}' is in 4 bits already: an audit compares with the weights as they were before, \
             expected the unquantised model"
    )]
    FourBit { path: PathBuf, tensor: String },
    /// A weight that no format can hold.
    #[error(
        "{path}: tensor '{tensor}': element {index} (row {row}, column {column}) is {value}: \
             only finite weights can be quantised"
    )]
    NonFinite { path: PathBuf, tensor: String, index: usize, row: usize, column: usize, value: f32 },
    /// A checkpoint without a weight to quantise.
    #[error("{path}: nothing to audit: expected {expected}")]
    Nothing { path: PathBuf, expected: &'static str },
    /// Options that name nothing, or a block that the formats do not have.
    #[error("{0}")]
    Options(String),
}
