//! `rankfold export`: the embedded model as a Hugging Face folder.

use crate::builtin;
use crate::error::Result;
use crate::open::BUILTIN;
use crate::show::say;
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
        let staged = super::stage(&self.out)?;
        builtin::export(staged.path())?;
        staged.commit()?;
        say!("the {} model is in {}", self.model, self.out.display())?;
        Ok(())
    }
}
