//! Every method that PEFT has against PEFT itself: logits, gradients, a few steps of training, and the folder back.
//!
//! `peft/make.py` made the folders and what PEFT computes with them; every shape, rank and rate is read from them. The
//! bounds are those of the golden vectors (`golden.rs`), which are of the same programs and sizes.

use rankfold_adapters::{Forward, Linear, PeftConfig, Values};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::{Backend, Compute, Format};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use rankfold_reference::ReferenceBackend;
use rankfold_trainer::convert::write_base;
use rankfold_trainer::data::{Batch, tokens};
use rankfold_trainer::model::{Model, ModelConfig, Precision, Quantization};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::product::{Kind, Product};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Logits, relative to the largest of them.
const LOGITS: f64 = 2e-4;
/// Logits after training of one's own, relative to the largest of them.
const TRAINED_LOGITS: f64 = 5e-3;
/// Losses, absolutely; gradients, relative to each tensor's largest entry.
const LOSS_AND_GRADIENTS: f64 = 1e-3;

/// Those that sit beside a base which stays as it is.
const BESIDE: [&str; 6] = ["ia3", "bias_all", "bias_lora_only", "modules_to_save", "prompt", "prefix"];
/// Those that began as a part of it.
const TAKEN_OUT: [&str; 2] = ["pissa", "olora"];

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn folder(case: &str) -> PathBuf {
    tests().join("peft").join(case)
}

fn backends() -> [Arc<dyn Backend>; 2] {
    [Arc::new(CpuBackend::new(None)), Arc::new(ReferenceBackend::new())]
}

fn load(backend: &Arc<dyn Backend>, base: &str, precision: Precision) -> Model {
    open(backend, &tests().join(base), precision)
}

fn open(backend: &Arc<dyn Backend>, folder: &Path, precision: Precision) -> Model {
    let config = ModelConfig::open(folder).unwrap();
    Model::load(backend.clone(), &Checkpoint::open(folder).unwrap(), config, precision).unwrap()
}

/// The model of `base` with the adapter of `case` on it, and the configuration that belongs in its folder.
fn attached(backend: &Arc<dyn Backend>, base: &str, case: &str) -> (Model, PeftConfig) {
    let (mut model, folder) = (load(backend, base, Precision::AsStored), folder(case));
    let config = model.attach(&PeftConfig::open(&folder).unwrap(), Values::Saved(&folder)).unwrap();
    assert!(config.warnings.is_empty(), "{case}: {:?}", config.warnings);
    (model, config.config)
}

/// What PEFT computed with a case's adapter.
struct Vectors {
    case: String,
    io: Checkpoint,
    batch: Batch,
}

impl Vectors {
    fn of(case: &str, model: &Model) -> Self {
        let path = folder(case).join("io.safetensors");
        let batch = tokens::read(&path, model.config.vocab).unwrap();
        Self { case: case.into(), io: Checkpoint::open(&path).unwrap(), batch }
    }

    fn assert_logits(&self, model: &Model, name: &str, bound: f64) {
        let found = model.logits(&model.batch(&self.batch).unwrap(), Compute::F32).unwrap();
        let found: Vec<f32> = model.backend().download(found.view()).unwrap();
        let worst = relative(&found, &self.io.read::<f32>(name).unwrap());
        assert!(worst < bound, "{} on {}: {name} off by {worst:e}", self.case, model.backend().name());
    }

    /// The gradient of every trained parameter, by its name.
    fn assert_gradients(&self, model: &Model) {
        let tape = Tape::new(model.backend().clone());
        let (device, mode) = (model.batch(&self.batch).unwrap(), Forward::evaluation(Compute::F32));
        let (root, _) = model.loss(&tape, &device, device.kept as f64, &mode, false).unwrap();
        let mut gradients = Gradients::new(model.backend().clone());
        tape.backward_from_loss(&root, &mut gradients).unwrap();
        let mut names: Vec<String> = model.parameters().into_iter().map(|n| format!("grad.{}", n.name)).collect();
        let mut expected: Vec<&str> = self.io.names().filter(|name| name.starts_with("grad.")).collect();
        names.sort();
        expected.sort_unstable();
        assert_eq!(names, expected, "{}", self.case);
        for n in model.parameters() {
            let found = model.backend().download::<f32>(gradients.of(&n.parameter).unwrap().view()).unwrap();
            let worst = relative(&found, &self.io.read::<f32>(&format!("grad.{}", n.name)).unwrap());
            assert!(worst < LOSS_AND_GRADIENTS, "{}: gradient of {} off by {worst:e}", self.case, n.name);
        }
    }

    /// The loss before every step, and the logits after the last.
    fn assert_training(&self, model: &Model) {
        let losses = self.io.read::<f32>("losses").unwrap();
        let lr = f64::from(self.io.read::<f32>("lr").unwrap()[0]);
        let recipe = Recipe::new(Schedule { lr, decay: Decay::Constant, warmup: 0, steps: losses.len() });
        let backend = model.backend().clone();
        let mut optimizer = AdamW::new(backend, Moments::F32, Hyper::default(), model.parameters()).unwrap();
        let mut batches = Batches::Fixed(self.batch.clone());
        for (t, expected) in losses.into_iter().enumerate() {
            let pending = gradients(model, &mut batches, &recipe, &optimizer, t + 1).unwrap();
            let off = (pending.apply(&recipe, &mut optimizer, None).unwrap().loss - f64::from(expected)).abs();
            assert!(off < LOSS_AND_GRADIENTS, "{}: the loss before step {} is off by {off:e}", self.case, t + 1);
        }
        self.assert_logits(model, "trained_logits", TRAINED_LOGITS);
    }

    fn assert_all(&self, model: &Model) {
        self.assert_logits(model, "logits", LOGITS);
        self.assert_gradients(model);
        self.assert_training(model);
    }
}

/// The largest difference over the largest expected entry.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let differences = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    // `max` forgets NaN.
    differences.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { d.max(worst) }) / largest
}

/// Every tensor of a folder, by name, with its shape.
fn tensors(folder: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let file = Checkpoint::open(&folder.join("adapter_model.safetensors")).unwrap();
    let mut all: Vec<_> = file
        .names()
        .map(|name| (name.to_owned(), file.info(name).unwrap().shape.clone(), file.read_f32(name).unwrap()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// A configuration, its lists of names in one order, for PEFT's are sets.
fn fields(folder: &Path) -> Value {
    let text = std::fs::read(folder.join("adapter_config.json")).unwrap();
    let mut fields: Value = serde_json::from_slice(&text).unwrap();
    for value in fields.as_object_mut().unwrap().values_mut() {
        if let Value::Array(names) = value {
            names.sort_by_key(ToString::to_string);
        }
    }
    fields
}

/// The folder that others get of a model.
fn written(model: &Model, config: &PeftConfig) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    Product { model, kind: Kind::Adapter(config) }.save(out.path(), false).unwrap();
    out
}

#[test]
fn pefts_adapters_beside_the_base_compute_and_train_as_with_peft() {
    for backend in backends() {
        for case in BESIDE {
            let (model, _) = attached(&backend, "families/llama", case);
            Vectors::of(case, &model).assert_all(&model);
        }
    }
}

#[test]
fn pefts_adapters_beside_the_base_are_written_as_peft_writes_them() {
    let [backend, _] = backends();
    for case in BESIDE {
        let (model, config) = attached(&backend, "families/llama", case);
        let out = written(&model, &config);
        assert_eq!(tensors(out.path()), tensors(&folder(case)), "{case}");
        assert_eq!(fields(out.path()), fields(&folder(case)), "{case}");
    }
}

/// A projected prefix as PEFT has it in memory, and as it saves it: the keys and values that come out.
#[test]
fn pefts_projected_prefix_computes_and_trains_as_with_peft_and_is_written_as_peft_writes_it() {
    for backend in backends() {
        let (saved, flat) = attached(&backend, "families/llama", "prefix_projected");
        let (model, config) = attached(&backend, "families/llama", "prefix_projected/encoder");
        assert_eq!(model.parameters().len(), 5);
        let vectors = Vectors::of("prefix_projected", &model);
        vectors.assert_logits(&saved, "logits", LOGITS);
        let out = written(&model, &config);
        let (found, expected) = (tensors(out.path()), tensors(&folder("prefix_projected")));
        let shapes = |all: &[(String, Vec<usize>, Vec<f32>)]| -> Vec<_> {
            all.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect()
        };
        assert_eq!(shapes(&found), shapes(&expected));
        assert!(relative(&found[0].2, &expected[0].2) < LOGITS);
        assert_eq!(fields(out.path()), fields(&folder("prefix_projected")));
        assert_eq!(fields(written(&saved, &flat).path())["prefix_projection"], false);
        vectors.assert_all(&model);
    }
}

/// The base that such a folder needs is found again from the base as it was.
#[test]
fn pefts_adapters_out_of_the_base_compute_and_train_as_with_peft() {
    for backend in backends() {
        for case in TAKEN_OUT {
            let (model, _) = attached(&backend, "families/llama", case);
            Vectors::of(case, &model).assert_all(&model);
        }
    }
}

/// [B, −B₀] and [A; A₀] beside the base as it was: PEFT's conversion and ours.
#[test]
fn what_others_get_of_adapters_out_of_the_base_is_what_peft_converts_them_to() {
    for backend in backends() {
        for case in TAKEN_OUT {
            let (model, config) = attached(&backend, "families/llama", case);
            let (out, converted) = (written(&model, &config), folder(case).join("converted"));
            assert_eq!(fields(out.path()), fields(&converted), "{case}");
            let shape = |(name, shape, _): (String, Vec<usize>, Vec<f32>)| (name, shape);
            let shapes = |folder: &Path| tensors(folder).into_iter().map(shape).collect::<Vec<_>>();
            assert_eq!(shapes(out.path()), shapes(&converted), "{case}");
            for folder in [out.path(), &converted] {
                let mut plain = load(&backend, "families/llama", Precision::AsStored);
                plain.attach(&PeftConfig::open(folder).unwrap(), Values::Saved(folder)).unwrap();
                Vectors::of(case, &plain).assert_logits(&plain, "logits", LOGITS);
            }
        }
    }
}

/// B·A of a layer, [outputs, inputs] row-major.
fn update(backend: &dyn Backend, layer: &Linear) -> Vec<f32> {
    let lora = layer.adapter().unwrap();
    let [a, b] = [lora.a(), lora.b()].map(|p| backend.download::<f32>(p.tensor().view()).unwrap());
    product(&b, &a, lora.rank())
}

fn product(b: &[f32], a: &[f32], rank: usize) -> Vec<f32> {
    let inputs = a.len() / rank;
    let entry = |i: usize, k: usize| f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs]);
    (0..b.len() / rank * inputs).map(|i| (0..rank).map(|k| entry(i, k)).sum::<f64>() as f32).collect()
}

/// Of −B₀ and A₀, which PEFT's conversion has behind B and A. Each decomposes in its own precision and signs, which the
/// product does not have; its bound is the logits'.
#[test]
fn an_adapter_begins_as_the_part_of_the_base_that_peft_takes() {
    let [backend, _] = backends();
    for case in TAKEN_OUT {
        let mut model = load(&backend, "families/llama", Precision::AsStored);
        model.attach(&PeftConfig::open(&folder(case)).unwrap(), Values::New(0)).unwrap();
        let converted = Checkpoint::open(&folder(case).join("converted/adapter_model.safetensors")).unwrap();
        let mut compared = 0;
        for layer in model.linears().filter(|layer| layer.adapter().is_some()) {
            let name = |end: &str| format!("base_model.model.{}.{end}.weight", layer.path());
            let [a, b] = ["lora_A", "lora_B"].map(|end| converted.read_f32(&name(end)).unwrap());
            let rank = layer.adapter().unwrap().rank();
            let b0: Vec<f32> = b.chunks(2 * rank).flat_map(|row| row[rank..].iter().map(|b| -b)).collect();
            let expected = product(&b0, &a[rank * layer.inputs()..], rank);
            let worst = relative(&update(backend.as_ref(), layer), &expected);
            assert!(worst < LOGITS, "{case}: {} begins {worst:e} off", layer.path());
            compared += 1;
        }
        assert_eq!(compared, converted.names().count() / 2);
    }
}

/// OLoRA on 4 bits: what PEFT's folder was taken out of is what they stand for, and what is left is quantised again.
#[test]
fn pefts_olora_on_a_base_in_4_bits_computes_and_trains_as_with_peft() {
    for backend in backends() {
        let (model, _) = attached(&backend, "golden/qlora_nf4_dq/checkpoint", "olora_nf4_dq");
        assert!(model.has_own_base());
        Vectors::of("olora_nf4_dq", &model).assert_all(&model);
    }
}

/// The base that LoftQ makes and the update that belongs to it, and PEFT's folder on that base.
#[test]
fn loftq_begins_and_trains_as_with_peft() {
    let nf4 = Precision::Quantized(Quantization { format: Format::Nf4, block: 64, double: false });
    let dense = Checkpoint::open(&tests().join("golden/tiny-llama")).unwrap();
    let dense = |path: &str| Ok(dense.read_f32(&format!("{path}.weight"))?);
    for backend in backends() {
        let (mut model, folder) = (load(&backend, "golden/tiny-llama", nf4), folder("loftq"));
        let config = PeftConfig::open(&folder).unwrap();
        model.attach_remade(config.lora().unwrap(), &dense).unwrap();
        let vectors = Vectors::of("loftq", &model);
        vectors.assert_logits(&model, "logits", LOGITS);
        let begun: Vec<Vec<f32>> = model.linears().map(|layer| update(backend.as_ref(), layer)).collect();
        let (base, dense) =
            (tempfile::tempdir().unwrap(), Checkpoint::open(&tests().join("golden/tiny-llama")).unwrap());
        write_base(&model, &dense, base.path()).unwrap();
        let mut model = open(&backend, base.path(), Precision::AsStored);
        model.attach(&config, Values::Saved(&folder)).unwrap();
        for (layer, begun) in model.linears().zip(begun) {
            let worst = relative(&begun, &update(backend.as_ref(), layer));
            assert!(worst < LOGITS, "{} begins {worst:e} off", layer.path());
        }
        vectors.assert_all(&model);
    }
}
