//! `rankfold merge`: a model with an adapter folded in.

use crate::error::Result;
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_trainer::convert;
use std::path::PathBuf;

/// Write a model with an adapter folded into its weights; 4-bit weights become the dense values that they stand for.
#[derive(Debug, Args)]
pub struct Merge {
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl Merge {
    pub fn run(self) -> Result<()> {
        self.model.needs_adapter()?;
        let folder = self.model.folder()?;
        let model = self.model.load(&folder)?;
        let staged = super::stage(&self.out)?;
        let done = convert::merge(&model, &folder.checkpoint, staged.path())?;
        super::copy_tokenizer(&folder, staged.path())?;
        staged.commit()?;
        say!("{} linear layers merged, the model is in {}", done.layers, self.out.display())?;
        Ok(())
    }
}
