//! `rankfold logits`: a model's logits for given token ids, to compare with another program's.

use crate::error::Result;
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_backend::DType;
use rankfold_files::{Spec, Writer};
use rankfold_trainer::data::tokens;
use rankfold_trainer::step::evaluate;
use std::path::PathBuf;

/// Write the logits [N, T, V] (f32) and the loss of given token ids.
#[derive(Debug, Args)]
pub struct Logits {
    #[command(flatten)]
    model: ModelArgs,
    /// safetensors with `ids` and `labels`, i64 [N, T], −100 ignored.
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// The safetensors file to write: `logits`, `loss`.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Logits {
    pub fn run(self) -> Result<()> {
        super::parent_exists("--out", &self.out)?;
        let folder = self.model.folder()?;
        let batch = tokens::read(&self.tokens, folder.config.vocab)?;
        let (model, _) = self.model.load(&folder)?;
        let (backend, compute) = (model.backend().clone(), self.model.device.exact());
        let logits = model.logits(&model.batch(&batch)?, compute)?;
        let (loss, _) = evaluate(&model, [batch.clone()], compute)?;

        let shape = [batch.rows, batch.seq, folder.config.vocab];
        let specs = vec![Spec::new("logits", DType::F32, shape), Spec::new("loss", DType::F32, [1])];
        let mut writer = Writer::create(&self.out, specs)?;
        writer.write_view("logits", backend.as_ref(), logits.view())?;
        writer.write("loss", &(loss as f32).to_le_bytes())?;
        writer.finish()?;
        say!("loss {loss:.6}; logits {shape:?} are in {}", self.out.display())?;
        Ok(())
    }
}
