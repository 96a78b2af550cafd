//! A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The tensors of a layer are `base_model.model.PATH.lora_A.weight` [rank, inputs] and `….lora_B.weight`
//! [outputs, rank], in f32, or in bf16 or f16, which reading widens. The folder is believed where it agrees with
//! the model and with itself: every targeted layer has its two tensors, no tensor is left over, ranks are the
//! configuration's, and every number is finite.

use crate::config::CONFIG_FILE;
use crate::linear::peft_name;
use crate::{AdapterConfig, Error, Linear, Lora, LoraSpec, Result};
use rankfold_autograd::Parameter;
use rankfold_backend::{Backend, DType};
use rankfold_files::{Checkpoint, Spec, Writer, write_atomically};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The name of the file of tensors in an adapter's folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// An adapter on disk: its configuration, and its tensors by name.
#[derive(Debug)]
pub struct AdapterFolder {
    config: AdapterConfig,
    tensors: Checkpoint,
}

impl AdapterFolder {
    /// Open a folder: the configuration is read, of the tensors only the header.
    ///
    /// Errors: a file that is missing or broken; a configuration that is not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = AdapterConfig::read(&folder.join(CONFIG_FILE))?;
        Ok(Self { config, tensors: Checkpoint::open(&folder.join(TENSORS_FILE))? })
    }

    /// Its configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The update of one layer.
    ///
    /// Errors: a tensor that is missing, has another rank than `spec`, another shape than the layer, another type
    /// than f32, bf16 or f16, or holds a number that is not finite.
    pub fn lora(&self, backend: &dyn Backend, layer: &Linear, spec: LoraSpec) -> Result<Lora> {
        let a = self.parameter(backend, layer, "lora_A", [spec.rank, layer.inputs()], 0)?;
        let b = self.parameter(backend, layer, "lora_B", [layer.outputs(), spec.rank], 1)?;
        Lora::new(layer.path(), a, b, spec)
    }

    /// One of the two tensors, whose rank is its dimension of number `rank`.
    fn parameter(
        &self,
        backend: &dyn Backend,
        layer: &Linear,
        part: &str,
        expected: [usize; 2],
        rank: usize,
    ) -> Result<Parameter> {
        let (tensor, module) = (peft_name(layer.path(), part), layer.path().to_string());
        let path = self.tensors.path();
        let Some(info) = self.tensors.get(&tensor) else {
            return Err(Error::MissingTensor { path: path.into(), tensor, module });
        };
        let found = info.shape.clone();
        if found.len() != 2 || found[1 - rank] != expected[1 - rank] {
            return Err(Error::OtherBase { path: path.into(), tensor, module, found, expected });
        }
        if found[rank] != expected[rank] {
            let (found, expected) = (found[rank], expected[rank]);
            return Err(Error::OtherRank { path: path.into(), tensor, found, expected });
        }
        let values = self.tensors.read_f32(&tensor)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NonFinite { path: path.into(), tensor, index, value: values[index] });
        }
        Ok(Parameter::new(backend.upload(&values)?, expected)?)
    }

    /// That no tensor is there but the two of each layer at `paths`.
    pub fn check_no_more(&self, paths: &[&str]) -> Result<()> {
        let known: BTreeSet<String> =
            paths.iter().flat_map(|path| ["lora_A", "lora_B"].map(|part| peft_name(path, part))).collect();
        match self.tensors.names().find(|name| !known.contains(*name)) {
            Some(name) => Err(Error::ExtraTensor { path: self.tensors.path().into(), tensor: name.into() }),
            None => Ok(()),
        }
    }
}

/// Write the adapters of `layers`, those that have one and have not merged it, as a PEFT folder, made where it is missing.
///
/// Each of the two files appears whole or not at all, the configuration last: it is [`Attached::config`], which
/// names the layers that have one.
///
/// [`Attached::config`]: crate::Attached::config
pub fn write_folder<'a>(
    backend: &dyn Backend,
    folder: &Path,
    config: &AdapterConfig,
    layers: impl IntoIterator<Item = &'a Linear>,
) -> Result<()> {
    let mut tensors = Vec::new();
    for layer in layers {
        if let Some(lora) = layer.adapter() {
            tensors.push((peft_name(layer.path(), "lora_A"), lora.a().clone()));
            tensors.push((peft_name(layer.path(), "lora_B"), lora.b().clone()));
        }
    }
    fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
    let spec = |(name, value): &(String, Parameter)| Spec::new(name, DType::F32, value.shape().dims());
    let mut writer = Writer::create(&folder.join(TENSORS_FILE), tensors.iter().map(spec).collect())?;
    for (name, value) in &tensors {
        writer.write_view(name, backend, value.tensor().view())?;
    }
    writer.finish()?;
    Ok(write_atomically(&folder.join(CONFIG_FILE), config.to_json().as_bytes())?)
}
