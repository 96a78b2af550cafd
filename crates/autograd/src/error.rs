//! What can be wrong with an operation on tensors.

use rankfold_backend::Shape;

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, in which operation, and what was expected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] rankfold_backend::Error),
    /// A tensor's shape does not fit the operation.
    #[error("{op}: '{tensor}' has shape {found}, expected {expected}")]
    Shape { op: &'static str, tensor: &'static str, expected: String, found: Shape },
    /// A function given to the tape refused for a reason of its own.
    #[error(transparent)]
    Function(Box<dyn std::error::Error + Send + Sync>),
    /// A parameter was updated while a tape still held its value.
    #[error("a parameter of shape {shape} is still held by a tape: drop the tape before the update")]
    Held { shape: Shape },
}
