//! `rankfold dequantize`: a 4-bit checkpoint as the dense model that it stands for.

use crate::error::Result;
use crate::open::Folder;
use crate::show::bytes;
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
        super::new_folder(&self.out)?;
        let done = convert::dequantize(&CpuBackend::new(None), &folder.checkpoint, &folder.config, &self.out)?;
        super::copy_tokenizer(&folder, &self.out)?;
        let (before, after) = (bytes(done.before), bytes(done.after));
        println!("{} linear layers dequantised, {before} to {after}, in {}", done.layers, self.out.display());
        Ok(())
    }
}
