//! `rankfold quantize`: a model's linear layers in 4 bits, in bitsandbytes' layout.

use crate::choices::Quantize as Format;
use crate::error::Result;
use crate::open::{BUILTIN, Folder};
use crate::show::{bytes, say};
use clap::Args;
use rankfold_cpu::CpuBackend;
use rankfold_trainer::convert;
use rankfold_trainer::model::Quantization;
use std::path::PathBuf;

/// Write a model with its linear layers in 4 bits: in nf4 or fp4 a checkpoint that transformers and bitsandbytes load.
#[derive(Debug, Args)]
pub struct Quantize {
    /// `builtin`, or the folder of a Hugging Face model.
    #[arg(long, default_value = BUILTIN)]
    model: String,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
    /// The 4-bit format; int4 is Rankfold's own: transformers and bitsandbytes load nf4 and fp4 alone.
    #[arg(long, value_enum, default_value = "nf4")]
    format: Format,
    /// Weights that share a scale: a power of two from 32 to 4096.
    #[arg(long, value_name = "N", default_value_t = 64)]
    block: usize,
    /// Quantise the scales too.
    #[arg(long)]
    double_quant: bool,
}

impl Quantize {
    pub fn run(self) -> Result<()> {
        let how = Quantization { format: self.format.format()?, block: self.block, double: self.double_quant };
        how.check()?;
        let folder = Folder::open(&self.model)?;
        let staged = super::stage(&self.out)?;
        let backend = CpuBackend::new(None);
        let done = convert::quantize(&backend, &folder.checkpoint, &folder.config, how, staged.path())?;
        super::copy_tokenizer(&folder, staged.path())?;
        staged.commit()?;
        let (before, after) = (bytes(done.before), bytes(done.after));
        say!("{} linear layers in {}, {before} to {after}, in {}", done.layers, how.format, self.out.display())?;
        Ok(())
    }
}
