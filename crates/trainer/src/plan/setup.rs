//! What a run is, as far as its memory is concerned.

use crate::model::{ModelConfig, Precision, Quantization};
use crate::optimizer::Moments;
use crate::{Error, Result};
use rankfold_adapters::PeftConfig;
use rankfold_autograd::SavedAs;
use rankfold_backend::{Compute, DType, Format};
use std::path::Path;

/// Far beyond any micro-batch, and few enough to count chunk by chunk.
const MOST_TOKENS: usize = 1 << 26;
/// Weights that share a scale in a 4-bit checkpoint, whose `config.json` does not say: bitsandbytes has no other.
const STORED_BLOCK: usize = 64;

/// The element types of a checkpoint's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Of dense tensors.
    pub dense: DType,
    /// Of the linear layers but the head, where these are in 4 bits.
    pub four_bits: Option<Quantization>,
}

impl Stored {
    /// As `config.json` at `path` has them: `dtype` or `torch_dtype` (f32 where neither is given, as in transformers),
    /// and bitsandbytes' `quantization_config`.
    pub fn of(config: &ModelConfig, path: &Path) -> Result<Self> {
        let (raw, wrong) = (&config.raw, |why: String| Err(Error::file(path, why)));
        let dense = match raw["dtype"].as_str().or_else(|| raw["torch_dtype"].as_str()) {
            Some("bfloat16") => DType::Bf16,
            Some("float16") => DType::F16,
            None | Some("float32") => DType::F32,
            Some(other) => return wrong(format!("dtype {other}: expected bfloat16, float16 or float32")),
        };
        let quantized = &raw["quantization_config"];
        if quantized["load_in_4bit"] != true {
            return Ok(Self { dense, four_bits: None });
        }
        let format = match quantized["bnb_4bit_quant_type"].as_str() {
            Some("nf4") => Format::Nf4,
            None | Some("fp4") => Format::Fp4,
            Some(other) => return wrong(format!("bnb_4bit_quant_type {other}: expected nf4 or fp4")),
        };
        let double = quantized["bnb_4bit_use_double_quant"] == true;
        Ok(Self { dense, four_bits: Some(Quantization { format, block: STORED_BLOCK, double }) })
    }
}

/// Where the run goes, as far as memory is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Bytes of the program itself, its data and tokenizer.
    pub program: u64,
    /// Threads of the CPU backend, whose pool and working memory are counted too; `None` for another backend.
    pub cpu_threads: Option<usize>,
}

/// What a run is to its memory.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// The model's dimensions.
    pub config: &'a ModelConfig,
    /// The element types of its files.
    pub stored: Stored,
    /// What they become.
    pub precision: Precision,
    /// The adapter's method, its sizes and targets; `None` where there are none.
    pub adapter: Option<&'a PeftConfig>,
    /// What the optimiser keeps its moments in.
    pub moments: Moments,
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Tokens a row.
    pub seq: usize,
    /// Micro-batches a step: from the second on, gradients are there while forward runs.
    pub accumulate: usize,
    /// Whether held-out losses are measured.
    pub evaluates: bool,
    /// Keep only each block's input, and compute the rest again in backward.
    pub checkpointing: bool,
    /// What is kept of activations for backward.
    pub saved_as: SavedAs,
    /// Precision of the products.
    pub compute: Compute,
    /// Where it runs.
    pub machine: Machine,
}

impl Setup<'_> {
    pub(super) fn is_full(&self) -> bool {
        self.precision == Precision::Trained
    }

    /// Rows of the batches of a held-out loss: whole ones, and at the end what is left over, whose buffers have sizes
    /// of their own. How many rows those are is not known before the data are: a quarter of a batch stands for them.
    pub(super) fn evaluated(&self) -> Vec<usize> {
        match (self.evaluates, self.rows / 4) {
            (false, _) => Vec::new(),
            (true, 0) => vec![self.rows],
            (true, quarter) => vec![self.rows, quarter],
        }
    }

    /// That it takes more than can be counted.
    pub(super) fn too_large(&self) -> Error {
        let ModelConfig { layers, width, feed_forward, .. } = self.config;
        let found = format!("{layers} × {width} × {feed_forward} for {} × {} tokens", self.rows, self.seq);
        let setting = "num_hidden_layers × hidden_size × intermediate_size";
        Error::Setting { setting, found, expected: "a run that takes at most 2^62 bytes" }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.rows.checked_mul(self.seq) {
            Some(1..=MOST_TOKENS) => Ok(()),
            _ => {
                let found = format!("{} × {}", self.rows, self.seq);
                let expected = "a smaller --batch or --seq, for no memory holds more than 2^26 tokens a micro-batch";
                Err(Error::Setting { setting: "batch × seq", found, expected })
            }
        }
    }
}
