//! A model's folder into another: quantised, dequantised, merged. Tensor by tensor, so that memory stays near the
//! largest of them (a merge holds the whole model).

use crate::model::{Model, ModelConfig, Quantization};
use crate::product::{dtype_name, write_config};
use crate::{Error, Result};
use rankfold_adapters::{Linear, merged_weight};
use rankfold_autograd::Base;
use rankfold_backend::{Backend, DType, Quantized};
use rankfold_files::{Checkpoint, Spec, Writer, quantized, write_atomically};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What a conversion did, for its last line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Converted {
    /// Linear layers that were changed.
    pub layers: usize,
    /// Bytes of all tensors before.
    pub before: u64,
    /// Bytes of all tensors after.
    pub after: u64,
}

/// Write `checkpoint` with every linear layer but the head in 4 bits, in bitsandbytes' layout.
///
/// Errors: a model that is in 4 bits already; a weight that is not finite.
pub fn quantize(
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    how: Quantization,
    out: &Path,
) -> Result<Converted> {
    if let Some(name) = quantized::weights(checkpoint).first() {
        return Err(Error::file(checkpoint.path(), format!("'{name}' is in 4 bits already: expected a dense model")));
    }
    let Quantization { format, block, double } = how;
    let mut done = Converted::default();
    let mut specs = Vec::new();
    for (name, shape) in config.tensors() {
        let dtype = expect_float(checkpoint, &name, &shape)?;
        if ModelConfig::is_linear(&name) {
            specs.extend(quantized::specs(&name, [shape[0], shape[1]], format, block, double));
        } else {
            specs.push(Spec::new(name, dtype, shape));
        }
    }
    let mut writer = Writer::create(&out.join("model.safetensors"), specs)?;
    for (name, shape) in config.tensors() {
        let dtype = checkpoint.dtype(&name)?;
        done.before += checkpoint.info(&name)?.bytes as u64;
        if !ModelConfig::is_linear(&name) {
            done.after += checkpoint.info(&name)?.bytes as u64;
            writer.copy(&name, checkpoint)?;
            continue;
        }
        let dense = checkpoint.load(&name, backend)?;
        let weight = Quantized::quantize(backend, dense.view(), [shape[0], shape[1]], format, block, double)
            .map_err(|e| Error::file(checkpoint.file(&name), format!("'{name}': {e}")))?;
        quantized::write(&mut writer, &name, backend, &weight, dtype)?;
        done.after += weight.bytes() as u64;
        done.layers += 1;
    }
    writer.finish()?;
    write_quantized_config(&config.raw, how, checkpoint.dtype("model.embed_tokens.weight")?, out)?;
    Ok(done)
}

/// `config.json` as transformers writes it beside a 4-bit checkpoint.
fn write_quantized_config(raw: &Value, how: Quantization, dtype: DType, out: &Path) -> Result<()> {
    let mut config = raw.clone();
    if let Some(object) = config.as_object_mut() {
        let quantization = json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": how.format.to_string(),
            "bnb_4bit_use_double_quant": how.double,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": null,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        object.insert("quantization_config".into(), quantization);
    }
    let path = out.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&path, e.to_string()))?;
    Ok(write_atomically(&path, format!("{text}\n").as_bytes())?)
}

/// Write `checkpoint` with every 4-bit weight as the dense values that it stands for, in the type its state names.
///
/// Errors: a model that has none.
pub fn dequantize(
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    out: &Path,
) -> Result<Converted> {
    let mut done = Converted::default();
    let mut specs = Vec::new();
    for (name, shape) in config.tensors() {
        let dtype = match quantized::state(checkpoint, &name)? {
            Some(state) => state.dtype,
            None => expect_float(checkpoint, &name, &shape)?,
        };
        specs.push(Spec::new(name, dtype, shape));
    }
    let mut writer = Writer::create(&out.join("model.safetensors"), specs)?;
    for (name, shape) in config.tensors() {
        let Some(loaded) = quantized::load(checkpoint, &name, backend)? else {
            done.before += checkpoint.info(&name)?.bytes as u64;
            done.after += checkpoint.info(&name)?.bytes as u64;
            writer.copy(&name, checkpoint)?;
            continue;
        };
        expect_shape(checkpoint, &name, &loaded.weight, &shape)?;
        let mut dense = backend.alloc(loaded.dtype, loaded.weight.elements())?;
        backend.dequantize_4bit(&loaded.weight, dense.view_mut())?;
        writer.write_view(&name, backend, dense.view())?;
        done.before += loaded.weight.bytes() as u64;
        done.after += dense.bytes() as u64;
        done.layers += 1;
    }
    if done.layers == 0 {
        return Err(Error::file(checkpoint.path(), "no weight is in 4 bits: there is nothing to dequantise"));
    }
    writer.finish()?;
    write_config(out, &config.raw, checkpoint.dtype("model.embed_tokens.weight")?)?;
    Ok(done)
}

/// Write a model with its adapter folded in: W + s·B·A wherever there is one, 4-bit weights as the dense values that
/// they stand for.
pub fn merge(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<Converted> {
    let (config, backend) = (&model.config, model.backend().as_ref());
    let layers: BTreeMap<String, &Linear> = model.linears().map(|l| (format!("{}.weight", l.path()), l)).collect();
    let mut done = Converted::default();
    let mut specs = Vec::new();
    for (name, shape) in config.tensors() {
        let dtype = match quantized::state(checkpoint, &name)? {
            Some(state) => state.dtype,
            None => expect_float(checkpoint, &name, &shape)?,
        };
        specs.push((name, dtype, shape));
    }
    let declared = specs.iter().map(|(name, dtype, shape)| Spec::new(&**name, *dtype, &**shape)).collect();
    let mut writer = Writer::create(&out.join("model.safetensors"), declared)?;
    for (name, dtype, shape) in specs {
        done.after += (shape.iter().product::<usize>() * dtype.size()) as u64;
        let linear = layers.get(&name);
        match linear.map(|linear| (linear, linear.base(), linear.adapter())) {
            Some((linear, base, Some(lora))) => {
                let merged = merged_weight(backend, linear.path(), &base, lora, dtype)?;
                writer.write_view(&name, backend, merged.view())?;
                done.layers += 1;
            }
            Some((_, Base::Quantized(weight), None)) => {
                let mut dense = backend.alloc(dtype, weight.elements())?;
                backend.dequantize_4bit(&weight, dense.view_mut())?;
                writer.write_view(&name, backend, dense.view())?;
            }
            _ => writer.copy(&name, checkpoint)?,
        }
    }
    writer.finish()?;
    write_config(out, &config.raw, checkpoint.dtype("model.embed_tokens.weight")?)?;
    Ok(done)
}

fn expect_float(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<DType> {
    Ok(checkpoint.expect(name, &[DType::F32, DType::Bf16, DType::F16], shape)?)
}

fn expect_shape(checkpoint: &Checkpoint, name: &str, weight: &Quantized, shape: &[usize]) -> Result<()> {
    if weight.shape == *shape {
        return Ok(());
    }
    Err(Error::file(checkpoint.file(name), format!("'{name}' is {:?}, expected {shape:?}", weight.shape)))
}
