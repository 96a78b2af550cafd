//! Micro-batches add up to the batch of all their rows.

use rankfold_adapters::Forward;
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::Compute;
use rankfold_files::Checkpoint;
use rankfold_reference::ReferenceBackend;
use rankfold_trainer::data::{Example, Loader, Shape};
use rankfold_trainer::model::{DeviceBatch, Model, ModelConfig, Precision};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use std::path::Path;
use std::sync::Arc;

const SEQ: usize = 12;
const ROWS: usize = 4;
/// Half the distance from 1 to the next f32.
const UNIT: f64 = f32::EPSILON as f64 / 2.0;

/// The model whose head is its own: each weight is used once a micro-batch.
fn model() -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families/llama");
    let config = ModelConfig::open(&folder).unwrap();
    assert!(!config.tied);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    Model::load(Arc::new(ReferenceBackend::new()), &checkpoint, config, Precision::Trained).unwrap()
}

/// `ROWS` rows, a step's, in `accumulate` micro-batches. Each is an example of its own; the first teaches its last
/// token, the second its last four, and so on.
fn loader(accumulate: usize) -> Loader {
    let example = |row: usize| {
        let ids = (0..SEQ).map(|t| ((row * 31 + t * t * 7) % 96) as u32).collect();
        let taught = SEQ - 1 - 3 * row..SEQ;
        Example { ids, taught: vec![taught], running: false, characters: 0 }
    };
    let shape = Shape { rows: ROWS / accumulate, seq: SEQ, accumulate };
    Loader::new((0..ROWS).map(example).collect(), shape, 5, 0).unwrap()
}

/// A parameter: its gradient in a step, and its values after it.
struct Trained {
    name: String,
    gradient: Vec<f32>,
    values: Vec<f32>,
}

/// One step's loss and what became of the parameters.
///
/// With β1 = β2 = 0 the first moment is the gradient, and with ε = 1 the update at rate 1 is g/(|g| + 1), which
/// depends on the gradient's size and no more strongly than linearly.
fn step(accumulate: usize) -> (f64, Vec<Trained>) {
    let model = model();
    let backend = model.backend().clone();
    let schedule = Schedule { lr: 1.0, decay: Decay::Constant, warmup: 0, steps: 1 };
    let recipe = Recipe { accumulate, ..Recipe::new(schedule) };
    let hyper = Hyper { beta1: 0.0, beta2: 0.0, eps: 1.0, ..Hyper::default() };
    let mut optimizer = AdamW::new(backend.clone(), Moments::F32, hyper, model.parameters()).unwrap();
    let mut batches = Batches::Loader(Box::new(loader(accumulate)));
    let pending = gradients(&model, &mut batches, &recipe, &optimizer, 1).unwrap();
    let loss = pending.apply(&recipe, &mut optimizer, None).unwrap().loss;
    let trained = optimizer.slots.into_iter().map(|slot| Trained {
        gradient: backend.download(slot.state.tensors()[0].1.view()).unwrap(),
        values: backend.download(slot.named.parameter.tensor().view()).unwrap(),
        name: slot.named.name,
    });
    (loss, trained.collect())
}

/// Σ over the two micro-batches of |gradient|, by parameter: each of the loss over all of the step's targets.
fn magnitudes() -> Vec<Vec<f64>> {
    let model = model();
    let backend = model.backend().clone();
    let batches = [0, 1].map(|micro| loader(2).batch(0, micro));
    assert_ne!(batches[0].targets(), batches[1].targets());
    let kept = batches.iter().map(|batch| batch.targets()).sum::<usize>() as f64;
    let mut sums: Vec<Vec<f64>> =
        model.parameters().iter().map(|n| vec![0.0; n.parameter.shape().elements()]).collect();
    for batch in &batches {
        let device = DeviceBatch::new(backend.as_ref(), batch).unwrap();
        let tape = Tape::new(backend.clone());
        let (root, _) = model.loss(&tape, &device, kept, &Forward::evaluation(Compute::F32), false).unwrap();
        let mut gradients = Gradients::new(backend.clone());
        tape.backward_from_loss(&root, &mut gradients).unwrap();
        for (sums, n) in sums.iter_mut().zip(model.parameters()) {
            let grad = backend.download::<f32>(gradients.of(&n.parameter).unwrap().view()).unwrap();
            sums.iter_mut().zip(grad).for_each(|(sum, g)| *sum += f64::from(g.abs()));
        }
    }
    sums
}

/// `reference` forms every row by itself and sums in f64, so the two ways differ only in where a sum over tokens is
/// rounded to f32: once at its end, or after the first micro-batch (off by u·|g₁|) and at the end (u·|g₁ + g₂|).
/// Together that is at most 3·u·(|g₁| + |g₂|), and one u more for all of second order. The first update moves by no
/// more, and both ways round the parameter once. The loss is a sum, in f64, of losses that are the same to the bit;
/// either way has fewer additions and divisions than the step has tokens, each off by half an epsilon.
#[test]
fn two_micro_batches_of_unlike_counts_make_the_step_of_one_batch_of_all_their_rows() {
    let ((loss, one), (micro_loss, two)) = (step(1), step(2));
    assert!((micro_loss - loss).abs() <= (ROWS * SEQ) as f64 * f64::EPSILON * loss, "{micro_loss}, {loss}");
    let magnitudes = magnitudes();
    assert!(!one.is_empty() && one.len() == two.len() && one.len() == magnitudes.len());
    for ((one, two), magnitudes) in one.into_iter().zip(two).zip(magnitudes) {
        let name = &one.name;
        assert!(magnitudes.iter().any(|m| *m > 0.0), "{name} has no gradient");
        for (i, magnitude) in magnitudes.into_iter().enumerate() {
            let ([a, b], moved) = ([one.gradient[i], two.gradient[i]].map(f64::from), 4.0 * UNIT * magnitude);
            assert!((b - a).abs() <= moved, "{name}[{i}]: gradients {a:e} and {b:e}");
            let [a, b] = [one.values[i], two.values[i]].map(f64::from);
            let bound = moved + UNIT * (a.abs() + b.abs());
            assert!((b - a).abs() <= bound, "{name}[{i}]: {a:e} and {b:e} after the update");
        }
    }
}
