//! What an operation saves of an input for its backward pass: the elements, or how to make them again.
//!
//! An elementwise result of tensors that the tape keeps anyway costs a pass over them to make again, and its bytes for as
//! long as forward and backward take to keep. Made just before the backward pass that reads the same tensors, it finds
//! them in the cache, or leaves them there. The kernel is the same, and so are the bits.

use crate::{Result, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

/// Makes a tensor's elements from others that the tape keeps.
pub(crate) trait Recipe: Send + Sync {
    /// The elements, as they were.
    fn make(&self, backend: &dyn Backend) -> Result<Buffer>;
}

/// An input's elements, for backward.
pub(crate) enum Saved {
    Kept(Arc<Buffer>),
    Made(Arc<dyn Recipe>),
}

impl Saved {
    /// The tensor's recipe where it has one, else its elements.
    pub(crate) fn of(tensor: &Tensor) -> Self {
        tensor.recipe().map_or_else(|| Self::Kept(tensor.buffer().clone()), Self::Made)
    }

    /// The elements.
    pub(crate) fn get(self, backend: &dyn Backend) -> Result<Arc<Buffer>> {
        match self {
            Self::Kept(buffer) => Ok(buffer),
            Self::Made(recipe) => recipe.make(backend).map(Arc::new),
        }
    }
}
