//! The gradients of whole models, of every method, against finite differences in f64.
//!
//! A step of training is taken as a run takes it, by [`gradients`] and the optimiser, on a backend that is `reference`
//! with f64 in place of f32. With β₁ = 0 the optimiser's first moment is the gradient; at a rate of 0 it moves nothing.
//! Noise is held: dropout and gates are drawn from the step's number. So are the norms that DoRA takes for constants
//! (Liu et al. 2024, §4.3): m is moved so that m/‖W + sBA‖ stays what it was.
//!
//! For a tensor p and a direction d of norm 1, with D(h) = L(p + h·d) − L(p − h·d), the difference
//!
//! ```text
//! (8·D(h) − D(2h)) / 12h  =  ⟨∂L/∂p, d⟩ − h⁴/30·L⁽⁵⁾ + …
//! ```
//!
//! is off by 3·10⁻¹⁸·L⁽⁵⁾ from truncation with h = 10⁻⁴, which is nothing, and by 1.5·δ/h from rounding, δ the error of
//! an L that is near 5. L comes through some 20 operations in a row, whose longest sums have 96 terms: if roundings are
//! independent, δ is near √(20·96)·2⁻⁵³·5 = 2.4·10⁻¹⁴ and the difference off by 4·10⁻¹⁰. [`ALLOWED`] is five times that;
//! measured are 2.4·10⁻¹¹ at the most. (At the kinks of relu and of a clamped gate a difference is no derivative; the
//! draws have none of them within 2h.)

#[path = "../common/as_reference.rs"]
#[macro_use]
mod as_reference;
mod in_f64;

use in_f64::InF64;
use rankfold_adapters::adalora::AdaLora;
use rankfold_adapters::bottleneck::Placement;
use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{
    AdapterConfig, Bias, DropoutKey, Form, Forward, Lora, LoraSpec, Part, PeftConfig, Relative, RelativeConfig,
    Targets, Values, VirtualConfig, merged_weight,
};
use rankfold_autograd::{Gradients, Parameter, Tape};
use rankfold_backend::params::{IGNORED, Rows};
use rankfold_backend::{Backend, Buffer, Compute, DType, Format, philox};
use rankfold_files::Checkpoint;
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{Model, ModelConfig, Precision, Quantization};
use rankfold_trainer::objective::Terms;
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use std::path::Path;
use std::sync::Arc;

/// h
const STEP: f64 = 1e-4;
/// Of a derivative in a direction of norm 1, absolutely.
const ALLOWED: f64 = 2e-9;
/// The least that a tensor's largest derivative by an element may be, so that six digits of it are checked.
const LEAST: f64 = 1e6 * ALLOWED;
/// Of dropout and of the gates' noise.
const SEED: u64 = 5;
/// By how much every trained element is moved from where it begins, at random.
const AWAY: f64 = 0.2;

/// What a base is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum On {
    /// Llama with biases and a head of its own, in f32.
    Dense,
    /// Qwen 2, whose head is its embedding, its linear layers in NF4.
    FourBits,
}

/// A model that trains, and what it trains on.
struct Case {
    name: String,
    model: Model,
    batch: Batch,
    terms: Terms,
}

fn load(folder: &str, precision: Precision) -> (Arc<InF64>, Model) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families").join(folder);
    let (backend, config) = (Arc::new(InF64::default()), ModelConfig::open(&folder).unwrap());
    let model = Model::load(backend.clone(), &Checkpoint::open(&folder).unwrap(), config, precision).unwrap();
    (backend, model)
}

/// Two rows of six tokens, one of which is no target. The second row is of two documents, unless there are learned
/// tokens before it.
fn batch(packed: bool) -> Batch {
    let ids: Vec<u32> = (0..12).map(|i| (i * i * 7 + i) % 96).collect();
    let mut labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    labels[3] = IGNORED;
    let mut batch =
        Batch { ids, labels, positions: (0..2).flat_map(|_| 0..6).collect(), starts: vec![0; 12], rows: 2, seq: 6 };
    if packed {
        batch.starts[8..].fill(2);
        batch.positions[8..].copy_from_slice(&[0, 1, 2, 3]);
        batch.labels[8] = IGNORED;
    }
    batch
}

impl Case {
    /// An adapter on a base.
    fn of(name: &str, on: On, config: &PeftConfig) -> Self {
        let nf4 = Quantization { format: Format::Nf4, block: 64, double: true };
        let (backend, mut model) = match on {
            On::Dense => load("llama", Precision::AsStored),
            On::FourBits => load("qwen2", Precision::Quantized(nf4)),
        };
        let config = model.attach(config, Values::New(3)).unwrap().config;
        let batch = batch(model.virtual_tokens().is_none());
        Self { name: format!("{name}, {on:?}"), model, batch, terms: Terms::of(&config) }.begin(&backend)
    }

    /// All of a model.
    fn whole(folder: &str) -> Self {
        let (backend, model) = load(folder, Precision::Trained);
        Self { name: format!("full, {folder}"), model, batch: batch(true), terms: Terms::default() }.begin(&backend)
    }

    /// From here on in f64, every parameter away from its first values, of which some are zeros.
    fn begin(self, backend: &InF64) -> Self {
        for (stream, (_, parameter)) in self.parameters().iter().enumerate() {
            let value: Vec<f32> = self.backend().download(parameter.tensor().view()).unwrap();
            let moved = |(x, i): (f32, u64)| f64::from(x) + AWAY * philox::normal(7, stream as u64, i);
            self.set(parameter, &value.into_iter().zip(0..).map(moved).collect::<Vec<_>>());
        }
        backend.begin();
        self
    }

    fn backend(&self) -> &Arc<dyn Backend> {
        self.model.backend()
    }

    fn parameters(&self) -> Vec<(String, Parameter)> {
        self.model.parameters().into_iter().map(|named| (named.name, named.parameter)).collect()
    }

    fn get(&self, parameter: &Parameter) -> Vec<f64> {
        self.backend().download(parameter.tensor().view()).unwrap()
    }

    fn set(&self, parameter: &Parameter, value: &[f64]) {
        let value = self.backend().upload(value).unwrap();
        let set = |buffer: &mut Buffer| {
            *buffer = value;
            Ok(())
        };
        parameter.update(set).unwrap();
    }

    /// The objective before a step of training, and the gradients that the step uses.
    fn step(&self, checkpointing: bool) -> (f64, Vec<Vec<f64>>) {
        let schedule = Schedule { lr: 0.0, decay: Decay::Constant, warmup: 0, steps: 1 };
        let recipe = Recipe { seed: SEED, checkpointing, terms: self.terms, ..Recipe::new(schedule) };
        let hyper = Hyper { beta1: 0.0, ..Hyper::default() };
        let parameters = self.model.parameters();
        let mut optimizer = AdamW::new(self.backend().clone(), Moments::F32, hyper, parameters).unwrap();
        let mut batches = Batches::Fixed(self.batch.clone());
        let pending = gradients(&self.model, &mut batches, &recipe, &optimizer, 1).unwrap();
        let loss = pending.apply(&recipe, &mut optimizer, None).unwrap().loss;
        let first_moment = |buffer| self.backend().download(buffer).unwrap();
        (loss, optimizer.slots.iter().map(|slot| first_moment(slot.state.tensors()[0].1.view())).collect())
    }

    /// The objective alone.
    fn objective(&self) -> f64 {
        let mode = Forward { compute: Compute::F32, dropout: Some(DropoutKey { seed: SEED, draw: 0 }) };
        let (tape, batch) = (Tape::inference(self.backend().clone()), self.model.batch(&self.batch).unwrap());
        let kept = self.model.targets(&self.batch) as f64;
        let (_, loss) = self.model.loss(&tape, &batch, kept, &mode, false).unwrap();
        let mut unused = Gradients::new(self.backend().clone());
        loss + self.terms.add_to(self.backend(), self.model.linears(), &mut unused).unwrap().value
    }

    /// Every m of DoRA with its ‖W + sBA‖.
    fn norms(&self) -> Vec<(Parameter, Vec<f64>)> {
        let of = |lora: &Lora, linear: &rankfold_adapters::Linear| {
            let Part::Magnitude(m) = lora.part() else { return None };
            let (backend, plain) = (self.backend().as_ref(), LoraSpec { form: Form::Plain, ..*lora.spec() });
            let update = Lora::new("", lora.a().clone(), lora.b().clone(), Part::None, plain).unwrap();
            let sum = merged_weight(backend, "", &linear.base(), &update, DType::F32).unwrap();
            let p = Rows { rows: linear.outputs(), width: linear.inputs() };
            let mut norms = backend.alloc(DType::F32, p.rows).unwrap();
            backend.row_norms(&p, sum.view(), norms.view_mut()).unwrap();
            Some((m.clone(), backend.download(norms.view()).unwrap()))
        };
        self.model.linears().filter_map(|linear| of(linear.adapter()?, linear)).collect()
    }

    /// The objective where a parameter has another value.
    fn objective_at(&self, parameter: &Parameter, value: &[f64]) -> f64 {
        let (before, norms) = (self.get(parameter), self.norms());
        let magnitudes: Vec<Vec<f64>> = norms.iter().map(|(m, _)| self.get(m)).collect();
        self.set(parameter, value);
        for ((m, norms), (_, moved)) in norms.iter().zip(self.norms()) {
            let held = self.get(m).into_iter().zip(norms.iter().zip(moved)).map(|(m, (norm, moved))| m * moved / norm);
            self.set(m, &held.collect::<Vec<_>>());
        }
        let objective = self.objective();
        norms.iter().zip(magnitudes).for_each(|((m, _), before)| self.set(m, &before));
        self.set(parameter, &before);
        objective
    }

    /// The derivative by a parameter in a direction of norm 1.
    fn difference(&self, parameter: &Parameter, direction: &[f64]) -> f64 {
        let value = self.get(parameter);
        let at = |h: f64| {
            let moved: Vec<f64> = value.iter().zip(direction).map(|(x, d)| x + h * d).collect();
            self.objective_at(parameter, &moved)
        };
        let across = |h: f64| at(h) - at(-h);
        (8.0 * across(STEP) - across(2.0 * STEP)) / (12.0 * STEP)
    }

    /// Every trained tensor's gradient in a random direction, by its element of the largest gradient and by another.
    fn check(&self) {
        let (loss, found) = self.step(false);
        assert_eq!(loss, self.objective(), "{}", self.name);
        assert!((loss, &found) == (self.step(true).0, &self.step(true).1), "{}: checkpointing", self.name);
        let parameters = self.parameters();
        assert!(!parameters.is_empty() && parameters.len() == found.len());
        for (stream, ((name, parameter), gradient)) in parameters.iter().zip(&found).enumerate() {
            let (n, stream) = (gradient.len(), stream as u64);
            let largest = (0..n).max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs())).unwrap();
            assert!(gradient[largest].abs() >= LEAST, "{}, {name}: {:e} at most", self.name, gradient[largest]);
            let one = |at: usize| (0..n).map(|i| f64::from(u8::from(i == at))).collect::<Vec<_>>();
            let random: Vec<f64> = (0..n as u64).map(|i| philox::normal(8, stream, i)).collect();
            let norm = random.iter().map(|x| x * x).sum::<f64>().sqrt();
            let random: Vec<f64> = random.into_iter().map(|x| x / norm).collect();
            for direction in [random, one(largest), one(philox::word(9, stream, 0) as usize % n)] {
                let expected = self.difference(parameter, &direction);
                let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
                let off = (along - expected).abs();
                assert!(off <= ALLOWED, "{}, {name}: {along:e}, by differences {expected:e}", self.name);
            }
        }
    }
}

/// A method on both bases.
fn check(name: &str, config: impl Into<PeftConfig>) {
    let config = config.into();
    [On::Dense, On::FourBits].into_iter().for_each(|on| Case::of(name, on, &config).check());
}

fn low_rank(spec: LoraSpec) -> AdapterConfig {
    AdapterConfig { spec, targets: Targets::AllLinear, ..AdapterConfig::default() }
}

const LORA: LoraSpec = LoraSpec { rank: 3, alpha: 4.0, rslora: false, dropout: 0.0, form: Form::Plain };

#[test]
fn lora_and_rslora_have_the_gradients_of_differences() {
    check("LoRA", low_rank(LORA));
    check("rsLoRA under dropout", low_rank(LoraSpec { rslora: true, dropout: 0.25, ..LORA }));
}

#[test]
fn biases_and_modules_beside_lora_have_the_gradients_of_differences() {
    let saved = |names: &[&str]| AdapterConfig {
        bias: Bias::All,
        modules_to_save: names.iter().map(|name| name.to_string()).collect(),
        ..low_rank(LORA)
    };
    Case::of("LoRA, biases, modules", On::Dense, &saved(&["embed_tokens", "lm_head", "norm"]).into()).check();
    // Where the two are one matrix, norms alone.
    Case::of("LoRA, biases, norms", On::FourBits, &saved(&["norm"]).into()).check();
}

#[test]
fn dora_has_the_gradients_of_differences_at_held_norms() {
    check("DoRA", low_rank(LoraSpec { form: Form::Dora, ..LORA }));
    check("DoRA under dropout", low_rank(LoraSpec { form: Form::Dora, dropout: 0.25, ..LORA }));
}

#[test]
fn adalora_with_its_orthogonality_has_the_gradients_of_differences() {
    for squared in [false, true] {
        let adalora = Some(AdaLora { target_rank: 2, squared, ..AdaLora::default() });
        check("AdaLoRA", AdapterConfig { adalora, ..low_rank(LoraSpec { form: Form::AdaLora, ..LORA }) });
    }
}

#[test]
fn full_finetuning_has_the_gradients_of_differences() {
    // A head of its own; the embedding, with norms of q and k.
    for folder in ["llama", "qwen3"] {
        let case = Case::whole(folder);
        assert_eq!(case.model.config.tied, folder == "qwen3");
        case.check();
    }
}

#[test]
fn relatives_have_the_gradients_of_differences() {
    let bottleneck = |placement| Relative::Bottleneck { placement, bottleneck: 4 };
    let all = [
        Relative::Ia3 { feed_forward: None },
        Relative::BitFit,
        bottleneck(Placement::Houlsby),
        bottleneck(Placement::Pfeiffer),
    ];
    for method in all {
        check(method.peft_type(), PeftConfig::Relative(RelativeConfig::new(method)));
    }
}

#[test]
fn diff_pruning_with_its_noise_held_has_the_gradients_of_differences() {
    check("diff pruning", PeftConfig::Relative(RelativeConfig::new(Relative::Diff { penalty: 3.0 })));
}

#[test]
fn learned_tokens_have_the_gradients_of_differences() {
    for kind in [Kind::Prompt, Kind::Prefix { projection: false }, Kind::Prefix { projection: true }] {
        check(&format!("{kind:?}"), PeftConfig::Virtual(VirtualConfig::new(kind, 3)));
    }
}
