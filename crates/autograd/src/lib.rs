//! Reverse-mode differentiation, small enough to read in one sitting.
//!
//! A [`Tensor`] is a buffer with a shape and, where a gradient will be wanted, the variable it is. A [`Tape`] runs
//! operations on tensors and remembers each as an [`Op`]: what its backward pass needs and nothing else.
//! [`Tape::backward`] walks the operations in reverse; each consumes itself, so saved tensors are freed as the walk
//! goes. Gradients of intermediate tensors live until their producer has consumed them; those of [`Parameter`]s
//! gather in [`Gradients`], over as many tapes as a step has micro-batches.
//!
//! Read `tensor.rs`, then `tape.rs` and `saved.rs`, then any file of `ops/`: formula, forward, derivation, backward, in that order.
//! [`gradcheck`] compares every one of them with finite differences in f64.
#![forbid(unsafe_code)]

mod error;
pub mod gradcheck;
mod gradients;
mod ops;
mod saved;
mod tape;
mod tensor;

pub use error::{Error, Result};
pub use gradients::Gradients;
pub use ops::{AttentionShape, LinearAdapter};
pub use saved::SavedAs;
pub use tape::{Op, Tape};
pub use tensor::{Base, Parameter, ParameterId, Tensor, Value, Variable};
