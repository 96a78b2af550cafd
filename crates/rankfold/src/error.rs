//! What the user is told.

use crate::show::printable;
use std::path::PathBuf;

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    #[error(transparent)]
    Trainer(#[from] rankfold_trainer::Error),
    #[error(transparent)]
    Adapters(#[from] rankfold_adapters::Error),
    #[error(transparent)]
    Audit(#[from] rankfold_audit::Error),
    #[error(transparent)]
    Autograd(#[from] rankfold_autograd::Error),
    #[error(transparent)]
    Kernel(#[from] rankfold_backend::Error),
    #[error(transparent)]
    Cuda(#[from] rankfold_cuda::Error),
    #[error(transparent)]
    Pager(#[from] rankfold_pager::Error),
    #[error(transparent)]
    Files(#[from] rankfold_files::Error),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {why}", path.display())]
    Path { path: PathBuf, why: String },
    #[error("{run}: {source}")]
    Run { run: String, source: Box<Self> },
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// An [`Error::Io`] of `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// What clap says of a command line, its paragraphs in one line, without the pointer to `--help`.
    pub fn usage(said: &clap::Error) -> Self {
        let said = said.to_string();
        let paragraphs = said.trim_start_matches("error: ").split("\n\n");
        let paragraphs = paragraphs.filter(|paragraph| !paragraph.starts_with("For more information"));
        Self::Usage(paragraphs.collect::<Vec<_>>().join("; "))
    }

    /// The message without line ends (libraries' own messages may have several) and other control characters (names
    /// from files may have any).
    pub fn one_line(&self) -> String {
        printable(&self.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
    }
}
