//! `rankfold new`: a model to be pretrained: its tokenizer trained, its weights drawn.

use crate::error::{Error, Result};
use crate::show::{count, say};
use clap::Args;
use rankfold_trainer::data::{Source, Tokenizer};
use rankfold_trainer::initialize::initialize;
use std::path::PathBuf;

/// Make a new model: train its tokenizer on a text and draw its weights.
#[derive(Debug, Args)]
pub struct New {
    /// A Hugging Face `config.json`, whose vocab_size is replaced by the tokenizer's.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Tokens of the byte-level BPE to train.
    #[arg(long, value_name = "N")]
    vocab: usize,
    /// The text to train the tokenizer on.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Of the weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
}

impl New {
    pub fn run(self) -> Result<()> {
        let text = std::fs::read_to_string(&self.config).map_err(Error::io(&self.config))?;
        let mut corpus = String::new();
        for path in &self.data {
            corpus.push_str(&Source::File(path.clone()).plain_text()?);
        }
        if corpus.is_empty() {
            return Err(Error::Usage(
                "--data: no text in any of the files, expected some to train the tokenizer on".into(),
            ));
        }
        let tokenizer = Tokenizer::train_bpe(&corpus, self.vocab)?;
        let staged = super::stage(&self.out)?;
        let parameters = initialize(&text, &self.config, &tokenizer, self.seed, staged.path())?;
        staged.commit()?;
        let vocab = tokenizer.vocab_size();
        say!("a model of {} parameters and {vocab} tokens is in {}", count(parameters), self.out.display())?;
        Ok(())
    }
}
