//! Whole models against torch, transformers and PEFT: logits, losses, gradients, and twenty steps of training.
//!
//! The vectors lie in the folder that `RANKFOLD_GOLDEN` names, or in the project's own copy; every shape, rank, rate
//! and number of steps is read from them. Bounds are those that the vectors' makers ask for: the peers themselves
//! differ by up to 2e-5 between two machines.

#[path = "common/vectors.rs"]
mod vectors;

use rankfold_adapters::adalora::{AdaLora, Allocator, Prune};
use rankfold_adapters::{Forward, PeftConfig, Values};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
use rankfold_cuda::CudaBackend;
use rankfold_files::Checkpoint;
use rankfold_reference::ReferenceBackend;
use rankfold_trainer::data::{Batch, tokens};
use rankfold_trainer::model::{DeviceBatch, Model, ModelConfig, Precision};
use rankfold_trainer::objective::Terms;
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, StepMetrics, evaluate, gradients};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use vectors::golden;

/// Logits, relative to the largest of them.
const LOGITS: f64 = 2e-4;
/// Logits after training of one's own, relative to the largest of them.
const TRAINED_LOGITS: f64 = 5e-3;
/// Losses, absolutely; gradients, relative to each tensor's largest entry.
const LOSS_AND_GRADIENTS: f64 = 1e-3;

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(None))
}

/// Every backend that trains: the CPU, the CUDA kernels on the host, and on a GPU where there is one.
fn backends() -> Vec<Arc<dyn Backend>> {
    let mut all = vec![cpu()];
    for cuda in [CudaBackend::on_host(None), CudaBackend::on_gpu()] {
        match cuda {
            Ok(backend) => all.push(Arc::new(backend)),
            // Past the test runner, which keeps what passing tests print.
            Err(missing) => drop(writeln!(std::io::stderr(), "skipped: {missing}")),
        }
    }
    all
}

fn load(backend: &Arc<dyn Backend>, folder: &Path, precision: Precision) -> Model {
    let config = ModelConfig::open(folder).unwrap();
    Model::load(backend.clone(), &Checkpoint::open(folder).unwrap(), config, precision).unwrap()
}

fn batch(model: &Model) -> Batch {
    tokens::read(&golden().join("tiny-llama-io.safetensors"), model.config.vocab).unwrap()
}

/// The largest difference over the largest expected entry.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let worst = found.iter().zip(expected).map(|(a, b)| {
        assert!(a.is_finite());
        f64::from((a - b).abs())
    });
    let worst = worst.fold(0.0, f64::max);
    if largest == 0.0 { worst } else { worst / largest }
}

fn assert_logits_and_loss(model: &Model, vectors: &Path, logits_bound: f64, with_loss: bool) {
    let (batch, expected) = (batch(model), Checkpoint::open(vectors).unwrap());
    let device = DeviceBatch::new(model.backend().as_ref(), &batch).unwrap();
    let logits = model.logits(&device, Compute::F32).unwrap();
    let logits = model.backend().download::<f32>(logits.view()).unwrap();
    let worst = relative(&logits, &expected.read::<f32>("logits").unwrap());
    assert!(worst < logits_bound, "{}: logits off by {worst:e}", vectors.display());
    if with_loss {
        let (loss, _) = evaluate(model, [batch], Compute::F32).unwrap();
        let expected = f64::from(expected.read::<f32>("loss").unwrap()[0]);
        assert!((loss - expected).abs() < LOSS_AND_GRADIENTS, "{}: loss {loss}, {expected}", vectors.display());
    }
}

/// The gradient of every trained parameter, by name, against the file's tensors of the name that `key` gives.
fn assert_gradients(model: &Model, vectors: &Checkpoint, terms: Terms, key: impl Fn(&str) -> String) {
    let device = DeviceBatch::new(model.backend().as_ref(), &batch(model)).unwrap();
    let tape = Tape::new(model.backend().clone());
    let mode = Forward::evaluation(Compute::F32);
    let (root, _) = model.loss(&tape, &device, device.kept as f64, &mode, false).unwrap();
    let mut gradients = Gradients::new(model.backend().clone());
    tape.backward_from_loss(&root, &mut gradients).unwrap();
    terms.add_to(model.backend(), model.linears(), &mut gradients).unwrap();
    let named = model.parameters();
    assert!(!named.is_empty());
    for n in &named {
        let expected = vectors.read::<f32>(&key(&n.name)).unwrap();
        let found = match gradients.of(&n.parameter) {
            Some(grad) => model.backend().download::<f32>(grad.view()).unwrap(),
            None => vec![0.0; expected.len()],
        };
        let worst = relative(&found, &expected);
        assert!(worst < LOSS_AND_GRADIENTS, "{}: gradient off by {worst:e}", n.name);
    }
}

#[test]
fn golden_base_logits_and_loss() {
    let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::new());
    for backend in backends().into_iter().chain([reference]) {
        let model = load(&backend, &golden().join("tiny-llama"), Precision::AsStored);
        assert_logits_and_loss(&model, &golden().join("tiny-llama-io.safetensors"), LOGITS, true);
    }
}

#[test]
fn golden_gradient_of_every_weight() {
    for backend in backends() {
        let model = load(&backend, &golden().join("tiny-llama"), Precision::Trained);
        let vectors = Checkpoint::open(&golden().join("tiny-llama-io.safetensors")).unwrap();
        let trained = model.parameters().len();
        assert_eq!(trained, vectors.names().filter(|name| name.starts_with("grad.")).count());
        assert_gradients(&model, &vectors, Terms::default(), |name| format!("grad.{name}"));
    }
}

/// The name of an adapter tensor's gradient: that of PEFT's module in memory.
fn peft_gradient(name: &str) -> String {
    match name.strip_suffix(".weight") {
        Some(module) => format!("{module}.default.weight"),
        None if name.ends_with("lora_magnitude_vector") => format!("{name}.default.weight"),
        None => format!("{name}.default"),
    }
}

/// One of the folders on every backend.
fn follow(case: &str) {
    backends().into_iter().for_each(|backend| follow_on(backend, case));
}

/// Step-0 gradients, the loss before every step, and the logits at the end.
fn follow_on(backend: Arc<dyn Backend>, case: &str) {
    let folder = golden().join(case);
    let quantised = folder.join("checkpoint");
    let base = if quantised.exists() { quantised.clone() } else { golden().join("tiny-llama") };
    let name = backend.name();
    let mut model = load(&backend, &base, Precision::AsStored);
    if quantised.exists() {
        assert_logits_and_loss(&model, &folder.join("base_io.safetensors"), LOGITS, true);
    }
    let init = folder.join("init");
    let adapter = model.attach(&PeftConfig::open(&init).unwrap(), Values::Saved(&init)).unwrap().config;
    let terms = Terms::of(&adapter);
    let vectors = Checkpoint::open(&folder.join("grads_step0.safetensors")).unwrap();
    assert_eq!(vectors.names().count(), model.parameters().len());
    assert_gradients(&model, &vectors, terms, peft_gradient);

    let trajectory: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("trajectory.json")).unwrap()).unwrap();
    let steps = trajectory["steps"].as_u64().unwrap() as usize;
    let schedule = Schedule { lr: trajectory["lr"].as_f64().unwrap(), decay: Decay::Constant, warmup: 0, steps };
    let recipe = Recipe { checkpointing: case == "rslora", terms, ..Recipe::new(schedule) };
    let allocator =
        |adalora: &AdaLora| Allocator::new(backend.as_ref(), adalora, Prune::Mask, steps, model.linears()).unwrap();
    let mut allocator = adapter.lora().and_then(|lora| lora.adalora.as_ref()).map(allocator);
    let mut optimizer = AdamW::new(backend.clone(), Moments::F32, Hyper::default(), model.parameters()).unwrap();
    let mut batches = Batches::Fixed(batch(&model));
    for (t, expected) in trajectory["losses"].as_array().unwrap().iter().enumerate() {
        let pending = gradients(&model, &mut batches, &recipe, &optimizer, t + 1).unwrap();
        let spender = allocator.as_mut().map(|allocator| (allocator, &mut model));
        let StepMetrics { loss, spent, .. } = pending.apply(&recipe, &mut optimizer, spender).unwrap();
        let off = (loss - expected.as_f64().unwrap()).abs();
        assert!(off < LOSS_AND_GRADIENTS, "{case} on {name}: the loss before step {} is off by {off:e}", t + 1);
        for (path, rank) in spent.into_iter().flat_map(|spent| spent.ranks) {
            let key = format!("base_model.model.{path}.lora_E.default");
            assert_eq!(trajectory["nonzero_E"][t][&key], rank, "{case} on {name}: {path} after step {}", t + 1);
        }
    }
    assert_eq!(trajectory["losses"].as_array().unwrap().len(), steps);
    assert_logits_and_loss(&model, &folder.join("final_io.safetensors"), TRAINED_LOGITS, false);
}

#[test]
fn golden_lora_trajectory() {
    follow("lora");
}

/// Run with checkpointed blocks: recomputation must change nothing.
#[test]
fn golden_rslora_trajectory() {
    follow("rslora");
}

#[test]
fn golden_lora_default_init_trajectory() {
    follow("lora_default_init");
}

#[test]
fn golden_qlora_nf4_dq_trajectory() {
    follow("qlora_nf4_dq");
}

#[test]
fn golden_qlora_fp4_dq_trajectory() {
    follow("qlora_fp4_dq");
}

#[test]
fn golden_qlora_nf4_trajectory() {
    follow("qlora_nf4");
}

#[test]
fn golden_dora_trajectory() {
    follow("dora");
}

/// With the ranks of every module at every step.
#[test]
fn golden_adalora_trajectory() {
    follow("adalora");
}
