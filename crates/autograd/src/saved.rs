//! What an operation saves of an activation for its backward pass: the elements, as they were computed or rounded to
//! bf16, or how to make them again.
//!
//! An elementwise result of tensors that the tape keeps anyway costs a pass over them to make again, and its bytes for as
//! long as forward and backward take to keep. Made just before the backward pass that reads the same tensors, it finds
//! them in the cache, or leaves them there. The kernel is the same, and so are the bits.
//!
//! In bf16 an activation takes half the bytes, and every element is off by 2⁻⁸ of itself at the most. Forward reads
//! the activation itself, so that a step's loss is the exact one; backward reads the rounded one, in f32 for as long as
//! its operation takes. One that several operations save is rounded and kept once. What is held whether it is saved or
//! not, a parameter, is kept as it is, and so are the statistics of a row, which are few.

use crate::{Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer, DType, Shape};
use std::cell::RefCell;
use std::ptr;
use std::sync::{Arc, Weak};

/// What a tape keeps activations in between forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SavedAs {
    /// What they were computed in.
    #[default]
    Computed,
    /// Those of f32 rounded to bf16.
    Bf16,
}

/// Makes a tensor's elements from others that the tape keeps.
pub(crate) trait Recipe: Send + Sync {
    /// The elements, as they were, but for what is rounded of those that they are made from.
    fn make(&self, backend: &dyn Backend) -> Result<Buffer>;
}

/// An activation, for backward.
pub(crate) struct Saved {
    shape: Shape,
    variable: Option<Variable>,
    elements: Elements,
}

enum Elements {
    Kept(Arc<Buffer>),
    Rounded(Arc<Buffer>),
    Made(Arc<dyn Recipe>),
}

impl Saved {
    /// The variable that it is, if any.
    pub(crate) fn variable(&self) -> Option<Variable> {
        self.variable
    }

    /// The activation.
    pub(crate) fn get(&self, backend: &dyn Backend) -> Result<Tensor> {
        let buffer = match &self.elements {
            Elements::Kept(buffer) => buffer.clone(),
            Elements::Rounded(rounded) => {
                let mut buffer = backend.alloc(DType::F32, rounded.len())?;
                backend.cast(rounded.view(), buffer.view_mut())?;
                Arc::new(buffer)
            }
            Elements::Made(recipe) => Arc::new(recipe.make(backend)?),
        };
        Ok(Tensor::variable_of(buffer, self.shape.clone(), self.variable))
    }
}

/// Which activations that still exist are kept rounded, and where.
#[derive(Default)]
pub(crate) struct Roundings(RefCell<Vec<(Weak<Buffer>, Weak<Buffer>)>>);

impl Roundings {
    fn of(&self, activation: &Arc<Buffer>, backend: &dyn Backend) -> Result<Arc<Buffer>> {
        let mut known = self.0.borrow_mut();
        // What is gone is not saved again, and its address may be another's once it is forgotten.
        known.retain(|(known, _)| known.strong_count() > 0);
        let found = known.iter().find(|(known, _)| ptr::eq(known.as_ptr(), Arc::as_ptr(activation)));
        if let Some(rounded) = found.and_then(|(_, rounded)| rounded.upgrade()) {
            return Ok(rounded);
        }
        let mut rounded = backend.alloc(DType::Bf16, activation.len())?;
        backend.cast(activation.view(), rounded.view_mut())?;
        let rounded = Arc::new(rounded);
        known.push((Arc::downgrade(activation), Arc::downgrade(&rounded)));
        Ok(rounded)
    }
}

impl Tape {
    /// Save an activation: its recipe where it has one, else its elements.
    pub(crate) fn save(&self, tensor: &Tensor) -> Result<Saved> {
        let is_held = matches!(tensor.variable(), Some(Variable::Parameter(_)));
        let elements = match (tensor.recipe(), self.saved_as) {
            (Some(recipe), _) => Elements::Made(recipe),
            (None, SavedAs::Bf16) if tensor.dtype() == DType::F32 && !is_held => {
                Elements::Rounded(self.roundings.of(tensor.buffer(), self.backend().as_ref())?)
            }
            _ => Elements::Kept(tensor.buffer().clone()),
        };
        Ok(Saved { shape: tensor.shape().clone(), variable: tensor.variable(), elements })
    }
}
