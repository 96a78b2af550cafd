//! A small Llama with random weights, and the steps of its training.

use rankfold_backend::{Backend, Compute, DType, philox};
use rankfold_files::{Checkpoint, Spec, Writer};
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

pub type Failure = Box<dyn Error>;
/// One step of a piece of work, which calls what it is given where one phase of it ends and another begins.
pub type Step = Box<dyn FnMut(&mut dyn FnMut()) -> Result<(), Failure>>;

/// A model with weights uniform in ±0.035, whose σ is 0.02, by way of a file. `dimensions` are its vocabulary, width,
/// layers, heads, heads of keys, and feed-forward.
pub fn random(backend: Arc<dyn Backend>, dimensions: [usize; 6], precision: Precision) -> Result<Model, Failure> {
    let [vocab, width, layers, heads, kv_heads, feed_forward] = dimensions;
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": {width}, "num_hidden_layers": {layers},
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "intermediate_size": {feed_forward},
            "rms_norm_eps": 1e-5, "rope_theta": 10000, "dtype": "float32"}}"#
    );
    let config = ModelConfig::parse(&text, Path::new("config.json"))?;
    let folder = tempfile::tempdir()?;
    let tensors = config.tensors();
    let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, DType::F32, &**shape)).collect();
    let mut writer = Writer::create(&folder.path().join("model.safetensors"), specs)?;
    for (stream, (name, shape)) in tensors.iter().enumerate() {
        let elements = shape.iter().product::<usize>();
        let values: Vec<f32> = match shape.len() {
            1 => vec![1.0; elements],
            _ => (0..elements as u64).map(|i| 0.07 * philox::unit(philox::word(1, stream as u64, i)) - 0.035).collect(),
        };
        writer.write(name, bytemuck::cast_slice(&values))?;
    }
    writer.finish()?;
    Ok(Model::load(backend, &Checkpoint::open(folder.path())?, config, precision)?)
}

/// Steps whose products are in `compute`, clipped, at a small constant rate.
pub fn recipe(compute: Compute) -> Recipe {
    let schedule = Schedule { lr: 1e-5, decay: Decay::Constant, warmup: 0, steps: 1 };
    Recipe { clip: 1.0, compute, ..Recipe::new(schedule) }
}

/// Steps of AdamW on all that is trained of a model, on one batch of `rows` rows of `seq` tokens. Their phases: the
/// gradients, the update.
pub fn training(model: Model, moments: Moments, recipe: Recipe, [rows, seq]: [usize; 2]) -> Result<Step, Failure> {
    let mut optimizer = AdamW::new(model.backend().clone(), moments, Hyper::default(), model.parameters())?;
    let tokens = rows * seq;
    let ids: Vec<u32> = (0..tokens).map(|t| (31 * t % model.config.vocab) as u32).collect();
    let batch = Batch {
        labels: ids.iter().map(|id| i64::from(*id)).collect(),
        ids,
        positions: (0..tokens).map(|t| (t % seq) as u32).collect(),
        starts: vec![0; tokens],
        rows,
        seq,
    };
    let mut batches = Batches::Fixed(batch);
    let mut step = 0;
    Ok(Box::new(move |between| {
        step += 1;
        let pending = gradients(&model, &mut batches, &recipe, &optimizer, step)?;
        between();
        pending.apply(&recipe, &mut optimizer, None)?;
        Ok(())
    }))
}
