//! From text to batches.
//!
//! In reading order:
//! - [`bpe`]: a byte-level BPE vocabulary from a text;
//! - [`tokenizer`]: text to token ids and back, and what a model folder says beside its `tokenizer.json`;
//! - [`template`], [`chat`]: conversations to token ids, with the assistant's turns marked;
//! - [`examples`]: files to examples, and the held-out part;
//! - [`packing`]: examples to rows of one length, and rows to a [`Batch`];
//! - [`loader`]: which rows each step sees, as a pure function of the seed and the step;
//! - [`tokens`]: one batch of given token ids, for comparing runs with another program's.

pub mod bpe;
pub mod chat;
pub mod examples;
pub mod loader;
pub mod packing;
pub mod template;
pub mod tokenizer;
pub mod tokens;

pub use examples::{Data, Example, Source};
pub use loader::{Evaluation, Loader, Shape};
pub use packing::Batch;
pub use tokenizer::Tokenizer;
