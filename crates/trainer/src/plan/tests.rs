//! The counting, held to what the CPU backend takes in a real run of the same setup.

use super::ledger::Event;
use super::pool::Pool;
use super::replay::replay;
use super::*;
use crate::data::Batch;
use crate::model::{Model, ModelConfig, Precision, Quantization};
use crate::objective::Terms;
use crate::optimizer::{AdamW, Hyper, Moments};
use crate::schedule::{Decay, Schedule};
use crate::step::{Batches, Recipe, evaluate, gradients};
use proptest::prelude::*;
use rankfold_adapters::adalora::{AdaLora, Allocator, Prune};
use rankfold_adapters::{AdapterConfig, Form, LoraSpec, PeftConfig, Relative, RelativeConfig, Targets, Values};
use rankfold_autograd::SavedAs;
use rankfold_backend::{Backend, Compute, DType, Format};
use rankfold_cpu::CpuBackend;
use rankfold_files::{Checkpoint, Spec, Writer};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A model's dimensions: vocabulary, width, layers, heads, key heads, feed-forward, tied.
type Dimensions = (usize, usize, usize, usize, usize, usize, bool);

fn config((vocab, width, layers, heads, kv_heads, feed_forward, tied): Dimensions) -> ModelConfig {
    let text = format!(
        r#"{{"model_type": "qwen2", "vocab_size": {vocab}, "hidden_size": {width}, "num_hidden_layers": {layers},
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "intermediate_size": {feed_forward},
            "rms_norm_eps": 1e-5, "rope_theta": 10000, "dtype": "bfloat16", "tie_word_embeddings": {tied}}}"#
    );
    ModelConfig::parse(&text, Path::new("config.json")).unwrap()
}

/// The model's file, every weight 1/64.
fn checkpoint(config: &ModelConfig, folder: &Path) -> Checkpoint {
    let tensors = config.tensors();
    let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, DType::Bf16, &**shape)).collect();
    let mut writer = Writer::create(&folder.join("model.safetensors"), specs).unwrap();
    for (name, shape) in &tensors {
        let values = vec![half::bf16::from_f32(1.0 / 64.0); shape.iter().product()];
        writer.write(name, bytemuck::cast_slice(&values)).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(folder).unwrap()
}

fn adapter(rank: usize, dropout: f64) -> PeftConfig {
    let spec = LoraSpec { dropout, ..LoraSpec::new(rank, 1.0) };
    AdapterConfig { spec, targets: Targets::AllLinear, ..AdapterConfig::default() }.into()
}

/// Live, peak and pooled bytes of the backend after a real run.
fn real(setup: &Setup) -> [u64; 3] {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Arc::new(CpuBackend::new(Some(1)));
    let backend: Arc<dyn Backend> = cpu.clone();
    let file = checkpoint(setup.config, folder.path());
    let mut model = Model::load(backend.clone(), &file, setup.config.clone(), setup.precision).unwrap();
    model.rotary(setup.seq).unwrap();
    if let Some(adapter) = setup.adapter {
        model.attach(adapter, Values::New(0)).unwrap();
    }
    let mut optimizer = AdamW::new(backend, Moments::F32, Hyper::default(), model.parameters()).unwrap();
    let adalora = setup.adapter.and_then(PeftConfig::lora).and_then(|lora| lora.adalora.as_ref());
    let _allocator = adalora
        .map(|adalora| Allocator::new(model.backend().as_ref(), adalora, Prune::Mask, 3, model.linears()).unwrap());
    let batch = |rows: usize| {
        let tokens = rows * setup.seq;
        let last = setup.seq - 1;
        Batch {
            ids: (0..tokens).map(|t| (t % setup.config.vocab) as u32).collect(),
            labels: vec![1; tokens],
            positions: (0..tokens).map(|t| (t % setup.seq) as u32).collect(),
            // Two documents a row.
            starts: (0..tokens).map(|t| if t % setup.seq == last { last as u32 } else { 0 }).collect(),
            rows,
            seq: setup.seq,
        }
    };
    let schedule = Schedule { lr: 1e-6, decay: Decay::Constant, warmup: 0, steps: 2 };
    let Setup { accumulate, checkpointing, saved_as, compute, .. } = *setup;
    let terms = setup.adapter.map(Terms::of).unwrap_or_default();
    let recipe = Recipe { accumulate, checkpointing, saved_as, compute, terms, ..Recipe::new(schedule) };
    let eval = |model: &Model| {
        evaluate(model, setup.evaluated().into_iter().map(batch), compute).unwrap();
    };
    eval(&model);
    for step in 1..=2 {
        let mut batches = Batches::Fixed(batch(setup.rows));
        let pending = gradients(&model, &mut batches, &recipe, &optimizer, step).unwrap();
        pending.apply(&recipe, &mut optimizer, None).unwrap();
    }
    eval(&model);
    let figures = cpu.memory();
    [figures.live, figures.peak, figures.pooled].map(|bytes| bytes as u64)
}

/// The same figures of the counted run.
fn counted(setup: &Setup) -> [u64; 3] {
    let record = replay(setup).unwrap().record;
    let (mut pool, mut blocks) = (Pool::default(), HashMap::new());
    for event in &record.events {
        match *event {
            Event::Made(piece) => drop(blocks.insert(piece, pool.take(record.pieces[piece].bytes))),
            Event::Freed(piece) => pool.give(blocks.remove(&piece).unwrap()),
            Event::Begun(_) | Event::Scratch(_) | Event::Passed(_) => {}
        }
    }
    pool.classes()
}

fn setup<'a>(config: &'a ModelConfig, precision: Precision, adapter: Option<&'a PeftConfig>) -> Setup<'a> {
    Setup {
        config,
        stored: Stored { dense: DType::Bf16, four_bits: None },
        precision,
        adapter,
        moments: Moments::F32,
        rows: 2,
        seq: 24,
        accumulate: 1,
        evaluates: true,
        checkpointing: false,
        saved_as: SavedAs::Computed,
        compute: Compute::F32,
        machine: Machine { program: 0, cpu_threads: Some(1) },
    }
}

fn nf4(double: bool) -> Precision {
    Precision::Quantized(Quantization { format: Format::Nf4, block: 64, double })
}

fn dimensions() -> impl Strategy<Value = Dimensions> {
    (1usize..400, 1usize..5, 1usize..4, 1usize..3, 1usize..3, 1usize..200, any::<bool>()).prop_map(
        |(vocab, heads_wide, layers, kv_heads, group, feed_forward, tied)| {
            let heads = kv_heads * group;
            (vocab + 1, 16 * heads * heads_wide, layers, heads, kv_heads, feed_forward, tied)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// To the byte: live, peak and pooled.
    #[test]
    fn a_real_run_takes_what_was_counted(
        dimensions in dimensions(),
        precision in 0usize..4,
        (rank, dropout) in (1usize..9, prop_oneof![Just(0.0), Just(0.1)]),
        (rows, seq, accumulate) in (1usize..4, 2usize..40, 1usize..8),
        checkpointing: bool,
        rounds: bool,
        evaluates: bool,
    ) {
        let (config, adapter) = (config(dimensions), adapter(rank, dropout));
        let precision = [Precision::AsStored, Precision::Trained, nf4(false), nf4(true)][precision];
        let adapter = (precision != Precision::Trained).then_some(&adapter);
        let setup = setup(&config, precision, adapter);
        let saved_as = if rounds { SavedAs::Bf16 } else { SavedAs::Computed };
        let setup = Setup { rows, seq, accumulate, checkpointing, saved_as, evaluates, ..setup };
        prop_assert_eq!(counted(&setup), real(&setup));
    }
}

/// What was freed serves what is a little smaller, so that a third micro-batch may find a block taken that the second had.
#[test]
fn a_micro_batch_that_takes_more_than_those_before_it_is_counted() {
    let config = config((2, 64, 1, 2, 1, 68, false));
    let setup = setup(&config, Precision::Trained, None);
    for accumulate in 1..8 {
        let setup = Setup { seq: 34, accumulate, checkpointing: true, evaluates: false, ..setup.clone() };
        assert_eq!(counted(&setup), real(&setup), "{accumulate} micro-batches");
    }
}

/// A kernel without a weight of its own: of a wide feed-forward, and of attention beside a narrow one, where backward comes
/// to the last layer first. With checkpointing, what runs again is the layer's, too.
#[test]
fn what_needs_most_is_told_with_its_layer() {
    for (feed_forward, kernel, layer) in
        [(2000, "silu_mul_grad", "model.layers.2.mlp"), (8, "attention_grad", "model.layers.2.self_attn")]
    {
        let (config, adapter) = (config((16, 256, 3, 4, 4, feed_forward, true)), adapter(2, 0.0));
        for checkpointing in [false, true] {
            let setup = Setup { rows: 8, seq: 512, checkpointing, ..setup(&config, nf4(true), Some(&adapter)) };
            let floor = Plan::of(&setup).unwrap().floor;
            assert_eq!((floor.kernel, floor.layer.as_deref()), (kernel, Some(layer)), "{checkpointing}: {floor:?}");
            assert_eq!(floor.needs(), format!("{kernel} in {layer}"));
        }
    }
}

/// Of a size at which the pool gives blocks back.
#[test]
fn a_larger_run_takes_what_was_counted() {
    let (config, adapter) = (config((1000, 256, 4, 4, 2, 704, true)), adapter(16, 0.0));
    let (as_computed, rounded) = (SavedAs::Computed, SavedAs::Bf16);
    for (precision, checkpointing, saved_as) in [
        (nf4(true), false, as_computed),
        (nf4(true), true, as_computed),
        (nf4(true), false, rounded),
        (Precision::Trained, false, as_computed),
        (Precision::Trained, true, rounded),
    ] {
        let adapter = (precision != Precision::Trained).then_some(&adapter);
        let setup = Setup { rows: 4, seq: 256, checkpointing, saved_as, ..setup(&config, precision, adapter) };
        assert_eq!(counted(&setup), real(&setup), "{precision:?}, checkpointing {checkpointing}, {saved_as:?}");
    }
}

/// AdaLoRA's rank is far above the widths, so that its term's matrices take more than all else of backward.
#[test]
fn what_a_method_adds_to_the_objective_is_counted() {
    let config = config((8, 32, 2, 1, 1, 32, true));
    let adalora = AdaLora { target_rank: 1, tinit: 0, tfinal: 1, delta_t: 1, ..AdaLora::default() };
    let spec = LoraSpec { form: Form::AdaLora, ..LoraSpec::new(300, 1.0) };
    let targets = Targets::AllLinear;
    let adalora = AdapterConfig { spec, adalora: Some(adalora), targets, ..AdapterConfig::default() };
    let targets = Targets::AllLinear;
    let diff = RelativeConfig { targets, ..RelativeConfig::new(Relative::Diff { penalty: 1.0 }) };
    for adapter in [adalora.into(), PeftConfig::Relative(diff)] {
        let setup = Setup { seq: 4, ..setup(&config, Precision::AsStored, Some(&adapter)) };
        assert_eq!(counted(&setup), real(&setup), "{adapter:?}");
    }
}
