//! Everything that can be wrong with a run.

use std::path::{Path, PathBuf};

/// The result of the trainer's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, where, and what was expected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A file that cannot be opened, read or written.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// A file that is not what its name or its place says.
    #[error("{path}: {why}")]
    File { path: PathBuf, why: String },
    /// Text that is not UTF-8.
    #[error("{path}: the byte at offset {offset} is not UTF-8: expected text in UTF-8")]
    Utf8 { path: PathBuf, offset: u64 },
    /// A line of a JSONL file.
    #[error("{path}:{line}: {why}")]
    Line { path: PathBuf, line: usize, why: String },
    /// Data that hold nothing to train on.
    #[error("{path}: no examples: expected at least one")]
    NoExamples { path: PathBuf },
    /// Examples of which nothing can be trained within the sequence length.
    #[error("none of {examples} examples has a trained token within the first {seq} tokens: expected a longer --seq")]
    NoTargets { examples: usize, seq: usize },
    /// The tokenizer refused a text or an id.
    #[error("tokenizer: {why}")]
    Tokenizer { why: String },
    /// A chat template that does not compile, does not render, or cannot be masked.
    #[error("chat template: {why}")]
    ChatTemplate { why: String },
    /// A token id that the model lacks.
    #[error("{path}: row {row}, position {position}: token id {id} is beyond the vocabulary of {vocab}")]
    TokenId { path: PathBuf, row: usize, position: usize, id: i64, vocab: usize },
    /// A safetensors file that cannot be read or written.
    #[error(transparent)]
    Files(#[from] rankfold_files::Error),
    /// An adapter that cannot be attached, read or written.
    #[error(transparent)]
    Adapters(#[from] rankfold_adapters::Error),
    /// An operation on tensors refused.
    #[error(transparent)]
    Autograd(#[from] rankfold_autograd::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] rankfold_backend::Error),
    /// A loss or gradient that is no number.
    #[error(
        "step {step}: the {what} is {value}, expected a finite number; a checkpoint, where there is one, is of weights whose loss was finite"
    )]
    NotFinite { step: usize, what: &'static str, value: f64 },
    /// A memory limit that no paging can keep.
    #[error(
        "a memory limit of {}: expected at least {}, which {needs} needs",
        mib(*limit, f64::floor),
        mib(*least, f64::ceil)
    )]
    MemoryLimit { limit: u64, least: u64, needs: String },
    /// A memory limit that leaves no room for the run beside what the process takes already.
    #[error(
        "a memory limit of {}: before the run begins the process takes {} already, for its data above all: expected at \
         least {}, which {needs} needs beside it",
        mib(*limit, f64::floor),
        mib(*taken, f64::ceil),
        mib(*least, f64::ceil)
    )]
    MemoryTaken { limit: u64, taken: u64, least: u64, needs: String },
    /// A setting outside its range.
    #[error("{setting} {found}: expected {expected}")]
    Setting { setting: &'static str, found: String, expected: &'static str },
}

/// To a tenth of a MiB, rounded so that what is said to be enough is.
fn mib(bytes: u64, round: fn(f64) -> f64) -> String {
    format!("{} MiB", round(bytes as f64 / (1u64 << 20) as f64 * 10.0) / 10.0)
}

impl Error {
    /// The same error as a function on a tape returns it.
    pub(crate) fn into_autograd(self) -> rankfold_autograd::Error {
        match self {
            Self::Autograd(error) => error,
            other => rankfold_autograd::Error::Function(Box::new(other)),
        }
    }

    /// An [`Error::Io`] of `path`, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// An [`Error::File`] of `path`.
    pub(crate) fn file(path: &Path, why: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), why: why.into() }
    }
}
