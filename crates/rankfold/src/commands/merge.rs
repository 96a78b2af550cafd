//! `rankfold merge`: a model with adapters folded in.

use crate::error::Result;
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_trainer::merge::{Requantised, merge, merge_in_4_bits};
use std::path::PathBuf;

/// Write a model with adapters folded into its weights; 4-bit weights become the dense values that they stand for.
#[derive(Debug, Args)]
pub struct Merge {
    #[command(flatten)]
    model: ModelArgs,
    /// Quantise the merged layers again, as they were, and say what error that adds.
    #[arg(long)]
    requantize: bool,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl Merge {
    pub fn run(self) -> Result<()> {
        self.model.needs_adapter()?;
        let folder = self.model.folder()?;
        let (model, _) = self.model.load(&folder)?;
        let staged = super::stage(&self.out)?;
        let done = match self.requantize {
            false => merge(&model, &folder.checkpoint, staged.path())?,
            true => {
                let (done, errors) = merge_in_4_bits(&model, &folder.checkpoint, staged.path())?;
                describe(&errors);
                done
            }
        };
        super::copy_tokenizer(&folder, staged.path())?;
        staged.commit()?;
        say!("{} linear layers merged, the model is in {}", done.layers, self.out.display())?;
        Ok(())
    }
}

/// The mean error and the worst layer's.
fn describe(errors: &[Requantised]) {
    let mean = errors.iter().map(|layer| layer.error).sum::<f64>() / errors.len().max(1) as f64;
    let Some(worst) = errors.iter().max_by(|a, b| a.error.total_cmp(&b.error)) else { return };
    let most = errors.iter().map(|layer| layer.of_update).fold(0.0, f64::max);
    eprintln!(
        "quantising again moves a merged weight by {:.2} % of its norm on average, {:.2} % at the most ({}); that is up \
         to {most:.2} times what the adapter changed",
        100.0 * mean,
        100.0 * worst.error,
        worst.path
    );
}
