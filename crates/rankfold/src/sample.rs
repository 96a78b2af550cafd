//! What the model writes before a run and after it.

use crate::error::Result;
use crate::open::Folder;
use crate::options::Options;
use rankfold_backend::Compute;
use rankfold_trainer::data::Tokenizer;
use rankfold_trainer::generate::{Sampling, generate};
use rankfold_trainer::model::Model;

/// A prompt for the samples before and after, where the model has a tokenizer and the default text.
pub struct Prompt<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
}

const PROMPT: &str = "The LORD is my ";

/// The prompt, where the model and the text are the built-in ones.
pub fn sample_prompt<'a>(folder: &Folder, tokenizer: Option<&'a Tokenizer>, options: &Options) -> Option<Prompt<'a>> {
    let tokenizer = tokenizer.filter(|_| folder.builtin && options.data.is_empty() && options.tokens.is_none())?;
    let ids = tokenizer.encode(PROMPT, true).ok()?;
    Some(Prompt { tokenizer, ids })
}

impl Prompt<'_> {
    /// The prompt and what the model makes of it.
    pub fn text(&self, model: &Model, compute: Compute) -> Result<String> {
        let sampling = Sampling { temperature: 0.7, top_p: 0.95, seed: 1 };
        let made = generate(model, &self.ids, 60, self.tokenizer.stops(), sampling, compute)?;
        let text = format!("{PROMPT}{}", self.tokenizer.decode(&made, false)?);
        Ok(text.lines().map(|line| format!("    {line}\n")).collect())
    }
}
