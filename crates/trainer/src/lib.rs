//! The transformer trainer.
//!
//! In reading order:
//! - [`data`]: everything from text to batches;
//! - [`model`]: the Llama family, from a Hugging Face folder;
//! - [`optimizer`], [`schedule`]: AdamW and its rate;
//! - [`objective`]: what a method adds to the tokens' loss;
//! - [`step`]: one optimiser step, and a held-out evaluation;
//! - [`run`]: steps, evaluations and checkpoints to the end; [`metrics`], [`checkpoint`], [`product`] are its files;
//!   [`traffic`], what it pages;
//! - [`plan`]: what memory a run will take, counted before it;
//! - [`generate`]: text from a model;
//! - [`initialize`], [`convert`], [`merge`]: new models, and models quantised, dequantised, merged;
//! - [`error`]: everything that can be wrong.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod convert;
pub mod data;
pub mod error;
pub mod generate;
pub mod initialize;
pub mod merge;
pub mod metrics;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod plan;
pub mod product;
pub mod run;
pub mod schedule;
pub mod step;
pub mod traffic;

pub use error::{Error, Result};
