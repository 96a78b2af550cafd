//! `rankfold dequantize`: a 4-bit checkpoint as the dense model that it stands for.

use crate::error::Result;
use crate::open::Folder;
use crate::show::{bytes, say};
use clap::Args;
use rankfold_cpu::CpuBackend;
use rankfold_trainer::convert;
use std::path::PathBuf;

/// Write a 4-bit checkpoint as a dense model.
#[derive(Debug, Args)]
pub struct Dequantize {
    /// The folder of a 4-bit checkpoint.
    #[arg(long, value_name = "DIR")]
    model: String,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl Dequantize {
    pub fn run(self) -> Result<()> {
        let folder = Folder::open(&self.model)?;
        let staged = super::stage(&self.out)?;
        let done = convert::dequantize(&CpuBackend::new(None), &folder.checkpoint, &folder.config, staged.path())?;
        super::copy_tokenizer(&folder, staged.path())?;
        staged.commit()?;
        let (before, after) = (bytes(done.before), bytes(done.after));
        say!("{} linear layers dequantised, {before} to {after}, in {}", done.layers, self.out.display())?;
        Ok(())
    }
}
