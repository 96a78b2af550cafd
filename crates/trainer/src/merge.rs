//! A model's folder with an adapter folded in: as dense weights, or in the 4 bits that it had.
//!
//! In 4 bits a layer's weight is dequantised, the update is added, and the sum is quantised again, in the same format
//! and blocks. That is another error on top of the base's own; what it is, relative to the sum and to what the adapter
//! changed, is measured layer by layer. A layer without an update, or with one of zeros, keeps its codes.

use crate::convert::{Tensor, specs_in_4_bits, tensors, write_decoded, write_dense, write_quantized_config};
use crate::model::{Architecture, Model, ModelConfig, Quantization};
use crate::product::write_config;
use crate::{Error, Result};
use rankfold_adapters::{Adapter, Linear, Merged, merged};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::{Backend, Buffer, DType, Quantized, Scales, View};
use rankfold_files::{Checkpoint, Writer, quantized};
use std::collections::BTreeMap;
use std::path::Path;

/// Write a model with its adapter folded in, as [`merged`] has it wherever there is one, what was trained beside it,
/// and 4-bit weights as the dense values that they stand for; how many layers were folded.
///
/// Errors: an adapter that does not merge, learned tokens among them; a bias where the architecture has no place for
/// it.
pub fn merge(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<usize> {
    let backend = model.backend().as_ref();
    let mut merging = Merging::of(model, checkpoint)?;
    let mut writer =
        Writer::create(&out.join("model.safetensors"), merging.tensors.iter().map(Tensor::spec).collect())?;
    let mut folded = 0;
    for tensor in std::mem::take(&mut merging.tensors) {
        let Some(linear) = merging.layers.get(&tensor.name).copied() else {
            merging.write_beside(&mut writer, backend, checkpoint, &tensor)?;
            continue;
        };
        match (merged(backend, linear, tensor.dtype)?, linear.base()) {
            (Some(Merged { weight, bias }), _) => {
                writer.write_view(&tensor.name, backend, weight.view())?;
                merging.keep(linear, bias);
                folded += 1;
            }
            (None, Base::Quantized(weight)) => write_decoded(&mut writer, backend, &tensor, &weight)?,
            (None, Base::Dense(_)) => drop(write_dense(&mut writer, backend, checkpoint, &tensor)?),
        }
    }
    writer.finish()?;
    write_config(out, &merging.config.raw, merging.dtype)?;
    Ok(folded)
}

/// What is to be written of a merged model, and where it comes from.
struct Merging<'a> {
    config: ModelConfig,
    /// Of what the checkpoint has no type for.
    dtype: DType,
    /// The checkpoint's tensors, then the biases that it lacks; a layer's weight before its bias.
    tensors: Vec<Tensor>,
    /// By the names of their weights.
    layers: BTreeMap<String, &'a Linear>,
    trained: BTreeMap<String, Parameter>,
    /// Biases of layers that were folded and are still to be written.
    biases: BTreeMap<String, Buffer>,
}

impl<'a> Merging<'a> {
    fn of(model: &'a Model, checkpoint: &Checkpoint) -> Result<Self> {
        if model.virtual_tokens().is_some() {
            let why = "learned tokens do not merge into weights: keep the adapter beside the model";
            return Err(Error::file(checkpoint.path(), why));
        }
        let config = config_with_biases(model)?;
        let dtype = checkpoint.dtype("model.embed_tokens.weight")?;
        let mut tensors = tensors(checkpoint, &model.config)?;
        let new = config.tensors().into_iter().filter(|(name, _)| checkpoint.get(name).is_none());
        tensors.extend(new.map(|(name, shape)| Tensor { name, shape, dtype, linear: None }));
        let layers = model.linears().map(|linear| (format!("{}.weight", linear.path()), linear)).collect();
        let trained = model.trained_of_the_base().into_iter().collect();
        Ok(Self { config, dtype, tensors, layers, trained, biases: BTreeMap::new() })
    }

    /// Keep the bias of a folded layer until its tensor's turn.
    fn keep(&mut self, linear: &Linear, bias: Option<Buffer>) {
        self.biases.extend(bias.map(|bias| (format!("{}.bias", linear.path()), bias)));
    }

    /// Write a tensor that is no layer's weight: as it was folded or trained, or as the file has it.
    fn write_beside(
        &mut self,
        writer: &mut Writer,
        backend: &dyn Backend,
        checkpoint: &Checkpoint,
        tensor: &Tensor,
    ) -> Result<()> {
        let Tensor { name, dtype, .. } = tensor;
        let mut write = |value: View| -> Result<()> {
            let mut stored = backend.alloc(*dtype, value.len())?;
            backend.cast(value, stored.view_mut())?;
            Ok(writer.write_view(name, backend, stored.view())?)
        };
        if let Some(bias) = self.biases.remove(name) {
            write(bias.view())
        } else if let Some(value) = self.trained.get(name) {
            write(value.tensor().view())
        } else if checkpoint.get(name).is_some() {
            write_dense(writer, backend, checkpoint, tensor).map(drop)
        } else {
            // A bias beside those that were trained, of a layer that has none.
            Ok(writer.write(name, &vec![0; tensor.bytes() as usize])?)
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

/// Write a model of 4-bit layers with its adapter folded in and quantised again, in bitsandbytes' layout: how many
/// layers the adapter changed, and what that did to every one whose weight it changed.
///
/// Errors: a layer that is not in 4 bits; layers in several formats; a sum that is not finite; those of [`merge`].
pub fn merge_in_4_bits(model: &Model, checkpoint: &Checkpoint, out: &Path) -> Result<(usize, Vec<Requantised>)> {
    let backend = model.backend().as_ref();
    let how = format(model, checkpoint)?;
    let mut merging = Merging::of(model, checkpoint)?;
    let mut writer = Writer::create(&out.join("model.safetensors"), specs_in_4_bits(&merging.tensors, how))?;
    let (mut folded, mut errors) = (0, Vec::new());
    for tensor in std::mem::take(&mut merging.tensors) {
        let Some(linear) = tensor.linear.and_then(|_| merging.layers.get(&tensor.name).copied()) else {
            merging.write_beside(&mut writer, backend, checkpoint, &tensor)?;
            continue;
        };
        let Base::Quantized(weight) = linear.base() else { continue };
        let mut write = |weight: &Quantized| quantized::write(&mut writer, &tensor.name, backend, weight, tensor.dtype);
        let Some(Merged { weight: sum, bias }) = merged(backend, linear, DType::F32)? else {
            write(&weight)?;
            continue;
        };
        let again = requantise(backend, linear, &weight, &sum, how)?;
        folded += usize::from(again.is_some() || bias.is_some());
        match again {
            Some((again, report)) => {
                write(&again)?;
                errors.push(report);
            }
            None => write(&weight)?,
        }
        merging.keep(linear, bias);
    }
    writer.finish()?;
    write_quantized_config(&merging.config.raw, how, merging.dtype, out)?;
    Ok((folded, errors))
}

/// The one way in which all layers are in 4 bits.
pub(crate) fn format(model: &Model, checkpoint: &Checkpoint) -> Result<Quantization> {
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

/// The sum in 4 bits again, and what that did; nothing where the sum is the weight: a rank of 0, a B of zeros.
fn requantise(
    backend: &dyn Backend,
    linear: &Linear,
    weight: &Quantized,
    sum: &Buffer,
    Quantization { format, block, double }: Quantization,
) -> Result<Option<(Quantized, Requantised)>> {
    let distance = |q: &Quantized| -> Result<f64> {
        let mut x = backend.alloc(DType::F32, q.elements())?;
        backend.dequantize_4bit(q, x.view_mut())?;
        backend.scale_in_place(-1.0, x.view_mut())?;
        backend.add_in_place(sum.view(), x.view_mut())?;
        Ok(backend.sum_squares(x.view())?.sqrt())
    };
    let update = distance(weight)?;
    if update == 0.0 {
        return Ok(None);
    }
    let again = Quantized::quantize(backend, sum.view(), weight.shape, format, block, double)?;
    let (error, norm) = (distance(&again)?, backend.sum_squares(sum.view())?.sqrt());
    // A sum of zeros has no error to be a part of it.
    let of_sum = if error == 0.0 { 0.0 } else { error / norm };
    let report = Requantised { path: linear.path().to_owned(), error: of_sum, of_update: error / update };
    Ok(Some((again, report)))
}
