//! One optimiser step: micro-batches forward and backward, the clip, the update.
//!
//! The loss is Σ over the kept targets of the whole step, its micro-batches together, divided by their number; so
//! are its gradients. Two micro-batches of 4 rows are thus one batch of 8, whatever their targets' counts. What a method
//! adds to it is added once a step.
//!
//! Spans of `tracing` say where a step is: `step` (its `number`; one for its gradients, one for its update) holds
//! `forward`, `backward` and `block`s (their `number`), and these the model's parts, each a `layer` of some `kind`.
//! They cost next to nothing where nobody listens.

use crate::data::{Batch, Loader};
use crate::model::Model;
use crate::objective::{Added, Terms};
use crate::optimizer::{AdamW, clip_scale};
use crate::schedule::Schedule;
use crate::traffic::Traffic;
use crate::{Error, Result};
use rankfold_adapters::adalora::{Allocation, Allocator};
use rankfold_adapters::diff::closed_share;
use rankfold_adapters::{DropoutKey, Forward};
use rankfold_autograd::{Gradients, SavedAs, Tape};
use rankfold_backend::Compute;
use serde::{Serialize, Serializer};
use std::time::Instant;
use tracing::debug_span;

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
    /// What is kept of activations for backward.
    pub saved_as: SavedAs,
    /// Precision of the products.
    pub compute: Compute,
    /// What the method adds to the objective.
    pub terms: Terms,
}

impl Recipe {
    /// One micro-batch of f32 products a step, no clip, seed 0, nothing computed twice or rounded, no terms.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            accumulate: 1,
            clip: 0.0,
            seed: 0,
            checkpointing: false,
            saved_as: SavedAs::Computed,
            compute: Compute::F32,
            terms: Terms::default(),
        }
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
    /// The share of them whose gates are closed: what a folder that was written now would have of zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
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
    changed: Option<f64>,
    closed: Option<f64>,
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
    let _step = debug_span!("step", number = step).entered();
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
        let forward = debug_span!("forward").entered();
        let device = model.batch(batch)?;
        let tape = Tape::saving(backend.clone(), recipe.saved_as);
        let (root, value) = model.loss(&tape, &device, kept.max(1) as f64, &mode, recipe.checkpointing)?;
        drop(forward);
        loss += value;
        if !loss.is_finite() {
            return Err(Error::NotFinite { step, what: "loss", value: loss });
        }
        let _backward = debug_span!("backward").entered();
        tape.backward_from_loss(&root, &mut gradients)?;
    }
    let Added { value, changed } = recipe.terms.add_to(backend, model.linears(), &mut gradients)?;
    let closed = changed.map_or(Ok(None), |_| closed_share(backend.as_ref(), model.linears()))?;
    loss += value;
    if !loss.is_finite() {
        return Err(Error::NotFinite { step, what: "loss", value: loss });
    }
    let grad_norm = optimizer.grad_norm(&gradients)?;
    if !grad_norm.is_finite() {
        return Err(Error::NotFinite { step, what: "gradient's norm", value: grad_norm });
    }
    Ok(Pending { step, gradients, loss, grad_norm, changed, closed, tokens, seconds: begun.elapsed().as_secs_f64() })
}

impl Pending {
    /// Update the parameters, and with AdaLoRA spend the budget: tensors that it cuts are others afterwards.
    pub fn apply(
        self,
        recipe: &Recipe,
        optimizer: &mut AdamW,
        allocator: Option<(&mut Allocator, &mut Model)>,
    ) -> Result<StepMetrics> {
        let Self { step, gradients, loss, grad_norm, changed, closed: sparsity, tokens, seconds } = self;
        let _step = debug_span!("step", number = step).entered();
        let begun = Instant::now();
        let (lr, scale) = (recipe.schedule.at(step), clip_scale(grad_norm, recipe.clip));
        optimizer.update(&gradients, lr, scale)?;
        let spend = |(allocator, model): (&mut Allocator, &mut Model)| -> Result<Spent> {
            let _layer = debug_span!("layer", kind = "budget").entered();
            let backend = model.backend().clone();
            let Allocation { budget, ranks, cuts } =
                allocator.after_step(backend.as_ref(), step, &gradients, scale, &mut model.linears_mut())?;
            optimizer.cut(&cuts)?;
            // The next step asks for other sizes: nothing of this one is kept for it.
            if !cuts.is_empty() {
                drop((cuts, gradients));
                backend.trim()?;
            }
            Ok(Spent { budget, ranks })
        };
        let spent = allocator.map(spend).transpose()?;
        let tokens_per_second = tokens as f64 / (seconds + begun.elapsed().as_secs_f64());
        let (peak_rss, expected_sparsity) = (peak_rss(), changed.map(|changed| 1.0 - changed));
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
            sparsity,
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
