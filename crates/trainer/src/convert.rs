//! A model's folder into another: quantised, dequantised. Tensor by tensor, so that memory stays near the largest of
//! them. What the file holds beyond the config's tensors goes along.

use crate::merge::format;
use crate::model::{Model, ModelConfig, Quantization};
use crate::product::{dtype_name, write_config};
use crate::{Error, Result};
use rankfold_autograd::Base;
use rankfold_backend::{Backend, DType, Format, Quantized};
use rankfold_files::{Checkpoint, Spec, Writer, quantized, write_atomically};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

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
/// Errors: a model that is in 4 bits already, or has parts of 4-bit weights; a weight that is not finite, or so large
/// that its scales overflow when they are quantised.
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
    write_quantized(checkpoint, config, how, out, backend, &|name, shape| {
        let dense = checkpoint.load(name, backend)?;
        let weight = Quantized::quantize(backend, dense.view(), shape, format, block, double)
            .map_err(|e| Error::file(checkpoint.file(name), format!("'{name}': {e}")))?;
        Ok(Arc::new(weight))
    })
}

/// Write `checkpoint` with the 4-bit weights that a model has in place of its own: a base that was made for an adapter.
///
/// Errors: a linear layer that is not in 4 bits; layers in several formats.
pub fn write_base(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<Converted> {
    let how = format(model, checkpoint)?;
    let layers: BTreeMap<String, Base> = model.linears().map(|l| (format!("{}.weight", l.path()), l.base())).collect();
    write_quantized(checkpoint, &model.config, how, out, model.backend().as_ref(), &|name, _| match layers.get(name) {
        Some(Base::Quantized(weight)) => Ok(weight.clone()),
        _ => Err(Error::file(checkpoint.file(name), format!("'{name}' is dense in the model, expected 4 bits"))),
    })
}

/// A linear layer's weight in 4 bits, by its name and shape.
type WeightOf<'a> = dyn Fn(&str, [usize; 2]) -> Result<Arc<Quantized>> + 'a;

/// Write `checkpoint` with `weight` of every linear layer, by its name and shape, in place of its own.
fn write_quantized(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    how: Quantization,
    out: &Path,
    backend: &dyn Backend,
    weight: &WeightOf,
) -> Result<Converted> {
    let mut done = Converted::default();
    let tensors = tensors(checkpoint, config)?;
    let mut writer = Writer::create(&out.join("model.safetensors"), specs_in_4_bits(&tensors, how))?;
    for Tensor { name, dtype, linear, .. } in tensors {
        let bytes = checkpoint.info(&name)?.bytes as u64;
        done.before += bytes;
        let Some(shape) = linear else {
            done.after += bytes;
            writer.copy(&name, checkpoint)?;
            continue;
        };
        let weight = weight(&name, shape)?;
        quantized::write(&mut writer, &name, backend, &weight, dtype)?;
        done.after += weight.bytes() as u64;
        done.layers += 1;
    }
    writer.finish()?;
    write_quantized_config(&config.raw, how, checkpoint.dtype("model.embed_tokens.weight")?, out)?;
    Ok(done)
}

/// The tensors of a checkpoint whose linear layers are in 4 bits.
pub(crate) fn specs_in_4_bits(tensors: &[Tensor], how: Quantization) -> Vec<Spec> {
    let Quantization { format, block, double } = how;
    let specs = tensors.iter().map(|tensor| match tensor.linear {
        Some(shape) => quantized::specs(&tensor.name, shape, format, block, double),
        None => vec![tensor.spec()],
    });
    specs.flatten().collect()
}

/// `config.json` as transformers writes it beside a 4-bit checkpoint; for int4, which bitsandbytes lacks, one that
/// makes it say that it does not know the method.
pub(crate) fn write_quantized_config(raw: &Value, how: Quantization, dtype: DType, out: &Path) -> Result<()> {
    let mut config = raw.clone();
    if let Some(object) = config.as_object_mut() {
        let bitsandbytes = json!({
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
        let quantization = match how.format {
            Format::Nf4 | Format::Fp4 => bitsandbytes,
            Format::Int4 => json!({
                "block": how.block,
                "double_quant": how.double,
                "format": how.format.to_string(),
                "quant_method": "rankfold",
            }),
        };
        object.insert("quantization_config".into(), quantization);
    }
    let path = out.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&path, e.to_string()))?;
    Ok(write_atomically(&path, format!("{text}\n").as_bytes())?)
}

/// Write `checkpoint` with every 4-bit weight as the dense values that it stands for, in the type its state names.
///
/// Errors: a model that has none; parts of 4-bit weights without their weight; a value beyond the range of its type.
pub fn dequantize(
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    out: &Path,
) -> Result<Converted> {
    let mut done = Converted::default();
    let tensors = tensors(checkpoint, config)?;
    let mut writer = Writer::create(&out.join("model.safetensors"), tensors.iter().map(Tensor::spec).collect())?;
    for tensor in &tensors {
        let before = write_dense(&mut writer, backend, checkpoint, tensor)?;
        done.layers += usize::from(before.is_some());
        done.before += before.unwrap_or(tensor.bytes());
        done.after += tensor.bytes();
    }
    if done.layers == 0 {
        return Err(Error::file(checkpoint.path(), "no weight is in 4 bits: there is nothing to dequantise"));
    }
    writer.finish()?;
    write_config(out, &config.raw, checkpoint.dtype("model.embed_tokens.weight")?)?;
    Ok(done)
}

/// A tensor of the dense model that a checkpoint stands for.
pub(crate) struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
    /// [outputs, inputs] of a linear layer that the config knows.
    pub linear: Option<[usize; 2]>,
}

impl Tensor {
    pub fn spec(&self) -> Spec {
        Spec::new(&*self.name, self.dtype, &*self.shape)
    }

    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

/// The config's tensors, then what else the file holds.
pub(crate) fn tensors(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<Tensor>> {
    let (mut tensors, mut known) = (Vec::new(), BTreeSet::new());
    for (name, shape) in config.tensors() {
        let dtype = match quantized::state(checkpoint, &name)? {
            Some(state) => state.dtype,
            None => checkpoint.expect(&name, &[DType::F32, DType::Bf16, DType::F16], &shape)?,
        };
        let linear = ModelConfig::is_linear(&name).then(|| [shape[0], shape[1]]);
        known.insert(name.clone());
        tensors.push(Tensor { name, shape, dtype, linear });
    }
    for name in quantized::names(checkpoint)?.into_iter().filter(|name| !known.contains(*name)) {
        let (shape, dtype) = match quantized::state(checkpoint, name)? {
            Some(state) => (state.shape.to_vec(), state.dtype),
            None => (checkpoint.info(name)?.shape.clone(), checkpoint.dtype(name)?),
        };
        tensors.push(Tensor { name: name.into(), shape, dtype, linear: None });
    }
    Ok(tensors)
}

/// Write a tensor as the dense values that it stands for; the bytes that it took where it was in 4 bits.
pub(crate) fn write_dense(
    writer: &mut Writer,
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    tensor: &Tensor,
) -> Result<Option<u64>> {
    let Some(loaded) = quantized::load(checkpoint, &tensor.name, backend)? else {
        writer.copy(&tensor.name, checkpoint)?;
        return Ok(None);
    };
    expect_shape(checkpoint, &tensor.name, &loaded.weight, &tensor.shape)?;
    write_decoded(writer, backend, tensor, &loaded.weight)?;
    Ok(Some(loaded.weight.bytes() as u64))
}

/// Write the dense values of a 4-bit weight.
pub(crate) fn write_decoded(
    writer: &mut Writer,
    backend: &dyn Backend,
    tensor: &Tensor,
    weight: &Quantized,
) -> Result<()> {
    let mut dense = backend.alloc(tensor.dtype, weight.elements())?;
    backend.dequantize_4bit(weight, dense.view_mut())?;
    Ok(writer.write_view(&tensor.name, backend, dense.view())?)
}

fn expect_shape(checkpoint: &Checkpoint, name: &str, weight: &Quantized, shape: &[usize]) -> Result<()> {
    if weight.shape == *shape {
        return Ok(());
    }
    Err(Error::file(checkpoint.file(name), format!("'{name}' is {:?}, expected {shape:?}", weight.shape)))
}
