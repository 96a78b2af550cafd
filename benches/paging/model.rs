//! A whole training step of a small Llama with random weights, all of them trained: everything that a run pages, as it
//! pages it.

use crate::work::{Failure, Step, draw};
use rankfold_backend::{Backend, DType};
use rankfold_files::{Checkpoint, Spec, Writer};
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use std::path::Path;
use std::sync::Arc;

/// Its steps on one batch of `rows` rows of `seq` tokens.
pub fn make(backend: Arc<dyn Backend>, dimensions: [usize; 5], [rows, seq]: [usize; 2]) -> Result<Step, Failure> {
    let [vocab, width, layers, heads, feed_forward] = dimensions;
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": {width}, "num_hidden_layers": {layers},
            "num_attention_heads": {heads}, "num_key_value_heads": {heads}, "intermediate_size": {feed_forward},
            "rms_norm_eps": 1e-5, "rope_theta": 10000, "dtype": "float32"}}"#
    );
    let config = ModelConfig::parse(&text, Path::new("config.json"))?;
    let model = random(backend.clone(), config)?;
    let mut optimizer = AdamW::new(backend, Moments::F32, Hyper::default(), model.parameters())?;
    let tokens = rows * seq;
    let ids: Vec<u32> = (0..tokens).map(|t| (31 * t % vocab) as u32).collect();
    let batch = Batch {
        labels: ids.iter().map(|id| i64::from(*id)).collect(),
        ids,
        positions: (0..tokens).map(|t| (t % seq) as u32).collect(),
        starts: vec![0; tokens],
        rows,
        seq,
    };
    let mut batches = Batches::Fixed(batch);
    let schedule = Schedule { lr: 1e-5, decay: Decay::Constant, warmup: 0, steps: 1 };
    let recipe = Recipe { clip: 1.0, ..Recipe::new(schedule) };
    let mut step = 0;
    Ok(Box::new(move || {
        step += 1;
        gradients(&model, &mut batches, &recipe, &optimizer, step)?.apply(&recipe, &mut optimizer, None)?;
        Ok(())
    }))
}

/// A model with weights of σ 0.02, by way of a file.
fn random(backend: Arc<dyn Backend>, config: ModelConfig) -> Result<Model, Failure> {
    let folder = tempfile::tempdir()?;
    let tensors = config.tensors();
    let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, DType::F32, &**shape)).collect();
    let mut writer = Writer::create(&folder.path().join("model.safetensors"), specs)?;
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let elements = shape.iter().product();
        let values = if shape.len() == 1 { vec![1.0; elements] } else { draw(elements, i as u64, 0.035) };
        writer.write(name, bytemuck::cast_slice(&values))?;
    }
    writer.finish()?;
    Ok(Model::load(backend, &Checkpoint::open(folder.path())?, config, Precision::Trained)?)
}
