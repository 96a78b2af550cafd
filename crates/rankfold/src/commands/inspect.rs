//! `rankfold inspect`: what a file or folder holds.

use crate::error::{Error, Result};
use crate::show::{bytes, count, printable, say};
use clap::Args;
use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{Form, LoraSpec, PeftConfig, Relative};
use rankfold_files::{Checkpoint, quantized};
use rankfold_trainer::model::ModelConfig;
use std::path::PathBuf;

/// Show the tensors of a safetensors file, a model's folder or an adapter's.
#[derive(Debug, Args)]
pub struct Inspect {
    /// A safetensors file, or a folder that holds one.
    #[arg(value_name = "FILE|DIR")]
    path: PathBuf,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let adapter = self.path.join("adapter_model.safetensors");
        let checkpoint = Checkpoint::open(if adapter.exists() { &adapter } else { &self.path })?;
        if adapter.exists() {
            say!("{}", what(&PeftConfig::open(&self.path)?))?;
        } else if self.path.join("config.json").exists() {
            let c = ModelConfig::open(&self.path)?;
            say!(
                "{}: {} layers, {} wide, {} heads ({} for keys), head_dim {}, feed-forward {}, vocabulary {}, {} parameters",
                c.architecture.model_type(),
                c.layers,
                c.width,
                c.heads,
                c.kv_heads,
                c.head_dim,
                c.feed_forward,
                c.vocab,
                count(c.parameters()),
            )?;
        }
        let quantised = quantized::weights(&checkpoint);
        let (mut tensors, mut total) = (0, 0);
        for name in checkpoint.names() {
            let info = checkpoint.info(name)?;
            let dtype = info.dtype().map_or_else(|| format!("{:?}", info.stored), |dtype| dtype.to_string());
            let note = match quantized::state(&checkpoint, name) {
                Ok(Some(state)) if quantised.contains(&name) => {
                    let double = if state.offset.is_some() { ", double" } else { "" };
                    format!("  ← {} {:?}, block {}{double}", state.format, state.shape, state.block)
                }
                Ok(_) => String::new(),
                Err(error) => return Err(Error::Files(error)),
            };
            say!("{dtype:>5} {:>20}  {}{note}", format!("{:?}", info.shape), printable(name))?;
            tensors += 1;
            total += info.bytes as u64;
        }
        say!("{tensors} tensors, {}, in {}", bytes(total), self.path.display())?;
        Ok(())
    }
}

/// An adapter in one line.
fn what(config: &PeftConfig) -> String {
    match config {
        PeftConfig::Lora(config) => {
            let LoraSpec { rank, alpha, rslora, dropout, form } = config.spec;
            let kind = match (form, rslora) {
                (Form::AdaLora, _) => "AdaLoRA",
                (Form::Dora, _) => "DoRA",
                (Form::Plain, true) => "rsLoRA",
                (Form::Plain, false) => "LoRA",
            };
            format!("a PEFT adapter: {kind}, rank {rank}, alpha {alpha}, dropout {dropout}")
        }
        PeftConfig::Relative(config) => match &config.method {
            Relative::Ia3 { .. } => "a PEFT adapter: (IA)³".into(),
            Relative::BitFit => "an adapter: BitFit".into(),
            Relative::Bottleneck { placement, bottleneck } => {
                format!("an adapter: {} bottlenecks of {bottleneck}", placement.name())
            }
            Relative::Diff { penalty } => format!("an adapter: diff pruning, penalty {penalty}"),
        },
        PeftConfig::Virtual(config) => {
            let kind = if config.kind == Kind::Prompt { "prompt" } else { "prefix" };
            format!("a PEFT adapter: {kind} tuning, {} learned tokens", config.tokens)
        }
    }
}
