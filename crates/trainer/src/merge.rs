//! A model's folder with an adapter folded in: as dense weights, or in the 4 bits that it had.
//!
//! In 4 bits a layer's weight is dequantised, the update is added, and the sum is quantised again, in the same format
//! and blocks. That is another error on top of the base's own; what it is, relative to the sum and to what the adapter
//! changed, is measured layer by layer. A layer without an update keeps its codes.

use crate::convert::{Converted, Tensor, specs_in_4_bits, tensors, write_decoded, write_dense, write_quantized_config};
use crate::model::{Architecture, Model, ModelConfig, Quantization};
use crate::product::write_config;
use crate::{Error, Result};
use rankfold_adapters::{Adapter, Linear, Merged, merged};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::{Backend, Buffer, DType, Quantized, Scales};
use rankfold_files::{Checkpoint, Writer, quantized};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Write a model with its adapter folded in, as [`merged`] has it wherever there is one, what was trained beside it, and
/// 4-bit weights as the dense values that they stand for.
///
/// Errors: an adapter that does not merge, learned tokens among them; a bias where the architecture has no place for it.
pub fn merge(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<Converted> {
    let backend = model.backend().as_ref();
    refuse_tokens(model, checkpoint)?;
    let config = config_with_biases(model)?;
    let dtype = checkpoint.dtype("model.embed_tokens.weight")?;
    let layers: BTreeMap<String, &Linear> = model.linears().map(|l| (format!("{}.weight", l.path()), l)).collect();
    let trained: BTreeMap<String, Parameter> = model.trained_of_the_base().into_iter().collect();
    let mut done = Converted::default();
    let mut tensors = tensors(checkpoint, &model.config)?;
    let known: BTreeSet<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let new = config.tensors().into_iter().filter(|(name, _)| !known.contains(name));
    tensors.extend(new.map(|(name, shape)| Tensor { name, shape, dtype, linear: None }));
    let mut writer = Writer::create(&out.join("model.safetensors"), tensors.iter().map(Tensor::spec).collect())?;
    let mut biases: BTreeMap<String, Buffer> = BTreeMap::new();
    for tensor in &tensors {
        let Tensor { name, dtype, .. } = tensor;
        done.after += tensor.bytes();
        if let Some(linear) = layers.get(name) {
            match (merged(backend, linear, *dtype)?, linear.base()) {
                (Some(Merged { weight, bias }), _) => {
                    writer.write_view(name, backend, weight.view())?;
                    biases.extend(bias.map(|bias| (format!("{}.bias", linear.path()), bias)));
                    done.layers += 1;
                }
                (None, Base::Quantized(weight)) => write_decoded(&mut writer, backend, tensor, &weight)?,
                (None, Base::Dense(_)) => drop(write_dense(&mut writer, backend, checkpoint, tensor)?),
            }
        } else if let Some(bias) = biases.remove(name) {
            let mut cast = backend.alloc(*dtype, bias.len())?;
            backend.cast(bias.view(), cast.view_mut())?;
            writer.write_view(name, backend, cast.view())?;
        } else if known.contains(name) {
            write_beside(&mut writer, backend, checkpoint, tensor, trained.get(name))?;
        } else {
            // A bias beside those that were trained, of a layer that has none.
            writer.write(name, &vec![0; tensor.bytes() as usize])?;
        }
    }
    writer.finish()?;
    write_config(out, &config.raw, dtype)?;
    Ok(done)
}

fn refuse_tokens(model: &Model, checkpoint: &Checkpoint) -> Result<()> {
    match model.virtual_tokens() {
        None => Ok(()),
        Some(_) => {
            let why = "learned tokens do not merge into weights: keep the adapter beside the model";
            Err(Error::file(checkpoint.path(), why))
        }
    }
}

/// The configuration of the merged model: where a layer gets a bias that it did not have, its kind of layers has them.
fn config_with_biases(model: &Model) -> Result<ModelConfig> {
    let is_new = |linear: &&Linear| linear.bias().is_none() && matches!(linear.attached(), Some(Adapter::Bias(_)));
    let (mut raw, path) = (model.config.raw.clone(), Path::new("config.json"));
    for linear in model.linears().filter(is_new) {
        let key = if linear.path().contains(".mlp.") { "mlp_bias" } else { "attention_bias" };
        // As transformers has them: the others read no such key.
        let has_place = match model.config.architecture {
            Architecture::Llama => true,
            Architecture::Qwen3 => key == "attention_bias",
            Architecture::Mistral | Architecture::Qwen2 => false,
        };
        if !has_place {
            let (module, family) = (linear.path(), model.config.architecture.model_type());
            let why =
                format!("{module} has a trained bias, and a {family} has no place for it: keep the adapter beside it");
            return Err(Error::file(path, why));
        }
        raw[key] = true.into();
    }
    ModelConfig::parse(&raw.to_string(), path)
}

/// What quantising again does to a merged layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Requantised {
    /// The layer's name.
    pub path: String,
    /// ‖Q(W') − W'‖_F / ‖W'‖_F.
    pub error: f64,
    /// ‖Q(W') − W'‖_F / ‖W' − W‖_F: above 1 the new error is more than what the adapter changed.
    pub of_update: f64,
}

/// Write a model of 4-bit layers with its adapter folded in and quantised again, in bitsandbytes' layout.
///
/// Errors: a layer that is not in 4 bits; layers in several formats; a sum that is not finite.
pub fn merge_in_4_bits(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<(Converted, Vec<Requantised>)> {
    let (config, backend) = (&model.config, model.backend().as_ref());
    refuse_tokens(model, checkpoint)?;
    let layers: BTreeMap<String, &Linear> = model.linears().map(|l| (format!("{}.weight", l.path()), l)).collect();
    let trained: BTreeMap<String, Parameter> = model.trained_of_the_base().into_iter().collect();
    let how = format(model, checkpoint)?;
    let tensors = tensors(checkpoint, config)?;
    let mut writer = Writer::create(&out.join("model.safetensors"), specs_in_4_bits(&tensors, how))?;
    let (mut done, mut errors) = (Converted::default(), Vec::new());
    for tensor in &tensors {
        let Some(linear) = tensor.linear.and_then(|_| layers.get(&tensor.name)) else {
            write_beside(&mut writer, backend, checkpoint, tensor, trained.get(&tensor.name))?;
            continue;
        };
        let Base::Quantized(weight) = linear.base() else { continue };
        match merged(backend, linear, DType::F32)? {
            None => quantized::write(&mut writer, &tensor.name, backend, &weight, tensor.dtype)?,
            Some(Merged { bias: Some(_), .. }) => {
                let why = format!("{} has a trained bias, for which a 4-bit checkpoint has no place", linear.path());
                return Err(Error::file(checkpoint.path(), why));
            }
            Some(Merged { weight: sum, bias: None }) => {
                let (again, report) = requantise(backend, linear, &weight, &sum, how)?;
                quantized::write(&mut writer, &tensor.name, backend, &again, tensor.dtype)?;
                errors.push(report);
                done.layers += 1;
            }
        }
    }
    writer.finish()?;
    write_quantized_config(&config.raw, how, checkpoint.dtype("model.embed_tokens.weight")?, out)?;
    Ok((done, errors))
}

/// A tensor that is no adapted weight: as it was trained, or as the file has it.
fn write_beside(
    writer: &mut Writer,
    backend: &dyn Backend,
    checkpoint: &Checkpoint,
    tensor: &Tensor,
    trained: Option<&Parameter>,
) -> Result<()> {
    let Some(value) = trained else { return write_dense(writer, backend, checkpoint, tensor).map(drop) };
    let mut stored = backend.alloc(tensor.dtype, value.shape().elements())?;
    backend.cast(value.tensor().view(), stored.view_mut())?;
    Ok(writer.write_view(&tensor.name, backend, stored.view())?)
}

/// The one way in which all layers are in 4 bits.
fn format(model: &Model, checkpoint: &Checkpoint) -> Result<Quantization> {
    let mut all = None;
    for linear in model.linears() {
        let wrong = |what: &str| Err(Error::file(checkpoint.path(), format!("{} {what}", linear.path())));
        let Base::Quantized(weight) = linear.base() else {
            return wrong("is not in 4 bits: expected all layers to be");
        };
        let double = matches!(weight.scales, Scales::Nested { .. });
        let how = Quantization { format: weight.format, block: weight.block, double };
        if *all.get_or_insert(how) != how {
            return wrong("is in another 4-bit format than the layers before it: expected one for all");
        }
    }
    all.ok_or_else(|| Error::file(checkpoint.path(), "the model has no linear layer"))
}

fn requantise(
    backend: &dyn Backend,
    linear: &Linear,
    weight: &Quantized,
    sum: &Buffer,
    Quantization { format, block, double }: Quantization,
) -> Result<(Quantized, Requantised)> {
    let path = linear.path().to_owned();
    let again = Quantized::quantize(backend, sum.view(), weight.shape, format, block, double)?;
    let decoded = |q: &Quantized| -> Result<Buffer> {
        let mut dense = backend.alloc(DType::F32, q.elements())?;
        backend.dequantize_4bit(q, dense.view_mut())?;
        Ok(dense)
    };
    let distance = |mut x: Buffer| -> Result<f64> {
        backend.scale_in_place(-1.0, x.view_mut())?;
        backend.add_in_place(sum.view(), x.view_mut())?;
        Ok(backend.sum_squares(x.view())?.sqrt())
    };
    let (error, update) = (distance(decoded(&again)?)?, distance(decoded(weight)?)?);
    let norm = backend.sum_squares(sum.view())?.sqrt();
    let over = |of: f64| if error == 0.0 { 0.0 } else { error / of };
    Ok((again, Requantised { path, error: over(norm), of_update: over(update) }))
}
