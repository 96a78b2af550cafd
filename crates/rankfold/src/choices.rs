//! What an option of a run may be, where it is one of several names.

use crate::error::{Error, Result};
use clap::ValueEnum;
use rankfold_adapters::adalora;
use rankfold_autograd::SavedAs;
use rankfold_backend::Format;
use rankfold_trainer::optimizer::Moments;
use rankfold_trainer::schedule::Decay;
use serde::{Deserialize, Serialize};

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Low-rank adapters.
    Lora,
    /// Low-rank adapters beside weights whose rows have learned magnitudes.
    Dora,
    /// Low-rank adapters whose ranks share a budget.
    Adalora,
    /// Scales of keys, values and the feed-forward's inner activations.
    Ia3,
    /// Biases.
    Bitfit,
    /// Bottleneck adapters after attention and after the feed-forward.
    Houlsby,
    /// Bottleneck adapters after the feed-forward.
    Pfeiffer,
    /// Embeddings before the text.
    Prompt,
    /// Keys and values before the text, in every layer.
    Prefix,
    /// A sparse difference.
    Diff,
    /// The whole model.
    Full,
}

/// Where adapters begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// A uniform, B zero; AdaLoRA's own.
    Kaiming,
    /// A normal, B zero.
    Gaussian,
    /// The largest singular triples of the base, which loses them.
    Pissa,
    /// The first columns of the base's Q and rows of its R, which it loses.
    Olora,
    /// What 4 bits lost of the base.
    Loftq,
}

/// Biases that are trained beside adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Biases {
    /// None.
    None,
    /// Those of every linear layer.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

impl Method {
    /// Whether it is a low-rank update, whose rank and scale are asked for.
    pub fn is_low_rank(self) -> bool {
        matches!(self, Self::Lora | Self::Dora | Self::Adalora)
    }

    /// The learning rate that it trains the built-in model well at. For another model it is a thirtieth, which for LoRA
    /// is what most take: 2e-4. What a projected prefix trains is a network's weights.
    pub fn rate(self, builtin: bool, projected: bool) -> f64 {
        let of_builtin = match self {
            Self::Prefix if projected => 6e-3,
            Self::Lora | Self::Dora | Self::Houlsby | Self::Pfeiffer => 6e-3,
            Self::Adalora => 2e-2,
            Self::Ia3 | Self::Prompt | Self::Prefix => 0.1,
            Self::Bitfit => 3e-2,
            Self::Diff => 1e-3,
            Self::Full => 5e-4,
        };
        if builtin { of_builtin } else { of_builtin / 30.0 }
    }

    /// Whether it goes on linear layers that are asked for.
    pub fn has_targets(self) -> bool {
        self.is_low_rank() || matches!(self, Self::Ia3 | Self::Bitfit | Self::Diff)
    }
}

/// What becomes of AdaLoRA's triplets that the budget does not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prune {
    /// They stay in memory to the end, and may come back until the last choice: PEFT's arithmetic.
    Mask,
    /// They go, at the last choice or when they have long been masked: less memory, faster steps.
    Shrink,
}

impl From<Prune> for adalora::Prune {
    fn from(prune: Prune) -> Self {
        match prune {
            Prune::Mask => Self::Mask,
            Prune::Shrink => Self::Shrink,
        }
    }
}

/// What the linear layers of the base are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantize {
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit floating point.
    Fp4,
    /// 4-bit integers.
    Int4,
    /// As the file has them.
    None,
}

impl Quantize {
    /// What the frozen layers of a model are in if nobody says.
    pub fn of(builtin: bool) -> Self {
        if builtin { Self::Nf4 } else { Self::None }
    }

    /// The format, which `none` is not.
    pub fn format(self) -> Result<Format> {
        match self {
            Self::Nf4 => Ok(Format::Nf4),
            Self::Fp4 => Ok(Format::Fp4),
            Self::Int4 => Ok(Format::Int4),
            Self::None => Err(Error::Usage("format none: expected nf4, fp4 or int4".into())),
        }
    }
}

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The full rate to the end.
    Constant,
    /// Straight to zero.
    Linear,
    /// Half a cosine to zero.
    Cosine,
}

impl From<Schedule> for Decay {
    fn from(schedule: Schedule) -> Self {
        match schedule {
            Schedule::Constant => Self::Constant,
            Schedule::Linear => Self::Linear,
            Schedule::Cosine => Self::Cosine,
        }
    }
}

/// Optimisers by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimizer {
    /// AdamW with moments in f32: 8 bytes a trained parameter.
    #[default]
    Adamw,
    /// AdamW with moments in 8 bits, in blocks of 256 (tensors of less than 4096 elements in f32): 2 bytes.
    Adamw8bit,
    /// adamw, its moments paged out where memory is short.
    PagedAdamw,
    /// adamw8bit, its moments paged out where memory is short.
    PagedAdamw8bit,
}

impl Optimizer {
    /// What its moments are kept in.
    pub fn moments(self) -> Moments {
        match self {
            Self::Adamw | Self::PagedAdamw => Moments::F32,
            Self::Adamw8bit | Self::PagedAdamw8bit => Moments::Blockwise8,
        }
    }

    /// Whether they may be paged out.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamw | Self::PagedAdamw8bit)
    }
}

/// What is kept of activations for backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// The activations.
    #[default]
    F32,
    /// The activations rounded to bf16.
    Bf16,
}

impl From<Activations> for SavedAs {
    fn from(activations: Activations) -> Self {
        match activations {
            Activations::F32 => Self::Computed,
            Activations::Bf16 => Self::Bf16,
        }
    }
}

/// How pages that do not fit in memory are written and read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageIo {
    /// Through the system's cache, which keeps some of them in memory that nobody else needs.
    #[default]
    Buffered,
    /// Past it.
    Direct,
}
