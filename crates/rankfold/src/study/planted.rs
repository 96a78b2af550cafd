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
use rankfold_adapters::adalora::{Allocator, Prune, orthogonality};
use rankfold_adapters::streams::{LAYERS, RESERVED};
use rankfold_adapters::{AdapterConfig, Forward, Linear, Lora, LoraSpec, Part, attach_new};
use rankfold_autograd::{Gradients, Parameter, Tape, Tensor};
use rankfold_backend::{Backend, Buffer, Compute, DType, philox};
use rankfold_trainer::model::Model;
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
    RESERVED + LAYERS + ((draw as u64) << 40) + number as u64
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
        let steps = schedule.steps;
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
            if let Some(adalora) = &config.adalora {
                let tape = Tape::new(self.backend.clone());
                if let Some((term, _)) = orthogonality(&tape, &layers, adalora.squared)? {
                    tape.backward(&term, backend.filled(DType::F32, 1, adalora.orthogonality)?, &mut gradients)?;
                }
            }
            let scale = clip_scale(optimizer.grad_norm(&gradients)?, 1.0);
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
        let inputs = self.inputs(draw, 0, MEASURED_ROWS)?;
        let tape = Tape::inference(self.backend.clone());
        let (mut missing, mut planted) = (0.0, 0.0);
        for ((layer, base), target) in layers.iter().zip(&self.base).zip(self.targets(&inputs)?) {
            let mode = Forward::evaluation(Compute::F32);
            let y = layer.forward(&tape, of(&inputs, layer), &mode)?;
            let before = base.forward(&tape, of(&inputs, base), &mode)?;
            planted += self.backend.sum_squares(self.residual(&before, target.clone())?.view())?;
            missing += self.backend.sum_squares(self.residual(&y, target)?.view())?;
        }
        Ok(missing / planted)
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
