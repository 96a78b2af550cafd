//! `rankfold export`: the embedded model as a Hugging Face folder.

use crate::builtin;
use crate::error::Result;
use crate::open::BUILTIN;
use clap::Args;
use std::path::PathBuf;

/// Write the embedded model as a Hugging Face folder.
#[derive(Debug, Args)]
pub struct Export {
    /// The embedded model.
    #[arg(long, default_value = BUILTIN, value_parser = [BUILTIN])]
    model: String,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl Export {
    pub fn run(self) -> Result<()> {
        super::new_folder(&self.out)?;
        builtin::export(&self.out)?;
        println!("the {} model is in {}", self.model, self.out.display());
        Ok(())
    }
}
