//! How much memory a run will take.

use crate::error::{Error, Result};
use crate::options::Options;
use crate::show::bytes;
use rankfold_trainer::model::Model;

/// Bytes that a run will take, by what takes them.
pub struct Memory {
    weights: usize,
    training: usize,
    activations: usize,
}

impl Memory {
    /// Weights, adapters, gradients and moments are counted; activations are what the tape saves of each block, for
    /// the tokens of a micro-batch, and the head's chunk of logits.
    pub fn estimate(options: &Options, model: &Model, tokens: usize, trained: usize) -> Self {
        let c = &model.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        // Inputs and outputs of the norms, q k v before and after rotation, attention's output, gate, up, product.
        let saved = 6 * c.width + 3 * q + 3 * kv + 3 * c.feed_forward;
        let blocks = if options.checkpointing == Some(true) { 1 } else { c.layers };
        let kept = if options.checkpointing == Some(true) { c.layers * c.width } else { 0 };
        let logits = tokens.min((16 << 20) / (4 * c.vocab)).max(tokens.min(128)) * c.vocab;
        Self {
            weights: model.base_bytes(),
            // Value, gradient and two moments, f32 each.
            training: 16 * trained,
            activations: tokens.saturating_mul(4 * (blocks * saved + kept + 2 * c.width)).saturating_add(4 * logits),
        }
    }

    fn sum(&self) -> usize {
        [self.weights, self.training, self.activations].into_iter().fold(0, usize::saturating_add)
    }

    /// That the machine has as much, where the system tells.
    pub fn check(&self) -> Result<()> {
        match of_the_machine() {
            Some(total) if self.sum() as u64 > total => {
                let (sum, total) = (bytes(self.sum() as u64), bytes(total));
                let why = "expected a smaller --batch, --seq or --rank, or --checkpointing";
                Err(Error::Usage(format!("the run needs about {sum} of memory, this machine has {total}: {why}")))
            }
            _ => Ok(()),
        }
    }
}

/// The machine's memory in bytes, where the system tells.
pub fn of_the_machine() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [weights, training, activations, sum] =
            [self.weights, self.training, self.activations, self.sum()].map(|n| bytes(n as u64));
        write!(
            f,
            "weights {weights}, trained values with gradients and moments {training}, activations {activations}: about {sum} and the program itself"
        )
    }
}
