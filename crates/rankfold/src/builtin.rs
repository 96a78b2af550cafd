//! The embedded base model and text: what `rankfold train` runs on when it is given nothing.
//!
//! `assets/README.md` holds the commands that made the model.

use crate::error::{Error, Result};
use rankfold_trainer::data::Source;
use std::path::{Path, PathBuf};

/// The model's `config.json`.
pub const CONFIG: &str = include_str!("../assets/base/config.json");

/// Its `tokenizer.json`.
pub const TOKENIZER: &str = include_str!("../assets/base/tokenizer.json");

/// Its `tokenizer_config.json`.
pub const TOKENIZER_CONFIG: &str = include_str!("../assets/base/tokenizer_config.json");

/// Its weights.
pub const MODEL: &[u8] = include_bytes!("../assets/base/model.safetensors");

const FILES: [(&str, &[u8]); 4] = [
    ("config.json", CONFIG.as_bytes()),
    ("model.safetensors", MODEL),
    ("tokenizer.json", TOKENIZER.as_bytes()),
    ("tokenizer_config.json", TOKENIZER_CONFIG.as_bytes()),
];

/// The text to finetune on: Psalms to Song of Solomon in the King James version, public domain.
pub const TEXT: &str = include_str!("../assets/poetry.txt");

/// Its name in messages.
pub const TEXT_NAME: &str = "built-in text";

/// One of the files of the model's Hugging Face folder, where that has it.
pub fn file(name: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(of, _)| *of == name).map(|(_, bytes)| *bytes)
}

/// Write the model's Hugging Face folder.
pub fn export(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (name, bytes) in FILES {
        rankfold_files::write_atomically(&folder.join(name), bytes)?;
    }
    Ok(())
}

/// The files named, or the built-in text.
pub fn sources(data: &[PathBuf]) -> Vec<Source<'static>> {
    if data.is_empty() {
        return vec![Source::Text { name: TEXT_NAME, text: TEXT }];
    }
    data.iter().cloned().map(Source::File).collect()
}
