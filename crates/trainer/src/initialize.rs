//! A new model's folder: config, tokenizer, and weights drawn from N(0, σ²) by Philox.
//!
//! σ is the config's `initializer_range` (0.02 if not given), divided by √(2·layers) for the two matrices of a block
//! that write to the residual stream (Radford et al. 2019, GPT-2, §2.3), whose sum would grow with depth otherwise.
//! Norms start at 1, biases at 0.

use crate::data::Tokenizer;
use crate::model::ModelConfig;
use crate::product::{dtype_name, write_tokenizer};
use crate::{Error, Result};
use half::bf16;
use rankfold_backend::{DType, philox};
use rankfold_files::{Spec, Writer, write_atomically};
use serde_json::Value;
use std::path::Path;

/// Write the folder; returns the number of parameters. `config` is the text of a `config.json` at `path`; its
/// `vocab_size` and end of text become the tokenizer's; its dtype is the weights' (bf16 if not given).
pub fn initialize(config: &str, path: &Path, tokenizer: &Tokenizer, seed: u64, out: &Path) -> Result<usize> {
    let mut raw: Value = serde_json::from_str(config).map_err(|e| Error::file(path, format!("not JSON: {e}")))?;
    let object = raw.as_object_mut().ok_or_else(|| Error::file(path, "expected a JSON object"))?;
    object.insert("vocab_size".into(), tokenizer.vocab_size().into());
    object.insert("eos_token_id".into(), tokenizer.end_of_text().into());
    // transformers 4 says torch_dtype, 5 says dtype, which is what is written.
    let older = object.remove("torch_dtype");
    let dtype = match object.get("dtype").or(older.as_ref()).and_then(Value::as_str) {
        None | Some("bfloat16") => DType::Bf16,
        Some("float32") => DType::F32,
        Some(other) => return Err(Error::file(path, format!("dtype {other}: expected bfloat16 or float32"))),
    };
    object.insert("dtype".into(), dtype_name(dtype).into());
    let sigma = object.get("initializer_range").and_then(Value::as_f64).unwrap_or(0.02);
    let text = serde_json::to_string_pretty(&raw).map_err(|e| Error::file(path, e.to_string()))?;
    let config = ModelConfig::parse(&text, path)?;

    let tensors = config.tensors();
    let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, dtype, &**shape)).collect();
    let mut writer = Writer::create(&out.join("model.safetensors"), specs)?;
    for (stream, (name, shape)) in tensors.iter().enumerate() {
        let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let sigma = if residual { sigma / (2.0 * config.layers as f64).sqrt() } else { sigma };
        let elements = shape.iter().product::<usize>();
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with(".bias") => vec![0.0; elements],
            1 => vec![1.0; elements],
            _ => (0..elements as u64).map(|i| (sigma * philox::normal(seed, stream as u64, i)) as f32).collect(),
        };
        match dtype {
            DType::F32 => writer.write(name, bytemuck::cast_slice(&values))?,
            _ => {
                let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                writer.write(name, bytemuck::cast_slice(&values))?;
            }
        }
    }
    writer.finish()?;
    write_tokenizer(out, tokenizer)?;
    write_atomically(&out.join("config.json"), format!("{text}\n").as_bytes())?;
    Ok(config.parameters())
}
