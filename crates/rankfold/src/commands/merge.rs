//! `rankfold merge`: a model with adapters folded in.

use crate::check::count;
use crate::error::{Error, Result};
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_adapters::algebra::{config_of, of_rank, weighted_sum};
use rankfold_adapters::{AdapterConfig, PeftConfig, Purpose, write_folder};
use rankfold_trainer::merge::{Requantised, merge, merge_in_4_bits};
use rankfold_trainer::model::Model;
use std::path::PathBuf;

/// Write a model with adapters folded into its weights; 4-bit weights become the dense values that they stand for.
#[derive(Debug, Args)]
pub struct Merge {
    #[command(flatten)]
    model: ModelArgs,
    /// Quantise the merged layers again, as they were, and say what error that adds.
    #[arg(long)]
    requantize: bool,
    /// Write the sum of the adapters as one PEFT adapter, and no model.
    #[arg(long, conflicts_with = "requantize")]
    as_adapter: bool,
    /// The rank of that adapter: the nearest of that rank, by singular values [default: the sum of the ranks].
    #[arg(long, value_name = "N", requires = "as_adapter")]
    rank: Option<usize>,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl Merge {
    pub fn run(self) -> Result<()> {
        self.model.needs_adapter()?;
        count("rank", self.rank)?;
        let folder = self.model.folder()?;
        let (mut model, config) = self.model.load(&folder)?;
        if self.as_adapter {
            // Of several the sum is updates alone.
            let is_alone = |config: &PeftConfig| config.lora().is_some() && config.check_alone().is_ok();
            if !config.as_ref().is_none_or(is_alone) {
                let why = "expected LoRA or AdaLoRA that leave the base as it is";
                return Err(Error::Usage(format!("--as-adapter: {why}")));
            }
            return self.write_adapter(&mut model);
        }
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
        say!("{done} linear layers merged, the model is in {}", self.out.display())?;
        Ok(())
    }
}

impl Merge {
    /// Plain updates of what is on the layers, of `rank` where one is asked for.
    fn write_adapter(&self, model: &mut Model) -> Result<()> {
        let backend = model.backend().clone();
        for layer in model.linears_mut() {
            let Some(lora) = layer.adapter() else { continue };
            let plain = match self.rank {
                Some(rank) => of_rank(backend.as_ref(), layer.path(), lora, rank)?,
                None => weighted_sum(backend.as_ref(), layer.path(), &[(1.0, lora)])?,
            };
            layer.set_adapter(plain)?;
        }
        let base_model = Some(self.model.model.clone());
        let config = AdapterConfig { base_model, ..config_of(model.linears()) };
        let staged = super::stage(&self.out)?;
        let (modules, purpose) = (Vec::new(), Purpose::Exchange);
        write_folder(backend.as_ref(), staged.path(), &config, model.linears(), modules, purpose)?;
        staged.commit()?;
        say!("the adapter is in {}", self.out.display())
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
