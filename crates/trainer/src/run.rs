//! A whole run: steps, held-out evaluations, checkpoints, and at the end the product.

use crate::checkpoint::Checkpoints;
use crate::data::Batch;
use crate::metrics::{EvalMetrics, Metrics};
use crate::model::Model;
use crate::optimizer::AdamW;
use crate::product::{Kind, Product};
use crate::step::{Batches, Recipe, StepMetrics, evaluate, gradients};
use crate::traffic::{Gauge, Tally};
use crate::{Error, Result};
use rankfold_adapters::adalora::Allocator;
use std::path::Path;

/// How often what is done beside the steps.
#[derive(Clone, Copy, Debug)]
pub struct Cadence {
    /// Steps of the run.
    pub steps: usize,
    /// Evaluate after every so many steps; 0 for only before the first and after the last.
    pub eval_every: usize,
    /// Checkpoint after every so many steps; 0 for none.
    pub checkpoint_every: usize,
    /// Checkpoints to keep.
    pub keep: usize,
}

/// What a run tells while it goes.
pub trait Progress {
    /// A step is done.
    fn step(&mut self, metrics: &StepMetrics);
    /// The held-out loss was measured.
    fn eval(&mut self, metrics: &EvalMetrics);
    /// Steps up to `step` were done before.
    fn resumed(&mut self, step: usize);
}

/// Everything a run needs.
pub struct Run<'a> {
    /// The model.
    pub model: &'a mut Model,
    /// What is saved of it.
    pub kind: Kind<'a>,
    /// Training batches.
    pub batches: Batches,
    /// Held-out batches; may be empty.
    pub held_out: Vec<Batch>,
    /// How a step is made.
    pub recipe: Recipe,
    /// How often what.
    pub cadence: Cadence,
    /// Moments of the trained parameters.
    pub optimizer: AdamW,
    /// With AdaLoRA: who spends the budget.
    pub allocator: Option<Allocator>,
    /// What was paged so far, where anything is.
    pub gauge: Option<Gauge<'a>>,
}

impl Run<'_> {
    /// Run to the end in `folder`, from its last whole checkpoint if `resume`.
    ///
    /// The product appears in `folder` only at the end; the checkpoint of step t is written within step t + 1, before
    /// its update. Errors: a loss that is not finite (the last checkpoint stays, and gave a finite one); anything that
    /// cannot be written (what was written stays whole).
    pub fn to_end(self, folder: &Path, resume: bool, progress: &mut dyn Progress) -> Result<()> {
        let Self { model, kind, mut batches, held_out, recipe, cadence, mut optimizer, mut allocator, gauge } = self;
        let backend = model.backend().clone();
        let checkpoints = Checkpoints::of(folder);
        let done = match resume {
            true => checkpoints.restore(model, kind, &mut optimizer, allocator.as_mut())?,
            false => 0,
        };
        if done > cadence.steps {
            let why = format!("its last checkpoint is of step {done}, beyond the run's {} steps", cadence.steps);
            return Err(Error::file(folder, why));
        }
        let mut metrics = Metrics::open(&folder.join("metrics.jsonl"), done)?;
        let eval = |model: &Model, step: usize, metrics: &mut Metrics, progress: &mut dyn Progress| -> Result<()> {
            if held_out.is_empty() {
                return Ok(());
            }
            let (eval_loss, eval_tokens) = evaluate(model, held_out.iter().cloned(), recipe.compute)?;
            if !eval_loss.is_finite() {
                return Err(Error::NotFinite { step, what: "held-out loss", value: eval_loss });
            }
            let line = EvalMetrics { step, eval_loss, eval_tokens };
            metrics.eval(&line)?;
            progress.eval(&line);
            Ok(())
        };
        if done > 0 {
            progress.resumed(done);
        } else {
            eval(model, 0, &mut metrics, progress)?;
        }
        let Cadence { steps, eval_every, checkpoint_every, keep } = cadence;
        let due = |every: usize, t: usize| every > 0 && t.is_multiple_of(every);
        for t in done + 1..=steps {
            let mut tally = Tally::new(gauge);
            let pending = tally.over(|| gradients(model, &mut batches, &recipe, &optimizer, t))?;
            // Only now is it known that the weights of step t − 1 give a finite loss: they are worth keeping.
            if t - 1 > done && due(checkpoint_every, t - 1) {
                metrics.sync()?;
                checkpoints.save(t - 1, Product { model, kind }, &optimizer, allocator.as_ref(), keep)?;
            }
            let spender = allocator.as_mut().map(|allocator| (allocator, &mut *model));
            let mut line = tally.over(|| pending.apply(&recipe, &mut optimizer, spender))?;
            line.traffic = tally.sum();
            metrics.step(&line)?;
            progress.step(&line);
            if due(eval_every, t) || t == steps {
                eval(model, t, &mut metrics, progress)?;
            }
        }
        optimizer.check_finite()?;
        if let Some(allocator) = &mut allocator {
            allocator.finish(backend.as_ref(), &mut model.linears_mut())?;
        }
        metrics.sync()?;
        Product { model, kind }.save(folder, false)
    }
}
