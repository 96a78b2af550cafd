//! `rankfold eval`: the loss and perplexity of data.

use crate::builtin::sources;
use crate::check::count;
use crate::error::{Error, Result};
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_trainer::data::{Data, Evaluation, tokens};
use rankfold_trainer::step::evaluate;
use std::path::PathBuf;

/// Measure the loss and perplexity of data.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// Text files or JSONL [default: the built-in text].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// safetensors with `ids` and `labels`, i64 [N, T], instead.
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    tokens: Option<PathBuf>,
    /// Tokens a row: the context that the model is given.
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Rows at a time: never changes a result.
    #[arg(long, default_value_t = 8)]
    batch: usize,
}

impl Eval {
    pub fn run(self) -> Result<()> {
        count("seq", Some(self.seq))?;
        count("batch", Some(self.batch))?;
        let folder = self.model.folder()?;
        let (model, _) = self.model.load(&folder)?;
        if let Some(path) = &self.tokens {
            let batch = tokens::read(path, folder.config.vocab)?;
            let (loss, targets) = finite(evaluate(&model, [batch], self.model.device.exact())?)?;
            say!("loss {loss:.6} nat a token over {targets} tokens, perplexity {:.4}", loss.exp())?;
            return Ok(());
        }
        let tokenizer = folder.tokenizer()?;
        let data = Data::read(&tokenizer, &sources(&self.data))?;
        let evaluation = Evaluation::new(data, self.seq, tokenizer.end_of_text())?;
        // What is learned to stand before a document stands before a row.
        let evaluation = if model.virtual_tokens().is_some() { evaluation.unpacked() } else { evaluation };
        let (loss, targets) = finite(evaluate(&model, evaluation.batches(self.batch), self.model.device.fast())?)?;
        let (tokens, characters) = evaluation.tokens_and_characters();
        let by_character = loss * tokens as f64 / characters.max(1) as f64;
        say!(
            "loss {loss:.6} nat a token ({by_character:.6} a character) over {targets} tokens, perplexity {:.4}",
            loss.exp()
        )?;
        Ok(())
    }
}

/// A loss that is a number, and its targets.
fn finite((loss, targets): (f64, usize)) -> Result<(f64, usize)> {
    match loss.is_finite() {
        true => Ok((loss, targets)),
        false => Err(Error::Usage(format!("the loss is {loss}: expected a finite number of this model on this data"))),
    }
}
