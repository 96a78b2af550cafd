//! `rankfold merge`: a model with an adapter folded in.

use crate::device::DeviceArgs;
use crate::error::Result;
use crate::open::{BUILTIN, Folder};
use clap::Args;
use rankfold_trainer::convert;
use rankfold_trainer::model::Precision;
use std::path::PathBuf;

/// Write a model with an adapter folded into its weights; 4-bit weights become dense.
#[derive(Debug, Args)]
pub struct Merge {
    /// `builtin`, or the folder of a Hugging Face model.
    #[arg(long, default_value = BUILTIN)]
    model: String,
    /// The PEFT adapter.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Merge {
    pub fn run(self) -> Result<()> {
        let folder = Folder::open(&self.model)?;
        let model = folder.load_with(self.device.open()?, Precision::AsStored, Some(&self.adapter))?;
        super::new_folder(&self.out)?;
        let done = convert::merge(&model, &folder.checkpoint, &self.out)?;
        super::copy_tokenizer(&folder, &self.out)?;
        println!("{} linear layers merged, the model is in {}", done.layers, self.out.display());
        Ok(())
    }
}
