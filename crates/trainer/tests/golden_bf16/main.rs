//! Whole models with `--compute bf16` against the peers' f32 figures, within a bound computed from the model itself.
//!
//! Both inputs of every product are rounded to the 8 bits of bf16, to nearest: x becomes x·(1 + δ) with |δ| ≤ u = 2⁻⁸.
//! To first order a loss L then changes by Σ a_i·δ_i over all that is rounded, a_i = x_i·∂L/∂x_i (`sensitivity.rs`
//! derives and computes them, in f64). So
//!
//! ```text
//! |ΔL| ≤ u·Σ|a_i|                   whatever the errors are
//! |ΔL| ≤ 6·u·√(Σ a_i²)              but for a chance of 2·e⁻¹⁸ = 3·10⁻⁸, were they independent and of mean 0
//!                                   (Hoeffding 1963, thm 2, of terms within ±u·|a_i|)
//! ```
//!
//! The terms of second order are left out: each is u·(products on a path, 15) = 6 % of one of the first's. Measured are
//! 1 % of the first bound at the most, and 18 % of the second. A rounding that is a little coarser keeps within both, but
//! many losses together show it: errors uniform in ±u have the standard deviation σ = u·√(Σ a_i²/3), and the root mean
//! square of ΔL/σ, which is 0.6 to 0.8 here, rises with a bit less, or with truncation, as the last test has it.
//!
//! A loss is that of the vectors' own labels, or of one label at one place, drawn: of any labels the peers' loss follows
//! from their logits. Trajectories have no such bound: Adam's first steps are of the rate's size whatever the gradient's,
//! and a rounding that turns the sign of a small one turns the step.

#[path = "../common/as_reference.rs"]
#[macro_use]
mod as_reference;
mod planted;
mod sensitivity;
#[path = "../common/vectors.rs"]
mod vectors;

use planted::Planted;
use rankfold_adapters::{AdapterConfig, Forward, PeftConfig, Targets, Values};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::params::IGNORED;
use rankfold_backend::{Backend, Buffer, Compute, philox};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use rankfold_trainer::data::{Batch, tokens};
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use rankfold_trainer::objective::Terms;
use rankfold_trainer::step::evaluate;
use sensitivity::Noting;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// u
const UNIT: f64 = 1.0 / 256.0;
/// What the peers themselves differ by between two machines.
const PEERS: f64 = 2e-5;
/// Losses of one label each.
const DRAWN: usize = 24;
/// The most of the root mean square of ΔL/σ. x is rounded within u·2^⌊log₂|x|⌋, which for mantissas m that are spread
/// log-uniformly makes σ·√(mean of 1/m²) = 0.74·σ; of n such losses the root mean square is off by 1/√2n of that, one
/// standard deviation. Five of them, with n = 25: 1.26.
const MOST_SPREAD: f64 = 1.26;

fn own(path: &str) -> PathBuf {
    vectors::own().join(path)
}

fn golden(path: &str) -> PathBuf {
    vectors::golden().join(path)
}

fn load(backend: Arc<dyn Backend>, folder: &Path) -> Model {
    let config = ModelConfig::open(folder).unwrap();
    Model::load(backend, &Checkpoint::open(folder).unwrap(), config, Precision::AsStored).unwrap()
}

/// A model of the vectors: a base, with or without an adapter.
struct Case {
    base: PathBuf,
    adapter: Option<PathBuf>,
}

/// A loss that the peers have: its batch, and its value in f32.
struct Loss {
    batch: Batch,
    expected: f64,
}

/// ΔL over its first bound, over its second, and over σ.
#[derive(Debug)]
struct Off {
    any: f64,
    independent: f64,
    deviations: f64,
}

impl Case {
    fn model(&self, backend: Arc<dyn Backend>) -> Model {
        let mut model = load(backend, &self.base);
        if let Some(folder) = &self.adapter {
            model.attach(&PeftConfig::open(folder).unwrap(), Values::Saved(folder)).unwrap();
        }
        model
    }

    /// The same on [`Noting`], with its embedding trained: which is a module that an adapter saves. One without an
    /// adapter gets a LoRA whose B is 0, so that every sensitivity to it is 0.
    fn noting(&self) -> (Arc<Noting>, Model) {
        let backend = Arc::new(Noting::default());
        let mut model = load(backend.clone(), &self.base);
        let mut config = match &self.adapter {
            None => AdapterConfig { targets: Targets::AllLinear, ..AdapterConfig::default() },
            Some(folder) => PeftConfig::open(folder).unwrap().lora().unwrap().clone(),
        };
        config.modules_to_save = vec!["embed_tokens".into()];
        model.attach(&config.into(), Values::New(0)).unwrap();
        if let Some(folder) = &self.adapter {
            let saved = Checkpoint::open(&folder.join("adapter_model.safetensors")).unwrap();
            for named in model.parameters().into_iter().filter(|n| !n.name.ends_with("embed_tokens.weight")) {
                let value = saved.load(&named.name, model.backend().as_ref()).unwrap();
                let set = |buffer: &mut Buffer| {
                    *buffer = value;
                    Ok(())
                };
                named.parameter.update(set).unwrap();
            }
        }
        (backend, model)
    }

    /// Σ|a| and √Σa² of a loss.
    fn sensitivities(&self, batch: &Batch) -> (f64, f64) {
        let (noting, model) = self.noting();
        let (tape, device) = (Tape::new(model.backend().clone()), model.batch(batch).unwrap());
        let mode = Forward::evaluation(Compute::F32);
        let (root, _) = model.loss(&tape, &device, batch.targets() as f64, &mode, false).unwrap();
        tape.backward_from_loss(&root, &mut Gradients::new(model.backend().clone())).unwrap();
        noting.sums()
    }

    /// How far off `model`, which is this one on some backend, is.
    fn off(&self, model: &Model, compute: Compute, losses: &[Loss]) -> Vec<Off> {
        let off = |Loss { batch, expected }: &Loss| {
            let off = (evaluate(model, [batch.clone()], compute).unwrap().0 - expected).abs();
            let (sum, root) = self.sensitivities(batch);
            Off {
                any: off / (UNIT * sum + PEERS),
                independent: off / (6.0 * UNIT * root + PEERS),
                deviations: off / (UNIT * root / 3f64.sqrt()),
            }
        };
        losses.iter().map(off).collect()
    }
}

/// √(mean (ΔL/σ)²)
fn spread(all: &[Off]) -> f64 {
    (all.iter().map(|off| off.deviations * off.deviations).sum::<f64>() / all.len() as f64).sqrt()
}

/// The vectors' tokens, and the vocabulary.
fn batch(of: impl Fn(&str) -> PathBuf) -> (Batch, usize) {
    let vocab = ModelConfig::open(&of("tiny-llama")).unwrap().vocab;
    (tokens::read(&of("tiny-llama-io.safetensors"), vocab).unwrap(), vocab)
}

/// The loss of the vectors' own labels, and of [`DRAWN`] drawn ones, of the logits in a file.
fn losses(of: impl Fn(&str) -> PathBuf, logits: &str) -> Vec<Loss> {
    let logits = Checkpoint::open(&of(logits)).unwrap().read::<f32>("logits").unwrap();
    let (batch, vocab) = batch(of);
    let loss = |at: usize, label: i64| -> f64 {
        let logits = logits[at * vocab..][..vocab].iter().map(|&x| f64::from(x));
        logits.clone().map(f64::exp).sum::<f64>().ln() - logits.clone().nth(label as usize).unwrap()
    };
    let seq = batch.seq;
    let kept = (0..batch.ids.len()).filter(|at| at % seq > 0 && batch.labels[*at] != IGNORED);
    let sum: f64 = kept.map(|at| loss(at - 1, batch.labels[at])).sum();
    let own = Loss { expected: sum / batch.targets() as f64, batch: batch.clone() };
    let one = |i: u64| {
        let draw = |stream, below: usize| philox::word(1, stream, i) as usize % below;
        let (row, at, label) = (draw(0, batch.rows), 1 + draw(1, seq - 1), draw(2, vocab) as i64);
        let mut labels = vec![IGNORED; seq];
        labels[at] = label;
        let own = row * seq..(row + 1) * seq;
        let of_row = |x: &[u32]| x[own.clone()].to_vec();
        let (ids, positions, starts) = (of_row(&batch.ids), of_row(&batch.positions), of_row(&batch.starts));
        Loss {
            batch: Batch { ids, labels, positions, starts, rows: 1, seq },
            expected: loss(row * seq + at - 1, label),
        }
    };
    [own].into_iter().chain((0..DRAWN as u64).map(one)).collect()
}

/// That every loss of a case is within its bounds, on the CPU.
fn check(base: &str, adapter: Option<&str>, losses: &[Loss]) -> Vec<Off> {
    let case = Case { base: golden(base), adapter: adapter.map(golden) };
    let model = case.model(Arc::new(CpuBackend::new(None)));
    let all = case.off(&model, Compute::Bf16, losses);
    assert!(all.iter().all(|off| off.any <= 1.0 && off.independent <= 1.0), "{base}, {adapter:?}: {all:?}");
    all
}

const QUANTISED: [&str; 3] = ["qlora_nf4", "qlora_nf4_dq", "qlora_fp4_dq"];
const DENSE: [&str; 4] = ["lora", "rslora", "lora_default_init", "dora"];

#[test]
fn golden_losses_and_logits_of_bases_are_within_the_bound_of_bf16() {
    let mut all = check("tiny-llama", None, &losses(golden, "tiny-llama-io.safetensors"));
    for name in QUANTISED {
        let losses = losses(golden, &format!("{name}/base_io.safetensors"));
        all.extend(check(&format!("{name}/checkpoint"), None, &losses));
    }
    assert!(spread(&all) <= MOST_SPREAD, "{}", spread(&all));
}

/// The first loss of every trajectory.
#[test]
fn golden_losses_before_training_are_within_the_bound_of_bf16() {
    for name in DENSE.into_iter().chain(["adalora"]).chain(QUANTISED) {
        let (quantised, init) = (format!("{name}/checkpoint"), format!("{name}/init"));
        let base = if golden(&quantised).exists() { quantised } else { "tiny-llama".into() };
        let trajectory = std::fs::read_to_string(golden(&format!("{name}/trajectory.json"))).unwrap();
        let trajectory: serde_json::Value = serde_json::from_str(&trajectory).unwrap();
        // It is the objective: less what is not the tokens'.
        let model = Case { base: golden(&base), adapter: Some(golden(&init)) }.model(Arc::new(CpuBackend::new(None)));
        let terms = Terms::of(&PeftConfig::open(&golden(&init)).unwrap());
        let mut unused = Gradients::new(model.backend().clone());
        let added = terms.add_to(model.backend(), model.linears(), &mut unused).unwrap().value;
        let expected = trajectory["losses"][0].as_f64().unwrap() - added;
        check(&base, Some(&init), &[Loss { batch: batch(golden).0, expected }]);
    }
}

/// Of the trained adapters that the vectors have. (Of AdaLoRA's some triplets are cut, which no new adapter's are.)
#[test]
fn golden_losses_and_logits_after_training_are_within_the_bound_of_bf16() {
    let trained: Vec<_> = DENSE.into_iter().filter(|name| golden(&format!("{name}/final")).exists()).collect();
    assert!(!trained.is_empty());
    for name in trained {
        let losses = losses(golden, &format!("{name}/final_io.safetensors"));
        check("tiny-llama", Some(&format!("{name}/final")), &losses);
    }
}

/// On `reference`, with the inputs of every product with a weight rounded in place of bf16's rounding.
#[test]
fn a_bit_less_and_truncation_are_noticed() {
    let (losses, case) = (losses(own, "tiny-llama-io.safetensors"), Case { base: own("tiny-llama"), adapter: None });
    let of = |bits, truncate| {
        let model = case.model(Arc::new(Planted { bits, truncate }));
        spread(&case.off(&model, Compute::F32, &losses))
    };
    let [right, less, truncated] = [of(8, false), of(7, false), of(8, true)];
    assert!(right <= MOST_SPREAD && less > MOST_SPREAD && truncated > MOST_SPREAD, "{right}, {less}, {truncated}");
}
