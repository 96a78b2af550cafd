//! A task whose answer is known: the linear layers of the base, each with an update of planted rank to be learned.
//!
//! Every layer stands alone. Its inputs are N(0, 1), as a norm leaves them, its targets what the same layer gives with
//! the planted update ΔW = Σ_i b_i a_iᵀ, a_i and b_i random and of length 1 on average. So every planted direction
//! weighs the same wherever it is, E‖ΔW x‖² is the layer's rank, and the objective
//!
//! ```text
//! L = Σ_layers E‖(ΔW − ΔŴ) x‖² / 2·layers
//! ```
//!
//! counts what is missing. A language model's own loss would not do: there a layer's update may matter little because
//! of where the layer is, and a budget that passes over it would be right. What is tested here is whether ranks are
//! found where nothing hides them: the most that can be asked.

use crate::error::Result;
use rankfold_adapters::adalora::{Allocator, Prune};
use rankfold_adapters::streams::RESERVED;
use rankfold_adapters::{AdapterConfig, Forward, Linear, Lora, LoraSpec, Part, attach_new};
use rankfold_autograd::{Gradients, Parameter, Tape, Tensor};
use rankfold_backend::{Backend, Buffer, Compute, DType, philox};
use rankfold_trainer::Error::NotFinite;
use rankfold_trainer::model::Model;
use rankfold_trainer::objective::Terms;
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments, Named, clip_scale};
use rankfold_trainer::schedule::Schedule;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// The ranks that are planted, in an order of each seed's own: 84 over 28 layers, 3 each on average.
pub const PLANTED: [usize; 28] = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8];

/// Rows of inputs a step, and those that errors are measured on.
const ROWS: usize = 64;
const MEASURED_ROWS: usize = 512;

/// What random numbers are for: each has streams of its own, which no adapter has.
#[derive(Clone, Copy)]
enum Draw {
    Order,
    Update,
    Training,
    Tuning,
    HeldOut,
}

fn stream(draw: Draw, number: usize) -> u64 {
    RESERVED + ((draw as u64 + 1) << 40) + number as u64
}

/// The layers and their planted updates.
#[derive(Debug)]
pub struct Task {
    backend: Arc<dyn Backend>,
    base: Vec<Linear>,
    teacher: Vec<Linear>,
    /// By layer.
    pub ranks: Vec<usize>,
    seed: u64,
}

/// What was learned.
#[derive(Debug)]
pub struct Learned {
    /// The ranks that were kept, by layer.
    pub ranks: Vec<usize>,
    /// Of what was planted, the share that is missing: on inputs that choose rates, and on others.
    pub missing: [f64; 2],
    /// Bytes of trained values, their gradients and moments, and what the budget keeps of them; by step.
    pub bytes: Vec<usize>,
    /// Of each step, without its targets.
    pub seconds: Vec<f64>,
}

impl Task {
    /// Plant updates into the layers of a model.
    pub fn plant(model: &Model, seed: u64) -> Result<Self> {
        let backend = model.backend().clone();
        let base: Vec<Linear> = model.linears().cloned().collect();
        let mut order: Vec<usize> = (0..base.len()).collect();
        order.sort_by_key(|place| philox::word(seed, stream(Draw::Order, 0), *place as u64));
        let mut ranks = vec![0; base.len()];
        order.into_iter().zip(PLANTED.into_iter().cycle()).for_each(|(place, rank)| ranks[place] = rank);
        let mut teacher = base.clone();
        for (layer, rank) in teacher.iter_mut().zip(&ranks).filter(|(_, rank)| **rank > 0) {
            let (inputs, outputs) = (layer.inputs(), layer.outputs());
            let number = 2 * layer.index() as usize;
            let a = normal(seed, stream(Draw::Update, number), rank * inputs, inputs);
            let b = normal(seed, stream(Draw::Update, number + 1), outputs * rank, outputs);
            let a = Parameter::new(backend.upload(&a)?, [*rank, inputs])?;
            let b = Parameter::new(backend.upload(&b)?, [outputs, *rank])?;
            let update = Lora::new(layer.path(), a, b, Part::None, LoraSpec::new(*rank, *rank as f64))?;
            layer.set_adapter(update)?;
        }
        Ok(Self { backend, base, teacher, ranks, seed })
    }

    /// Learn the updates with adapters of a configuration, whose budget is spent as `prune` says if it has one.
    pub fn learn(&self, config: &AdapterConfig, prune: Prune, schedule: Schedule) -> Result<Learned> {
        let backend = self.backend.as_ref();
        let mut layers = self.base.clone();
        attach_new(backend, &mut layers.iter_mut().collect::<Vec<_>>(), config, "llama", self.seed)?;
        let named = |(name, parameter)| Named { name, parameter };
        let parameters = layers.iter().flat_map(Linear::parameters).map(named).collect();
        let mut optimizer = AdamW::new(self.backend.clone(), Moments::F32, Hyper::default(), parameters)?;
        let (steps, terms) = (schedule.steps, Terms::of(&config.clone().into()));
        let mut allocator = match &config.adalora {
            Some(adalora) => Some(Allocator::new(backend, adalora, prune, steps, &layers)?),
            None => None,
        };
        let (mut bytes, mut seconds) = (Vec::new(), Vec::new());
        for step in 1..=steps {
            let inputs = self.inputs(Draw::Training, step, ROWS)?;
            let targets = self.targets(&inputs)?;
            let begun = Instant::now();
            let mut gradients = Gradients::new(self.backend.clone());
            for (layer, target) in layers.iter().zip(targets) {
                let tape = Tape::new(self.backend.clone());
                let y = layer.forward(&tape, of(&inputs, layer), &Forward::evaluation(Compute::F32))?;
                let mut residual = self.residual(&y, target)?;
                backend.scale_in_place(1.0 / (ROWS * layers.len()) as f64, residual.view_mut())?;
                tape.backward(&y, residual, &mut gradients)?;
            }
            terms.add_to(&self.backend, &layers, &mut gradients)?;
            let norm = optimizer.grad_norm(&gradients)?;
            if !norm.is_finite() {
                return Err(NotFinite { step, what: "gradient's norm", value: norm }.into());
            }
            let scale = clip_scale(norm, 1.0);
            optimizer.update(&gradients, schedule.at(step), scale)?;
            if let Some(allocator) = &mut allocator {
                let mut layers: Vec<&mut Linear> = layers.iter_mut().collect();
                optimizer.cut(&allocator.after_step(backend, step, &gradients, scale, &mut layers)?.cuts)?;
            }
            seconds.push(begun.elapsed().as_secs_f64());
            let trained: usize = layers.iter().filter_map(Linear::adapter).map(Lora::elements).sum();
            bytes.push(4 * DType::F32.size() * trained + allocator.as_ref().map_or(0, sensitivities));
        }
        optimizer.check_finite()?;
        if let Some(allocator) = &mut allocator {
            allocator.finish(backend, &mut layers.iter_mut().collect::<Vec<_>>())?;
        }
        let missing = [self.missing(&layers, Draw::Tuning)?, self.missing(&layers, Draw::HeldOut)?];
        let ranks = layers.iter().map(|layer| layer.adapter().map_or(0, Lora::rank)).collect();
        Ok(Learned { ranks, missing, bytes, seconds })
    }

    /// Of what was planted, the share that these layers miss.
    fn missing(&self, layers: &[Linear], draw: Draw) -> Result<f64> {
        Ok(self.distance(layers, draw)? / self.distance(&self.base, draw)?)
    }

    /// Σ ‖y − target‖² over the layers and the rows that errors are measured on.
    fn distance(&self, layers: &[Linear], draw: Draw) -> Result<f64> {
        let inputs = self.inputs(draw, 0, MEASURED_ROWS)?;
        let tape = Tape::inference(self.backend.clone());
        let mut sum = 0.0;
        for (layer, target) in layers.iter().zip(self.targets(&inputs)?) {
            let y = layer.forward(&tape, of(&inputs, layer), &Forward::evaluation(Compute::F32))?;
            sum += self.backend.sum_squares(self.residual(&y, target)?.view())?;
        }
        Ok(sum)
    }

    /// What the layers with planted updates give.
    fn targets(&self, inputs: &BTreeMap<usize, Tensor>) -> Result<Vec<Tensor>> {
        let tape = Tape::inference(self.backend.clone());
        let mode = Forward::evaluation(Compute::F32);
        let target = |layer: &Linear| -> Result<Tensor> { Ok(layer.forward(&tape, of(inputs, layer), &mode)?) };
        self.teacher.iter().map(target).collect()
    }

    /// y − target.
    fn residual(&self, y: &Tensor, target: Tensor) -> Result<Buffer> {
        let mut residual = self.backend.alloc(DType::F32, y.shape().elements())?;
        self.backend.copy(target.view(), residual.view_mut())?;
        self.backend.scale_in_place(-1.0, residual.view_mut())?;
        self.backend.add_in_place(y.view(), residual.view_mut())?;
        Ok(residual)
    }

    /// Inputs by width: layers of one width share them.
    fn inputs(&self, draw: Draw, number: usize, rows: usize) -> Result<BTreeMap<usize, Tensor>> {
        let mut inputs = BTreeMap::new();
        for layer in &self.base {
            let width = layer.inputs();
            if let std::collections::btree_map::Entry::Vacant(place) = inputs.entry(width) {
                // Wider ones go on where no narrower one's numbers are.
                let stream = stream(draw, number) + ((width as u64) << 24);
                let x = self.backend.upload(&normal(self.seed, stream, rows * width, 1))?;
                place.insert(Tensor::constant(x, [rows, width])?);
            }
        }
        Ok(inputs)
    }
}

/// `n` numbers from N(0, 1/width).
fn normal(seed: u64, stream: u64, n: usize, width: usize) -> Vec<f32> {
    let sigma = 1.0 / (width as f64).sqrt();
    (0..n).map(|i| (philox::normal(seed, stream, i as u64) * sigma) as f32).collect()
}

fn of<'a>(inputs: &'a BTreeMap<usize, Tensor>, layer: &Linear) -> &'a Tensor {
    &inputs[&layer.inputs()]
}

/// Bytes of what a budget keeps of every trained value.
fn sensitivities(allocator: &Allocator) -> usize {
    allocator.tensors().iter().map(|(_, buffer)| buffer.bytes()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::training::{Bench, Setting};
    use rankfold_adapters::streams::VIRTUAL_TOKENS;
    use rankfold_trainer::model::Precision;

    fn task() -> Task {
        let setting = Setting { seeds: 1, steps: 1, rows: 1, seq: 32, held_out: Some(1), rates: None };
        let bench = Bench::open(setting, None).unwrap();
        Task::plant(&bench.model(&bench.backend, Precision::AsStored, None, 0).unwrap(), 3).unwrap()
    }

    #[test]
    fn what_is_missing_is_the_share_of_the_planted_update_that_is_not_there() {
        let task = task();
        assert_eq!(task.missing(&task.teacher, Draw::HeldOut).unwrap(), 0.0);
        // Half of every update leaves a quarter of the squares: α is halved, all else is the teacher's.
        let mut half = task.teacher.clone();
        for layer in half.iter_mut().filter(|layer| layer.adapter().is_some()) {
            let lora = layer.adapter().unwrap();
            let spec = LoraSpec::new(lora.rank(), lora.rank() as f64 / 2.0);
            let update = Lora::new(layer.path(), lora.a().clone(), lora.b().clone(), Part::None, spec).unwrap();
            layer.set_adapter(update).unwrap();
        }
        // A y is a sum of about 1000 terms in f32 (2⁻²⁴ each) of no more than a few units, an update one of about 1.
        let missing = task.missing(&half, Draw::HeldOut).unwrap();
        assert!((missing - 0.25).abs() < 1e-3, "{missing}");
    }

    /// ‖ΔWx‖² is Σ_ij b_i·b_j (a_i·x)(a_j·x), over n rows on average Σ_ij b_i·b_j a_iᵀS a_j with S near I. Its sum over
    /// the layers has the mean R, their ranks together. With w the least side, the squares (i = j) have a variance of at
    /// most R (2/w + 2 (1/w + 1/n)), the cross terms one of at most 2 Σ r (r − 1) (1/w) (1/w + 1/n).
    #[test]
    fn every_planted_direction_weighs_one() {
        let task = task();
        let w = task.base.iter().map(|layer| layer.inputs().min(layer.outputs())).min().unwrap() as f64;
        let (n, sum) =
            (MEASURED_ROWS as f64, |of: &dyn Fn(f64) -> f64| PLANTED.map(|r| of(r as f64)).iter().sum::<f64>());
        let (ranks, pairs) = (sum(&|r| r), sum(&|r| r * (r - 1.0)));
        let variance = ranks * (2.0 / w + 2.0 * (1.0 / w + 1.0 / n)) + 2.0 * pairs / w * (1.0 / w + 1.0 / n);
        let mean = task.distance(&task.base, Draw::HeldOut).unwrap() / n;
        assert!((mean - ranks).abs() < 5.0 * variance.sqrt(), "{mean} of {ranks}, variance {variance}");
    }

    #[test]
    fn a_task_draws_from_streams_that_no_adapter_has() {
        for draw in [Draw::Order, Draw::Update, Draw::Training, Draw::Tuning, Draw::HeldOut] {
            assert!((VIRTUAL_TOKENS + 1..).contains(&stream(draw, 0)), "{}", draw as u64);
        }
    }
}
