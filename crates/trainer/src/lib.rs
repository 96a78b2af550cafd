//! The transformer trainer: models, data, optimiser, loop, checkpoints
//!
//! In reading order:
//! - [`data`]: everything from text to batches;
//! - [`error`]: everything that can be wrong with a run.
#![forbid(unsafe_code)]

pub mod data;
pub mod error;
pub mod model;
pub mod optimizer;
pub mod schedule;

pub use error::{Error, Result};
