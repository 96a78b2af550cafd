//! `rankfold generate`: text from a prompt.

use crate::error::{Error, Result};
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_trainer::generate::{Sampling, generate};

/// Continue a prompt.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// Tokens to write at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new: usize,
    /// Logits are divided by it; 0 takes the likeliest token.
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    temperature: f64,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, value_name = "X", default_value_t = 0.95)]
    top_p: f64,
    /// The same seed writes the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl Generate {
    pub fn run(self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Usage(format!("--temperature {}: expected 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Usage(format!("--top-p {}: expected above 0 and at most 1", self.top_p)));
        }
        let folder = self.model.folder()?;
        let tokenizer = folder.tokenizer()?;
        let (model, _) = self.model.load(&folder)?;
        let mut prompt = tokenizer.encode(&self.prompt, true)?;
        if prompt.is_empty() {
            prompt.push(tokenizer.end_of_text());
        }
        let sampling = Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed };
        let compute = self.model.device.fast();
        let made = generate(&model, &prompt, self.max_new, tokenizer.stops(), sampling, compute)?;
        say!("{}{}", self.prompt, tokenizer.decode(&made, false)?)?;
        Ok(())
    }
}
