//! The commands, one a file.

pub mod audit;
pub mod dequantize;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod grads;
pub mod inspect;
pub mod logits;
pub mod merge;
pub mod new;
pub mod plan;
pub mod quantize;
pub mod study;
pub mod train;

use crate::error::{Error, Result};
use crate::open::Folder;
use rankfold_files::StagedFolder;
use std::io::ErrorKind;
use std::path::Path;

/// A folder to write into, which gets its name when all of it is there; one that holds anything already is an error.
fn stage(path: &Path) -> Result<StagedFolder> {
    // An empty one gives way.
    match std::fs::remove_dir(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(Error::Path { path: path.to_owned(), why: format!("expected a new or empty folder for --out: {e}") })
        }
        _ => Ok(StagedFolder::create(path)?),
    }
}

/// That a file can be written where the path of `flag` says: its folder exists.
fn parent_exists(flag: &str, path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            Err(Error::Path { path: parent.to_owned(), why: format!("no such folder, for {flag}") })
        }
        _ => Ok(()),
    }
}

/// The tokenizer's files along with a model's, where it has any.
fn copy_tokenizer(folder: &Folder, out: &Path) -> Result<()> {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        if let Some(bytes) = folder.file(name)? {
            rankfold_files::write_atomically(&out.join(name), &bytes)?;
        }
    }
    Ok(())
}
