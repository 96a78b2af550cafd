//! One optimiser step: micro-batches forward and backward, the clip, the update.
//!
//! The loss is Σ over the kept targets of the whole step, its micro-batches together, divided by their number; so
//! are its gradients. Two micro-batches of 4 rows are thus one batch of 8, whatever their targets' counts. AdaLoRA adds
//! its orthogonality term, once a step.

use crate::data::{Batch, Loader};
use crate::model::Model;
use crate::optimizer::{AdamW, clip_scale};
use crate::schedule::Schedule;
use crate::traffic::Traffic;
use crate::{Error, Result};
use rankfold_adapters::adalora::{Allocation, Allocator, orthogonality};
use rankfold_adapters::diff::expected_share;
use rankfold_adapters::{AdapterConfig, DropoutKey, Forward, PeftConfig, Relative};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::{Compute, DType};
use serde::{Serialize, Serializer};
use std::time::Instant;

/// Where a step's batches come from.
#[derive(Debug)]
pub enum Batches {
    /// Examples, shuffled and packed.
    Loader(Box<Loader>),
    /// One batch, every step the same.
    Fixed(Batch),
}

impl Batches {
    /// [rows, tokens a row] of a micro-batch.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Loader(loader) => [loader.shape().rows, loader.shape().seq],
            Self::Fixed(batch) => [batch.rows, batch.seq],
        }
    }

    fn batch(&mut self, step: usize, micro: usize) -> Batch {
        match self {
            Self::Loader(loader) => loader.batch(step as u64 - 1, micro),
            Self::Fixed(batch) => batch.clone(),
        }
    }
}

/// What stays the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Learning rates.
    pub schedule: Schedule,
    /// Micro-batches a step.
    pub accumulate: usize,
    /// The gradient's largest norm; 0 for none.
    pub clip: f64,
    /// Of dropout and data.
    pub seed: u64,
    /// Keep only each block's input, and compute the rest again in backward.
    pub checkpointing: bool,
    /// Precision of the products.
    pub compute: Compute,
    /// AdaLoRA's second term.
    pub orthogonality: Option<Orthogonality>,
    /// Diff pruning's: what the expected share of changed elements costs.
    pub diff_penalty: Option<f64>,
}

/// Diff pruning's penalty, where a configuration is that method's.
pub fn diff_penalty(config: &PeftConfig) -> Option<f64> {
    match config {
        PeftConfig::Relative(config) => match config.method {
            Relative::Diff { penalty } => Some(penalty),
            _ => None,
        },
        _ => None,
    }
}

/// The weight of AdaLoRA's orthogonality term in the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Orthogonality {
    /// What the mean over all factors is multiplied by.
    pub weight: f64,
    /// Whether it is of squared norms.
    pub squared: bool,
}

impl Orthogonality {
    /// As a configuration has it, where it is AdaLoRA's.
    pub fn of(config: &AdapterConfig) -> Option<Self> {
        config.adalora.as_ref().map(|adalora| Self { weight: adalora.orthogonality, squared: adalora.squared })
    }

    /// The term's value; its gradient is added to `gradients`.
    pub fn add_to(&self, model: &Model, gradients: &mut Gradients) -> Result<f64> {
        let tape = Tape::new(model.backend().clone());
        let Some((root, value)) = orthogonality(&tape, model.linears(), self.squared)? else { return Ok(0.0) };
        let seed = model.backend().filled(DType::F32, 1, self.weight)?;
        tape.backward(&root, seed, gradients)?;
        Ok(self.weight * value)
    }
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: usize,
    /// The full objective before the step's update.
    pub loss: f64,
    /// The step's learning rate.
    pub lr: f64,
    /// ‖gradient‖ before the clip.
    pub grad_norm: f64,
    /// Tokens that went through the model, padding included.
    pub tokens: usize,
    /// Those over the step's time.
    pub tokens_per_second: f64,
    /// The process's largest resident memory so far, in bytes, where the system tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss: Option<u64>,
    /// What the step paged, where anything is.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
    /// With AdaLoRA: what its budget is spent on.
    #[serde(flatten)]
    pub spent: Option<Spent>,
    /// With diff pruning: the expected share of elements that stay as they were, before the step's update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_sparsity: Option<f64>,
}

/// AdaLoRA's budget after a step.
#[derive(Clone, Debug, Serialize)]
pub struct Spent {
    /// Triplets that there may be.
    pub budget: usize,
    /// Triplets that there are, by module.
    #[serde(serialize_with = "as_map")]
    pub ranks: Vec<(String, usize)>,
}

fn as_map<S: Serializer>(pairs: &[(String, usize)], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(name, rank)| (name, rank)))
}

/// A step whose loss and gradients are known and finite, and which has updated nothing yet.
#[derive(Debug)]
pub struct Pending {
    step: usize,
    gradients: Gradients,
    loss: f64,
    grad_norm: f64,
    share: Option<f64>,
    tokens: usize,
    seconds: f64,
}

/// The loss and gradients of step `step` (from 1).
///
/// Errors: a loss or gradient that is not finite.
pub fn gradients(
    model: &Model,
    batches: &mut Batches,
    recipe: &Recipe,
    optimizer: &AdamW,
    step: usize,
) -> Result<Pending> {
    let begun = Instant::now();
    let backend = model.backend();
    let micro_batches: Vec<Batch> = (0..recipe.accumulate).map(|micro| batches.batch(step, micro)).collect();
    let kept: usize = micro_batches.iter().map(|batch| model.targets(batch)).sum();
    let tokens = micro_batches.iter().map(|batch| batch.ids.len()).sum();

    let mut gradients = Gradients::new(backend.clone());
    let mut loss = 0.0;
    for (micro, batch) in micro_batches.iter().enumerate() {
        let draw = ((step - 1) * recipe.accumulate + micro) as u64;
        let mode = Forward { compute: recipe.compute, dropout: Some(DropoutKey { seed: recipe.seed, draw }) };
        let device = model.batch(batch)?;
        let tape = Tape::new(backend.clone());
        let (root, value) = model.loss(&tape, &device, kept.max(1) as f64, &mode, recipe.checkpointing)?;
        loss += value;
        if !loss.is_finite() {
            return Err(Error::NotFinite { step, what: "loss", value: loss });
        }
        tape.backward_from_loss(&root, &mut gradients)?;
    }
    if let Some(term) = recipe.orthogonality {
        loss += term.add_to(model, &mut gradients)?;
        if !loss.is_finite() {
            return Err(Error::NotFinite { step, what: "loss", value: loss });
        }
    }
    let share = match recipe.diff_penalty {
        None => None,
        Some(penalty) => {
            let share = expected_share(backend.as_ref(), model.linears(), penalty, &mut gradients)?;
            loss += penalty * share.unwrap_or_default();
            share
        }
    };
    let grad_norm = optimizer.grad_norm(&gradients)?;
    if !grad_norm.is_finite() {
        return Err(Error::NotFinite { step, what: "gradient's norm", value: grad_norm });
    }
    Ok(Pending { step, gradients, loss, grad_norm, share, tokens, seconds: begun.elapsed().as_secs_f64() })
}

impl Pending {
    /// Update the parameters, and with AdaLoRA spend the budget: tensors that it cuts are others afterwards.
    pub fn apply(
        self,
        recipe: &Recipe,
        optimizer: &mut AdamW,
        allocator: Option<(&mut Allocator, &mut Model)>,
    ) -> Result<StepMetrics> {
        let Self { step, gradients, loss, grad_norm, share, tokens, seconds } = self;
        let begun = Instant::now();
        let (lr, scale) = (recipe.schedule.at(step), clip_scale(grad_norm, recipe.clip));
        optimizer.update(&gradients, lr, scale)?;
        let spend = |(allocator, model): (&mut Allocator, &mut Model)| -> Result<Spent> {
            let backend = model.backend().clone();
            let Allocation { budget, ranks, cuts } =
                allocator.after_step(backend.as_ref(), step, &gradients, scale, &mut model.linears_mut())?;
            optimizer.cut(&cuts)?;
            Ok(Spent { budget, ranks })
        };
        let spent = allocator.map(spend).transpose()?;
        let tokens_per_second = tokens as f64 / (seconds + begun.elapsed().as_secs_f64());
        let (peak_rss, expected_sparsity) = (peak_rss(), share.map(|share| 1.0 - share));
        let traffic = None;
        Ok(StepMetrics {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            tokens_per_second,
            peak_rss,
            traffic,
            spent,
            expected_sparsity,
        })
    }
}

/// Mean loss over batches, each target counted once: (loss, targets).
pub fn evaluate(model: &Model, batches: impl IntoIterator<Item = Batch>, compute: Compute) -> Result<(f64, usize)> {
    let (mut sum, mut kept) = (0.0, 0);
    for batch in batches {
        let device = model.batch(&batch)?;
        let tape = Tape::inference(model.backend().clone());
        sum += model.loss(&tape, &device, 1.0, &Forward::evaluation(compute), false)?.1;
        kept += device.kept;
    }
    Ok((sum / kept.max(1) as f64, kept))
}

/// The process's peak resident memory in bytes: the kernel's own figure, where there is one.
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
