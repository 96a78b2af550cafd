//! What the studies do again and again: train the embedded base in some way, on the embedded text, and measure.
//!
//! The text's last tenth is never trained on. Its first half chooses learning rates, its second is what results are
//! measured on, so that a method with more rates to choose from has no better figures by that alone.

use super::spread::Spread;
use super::tuning::{CHOOSING, Tuned, tune};
use crate::builtin;
use crate::error::Result;
use crate::open::{BUILTIN, Folder};
use rankfold_adapters::{AdapterConfig, LoraSpec, Names, Targets, Values};
use rankfold_backend::params::IGNORED;
use rankfold_backend::{Backend, Compute, View};
use rankfold_cpu::CpuBackend;
use rankfold_trainer::data::{Batch, Data, Evaluation, Example, Loader, Shape};
use rankfold_trainer::model::{DeviceBatch, Model, Precision};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, evaluate, gradients};
use serde::Serialize;
use std::sync::Arc;

/// How much is done.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Setting {
    /// Runs of each kind, from seed 0 on: the order of the data, and the first values of adapters.
    pub seeds: u64,
    /// Steps of a run.
    pub steps: usize,
    /// Rows a step.
    pub rows: usize,
    /// Tokens a row.
    pub seq: usize,
    /// Rows that results are measured on, where not all.
    pub held_out: Option<usize>,
    /// Learning rates that are tried, where not all.
    pub rates: Option<usize>,
}

/// The embedded base and text, opened.
#[derive(Debug)]
pub struct Bench {
    /// How much is done.
    pub setting: Setting,
    /// Where it is computed, if a run does not say.
    pub backend: Arc<dyn Backend>,
    /// With so many threads; all cores where not given.
    pub threads: Option<usize>,
    folder: Folder,
    padding: u32,
    train: Vec<Example>,
    /// Row by row.
    tuning: Vec<Batch>,
    held_out: Vec<Batch>,
}

/// A trained model.
#[derive(Debug)]
pub struct Trained {
    /// The model.
    pub model: Model,
    /// The loss of every step, before its update.
    pub losses: Vec<f64>,
}

impl Bench {
    /// Open the base and the text.
    pub fn open(setting: Setting, threads: Option<usize>) -> Result<Self> {
        let folder = Folder::open(BUILTIN)?;
        let tokenizer = folder.tokenizer()?;
        let padding = tokenizer.end_of_text();
        let data = Data::load(&tokenizer, &builtin::sources(&[]), &[])?;
        let rows: Vec<Batch> = Evaluation::new(data.held_out, setting.seq, padding)?.batches(1).collect();
        let (tuning, held_out) = rows.split_at(rows.len() / 2);
        let first = |rows: &[Batch]| rows[..setting.held_out.unwrap_or(usize::MAX).min(rows.len())].to_vec();
        let (tuning, held_out) = (first(tuning), first(held_out));
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(threads));
        Ok(Self { setting, backend, threads, folder, padding, train: data.train, tuning, held_out })
    }

    /// The base with new adapters, where a configuration is given.
    pub fn model(
        &self,
        backend: &Arc<dyn Backend>,
        precision: Precision,
        adapter: Option<&AdapterConfig>,
        seed: u64,
    ) -> Result<Model> {
        let mut model = self.folder.load(backend.clone(), precision)?;
        if let Some(config) = adapter {
            model.attach(&config.clone().into(), Values::New(seed))?;
        }
        Ok(model)
    }

    /// Train a model for the setting's steps by AdamW, at [`rates`].
    pub fn train(&self, model: Model, lr: f64, seed: u64) -> Result<Trained> {
        let steps = self.setting.steps;
        let mut batches = Batches::Loader(Box::new(self.loader(seed)?));
        let recipe = Recipe { clip: 1.0, seed, ..Recipe::new(rates(lr, steps)) };
        let parameters = model.parameters();
        let mut optimizer = AdamW::new(model.backend().clone(), Moments::F32, Hyper::default(), parameters)?;
        let mut losses = Vec::with_capacity(steps);
        for step in 1..=steps {
            let pending = gradients(&model, &mut batches, &recipe, &optimizer, step)?;
            losses.push(pending.apply(&recipe, &mut optimizer, None)?.loss);
        }
        optimizer.check_finite()?;
        Ok(Trained { model, losses })
    }

    fn loader(&self, seed: u64) -> Result<Loader> {
        let Setting { rows, seq, .. } = self.setting;
        Ok(Loader::new(self.train.clone(), Shape { rows, seq, accumulate: 1 }, seed, self.padding)?)
    }

    /// What a run is trained on, in words.
    pub fn extent(&self) -> Result<String> {
        let Setting { steps, rows, seq, .. } = self.setting;
        let epochs = (steps * rows) as f64 / self.loader(0)?.rows_an_epoch() as f64;
        Ok(format!("{steps} steps of {} tokens, {epochs:.2} epochs", rows * seq))
    }

    /// Mean loss of the held-out text, nat a token.
    pub fn held_out(&self, model: &Model) -> Result<f64> {
        Ok(evaluate(model, together(&self.held_out), Compute::F32)?.0)
    }

    /// What each row adds to it, times the rows: numbers whose mean it is.
    pub fn held_out_rows(&self, model: &Model) -> Result<Vec<f64>> {
        let of_row = |row: &Batch| Ok(evaluate(model, [row.clone()], Compute::F32)?);
        Ok(by_row(&self.held_out.iter().map(of_row).collect::<Result<Vec<_>>>()?))
    }

    /// How far a model's predictions are from another's, by row of the held-out text likewise: the mean of
    /// D(p‖q) = Σ p ln p/q over its tokens, nat (Kullback & Leibler 1951), p the other's.
    pub fn divergence_rows(&self, model: &Model, from: &Model) -> Result<Vec<f64>> {
        let vocab = model.config.vocab;
        let predictions = |model: &Model, row: &Batch| -> Result<Vec<f32>> {
            let batch = DeviceBatch::new(model.backend().as_ref(), row)?;
            Ok(model.backend().download(model.logits(&batch, Compute::F32)?.view())?)
        };
        let of_row = |row: &Batch| -> Result<(f64, usize)> {
            let (p, q) = (predictions(from, row)?, predictions(model, row)?);
            // The last token of a row, and those before padding, predict nothing that the loss counts.
            let counted = row.labels[1..].iter().map(|label| *label != IGNORED);
            let pairs = p.chunks(vocab).zip(q.chunks(vocab)).zip(counted).filter(|(_, counted)| *counted);
            let divergences: Vec<f64> = pairs.map(|((p, q), _)| divergence(p, q)).collect();
            Ok((Spread::of(&divergences).mean, divergences.len()))
        };
        Ok(by_row(&self.held_out.iter().map(of_row).collect::<Result<Vec<_>>>()?))
    }

    /// Mean loss of the text that chooses rates.
    pub fn tuning(&self, model: &Model) -> Result<f64> {
        Ok(evaluate(model, together(&self.tuning), Compute::F32)?.0)
    }

    /// Parameters of the base.
    pub fn base_parameters(&self) -> usize {
        self.folder.config.parameters()
    }

    /// Train at every rate and seed, and measure; `said` is what progress calls it.
    pub fn tune(&self, said: &str, rates: &[f64], mut model: impl FnMut(u64) -> Result<Model>) -> Result<Tuned> {
        let measure = |lr: f64, seed: u64| {
            let trained = self.train(model(seed)?, lr, seed)?;
            Ok((self.tuning(&trained.model)?, self.held_out(&trained.model)?))
        };
        tune(self.setting, CHOOSING, said, rates, measure)
    }
}

/// Batches of eight of these rows.
fn together(rows: &[Batch]) -> impl Iterator<Item = Batch> {
    rows.chunks(8).map(|rows| Batch {
        ids: rows.iter().flat_map(|row| row.ids.clone()).collect(),
        labels: rows.iter().flat_map(|row| row.labels.clone()).collect(),
        positions: rows.iter().flat_map(|row| row.positions.clone()).collect(),
        starts: rows.iter().flat_map(|row| row.starts.clone()).collect(),
        rows: rows.len(),
        seq: rows[0].seq,
    })
}

/// Of rows' means over so many tokens: numbers whose mean is that over all tokens.
fn by_row(rows: &[(f64, usize)]) -> Vec<f64> {
    let tokens: usize = rows.iter().map(|(_, tokens)| tokens).sum();
    rows.iter().map(|(mean, of)| mean * (of * rows.len()) as f64 / tokens.max(1) as f64).collect()
}

/// D(p‖q) of the distributions that logits stand for.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + x.iter().map(|x| f64::from(x - most).exp()).sum::<f64>().ln()
    };
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p) - of_p, f64::from(*q) - of_q);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

/// The rates of a run: warmed up for a twentieth, let down by a cosine.
pub fn rates(lr: f64, steps: usize) -> Schedule {
    Schedule { lr, decay: Decay::Cosine, warmup: steps / 20, steps }
}

/// LoRA of rank r with α = 2r, so that every rank has the same scale, on the modules of these names.
pub fn lora(rank: usize, modules: &[&str]) -> AdapterConfig {
    let targets = match modules {
        [] => Targets::AllLinear,
        names => Targets::Named(Names::List(names.iter().map(|name| (*name).to_owned()).collect())),
    };
    AdapterConfig { spec: LoraSpec::new(rank, 2.0 * rank as f64), targets, ..AdapterConfig::default() }
}

/// Numbers that train in a model.
pub fn trained_parameters(model: &Model) -> usize {
    model.parameters().iter().map(|named| named.parameter.shape().elements()).sum()
}

/// The bits of all that was trained, in the order of its files.
pub fn trained_bytes(model: &Model) -> Result<Vec<u8>> {
    let backend = model.backend();
    let mut all = Vec::new();
    let mut read = |view: View| -> Result<()> {
        let start = all.len();
        all.resize(start + view.len() * view.dtype().size(), 0);
        Ok(backend.read(view, &mut all[start..])?)
    };
    for named in model.parameters() {
        read(named.parameter.tensor().view())?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_mean_of_rows_is_that_of_their_tokens() {
        assert_eq!(by_row(&[(1.0, 3), (2.0, 1)]), [1.5, 1.0]);
        assert_eq!(Spread::of(&by_row(&[(1.0, 3), (2.0, 1)])).mean, 1.25);
    }

    proptest! {
        #[test]
        fn a_divergence_is_what_its_definition_says(
            logits in proptest::collection::vec((-4.0..4.0f32, -4.0..4.0f32), 1..9), shift in -9.0..9.0f32
        ) {
            let (p, q): (Vec<f32>, Vec<f32>) = logits.into_iter().unzip();
            let shares = |x: &[f32]| -> Vec<f64> {
                let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                x.iter().map(|x| f64::from(*x).exp() / sum).collect()
            };
            let expected: f64 = shares(&p).iter().zip(shares(&q)).map(|(p, q)| p * (p / q).ln()).sum();
            // f64 sums of at most eight terms below 10, of logits whose differences are rounded to f32 (2⁻²⁴ of 8).
            prop_assert!((divergence(&p, &q) - expected).abs() < 1e-5);
            // All logits moved alike are the same distribution; the moved ones are rounded to f32, 2⁻²⁴ of 13 each.
            let moved: Vec<f32> = q.iter().map(|q| q + shift).collect();
            prop_assert!((divergence(&p, &moved) - expected).abs() < 1e-5 && divergence(&p, &q) > -1e-5);
        }
    }
}
