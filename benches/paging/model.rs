//! A whole training step of a small Llama, all of it trained: everything that a run pages, as it pages it.

use crate::llama;
use crate::work::{Failure, Step};
use rankfold_backend::{Backend, Compute};
use rankfold_trainer::model::Precision;
use rankfold_trainer::optimizer::Moments;
use std::sync::Arc;

/// Its steps on one batch of so many rows of so many tokens.
pub fn make(backend: Arc<dyn Backend>, dimensions: [usize; 6], batch: [usize; 2]) -> Result<Step, Failure> {
    let model = llama::random(backend, dimensions, Precision::Trained)?;
    llama::training(model, Moments::F32, llama::recipe(Compute::F32), batch)
}
