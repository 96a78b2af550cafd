//! A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The tensors of a layer are `base_model.model.PATH.lora_A.weight` [rank, inputs] and `….lora_B.weight`
//! [outputs, rank], with DoRA `….lora_magnitude_vector` [outputs]; with AdaLoRA `….lora_A`, `….lora_B` and `….lora_E`
//! [rank, 1] of the triplets that are left. They are in f32, or in bf16 or f16, which reading widens. The folder is
//! believed where it agrees with the model and with itself: every targeted layer has its tensors, no tensor is left
//! over, ranks are the configuration's, and every number is finite.

use crate::adalora::AdaLora;
use crate::config::CONFIG_FILE;
use crate::linear::peft_name;
use crate::{AdapterConfig, Error, Form, Linear, Lora, LoraSpec, Part, Result};
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
        let (outputs, inputs) = (layer.outputs(), layer.inputs());
        let read = |end: &str, expected: &[usize], rank| self.parameter(backend, layer, end, expected, rank);
        let (rank, kept) = match (&self.config.adalora, spec.form) {
            (Some(adalora), Form::AdaLora) => {
                let kept = adalora.kept(layer.path(), spec.rank)?;
                (kept.iter().filter(|kept| **kept).count(), kept)
            }
            _ => (spec.rank, Vec::new()),
        };
        let [in_a, in_b, rest] = spec.form.ends();
        let a = read(in_a, &[rank, inputs], Some(0))?;
        let b = read(in_b, &[outputs, rank], Some(1))?;
        let part = match spec.form {
            Form::Plain => Part::None,
            Form::Dora => Part::Magnitude(read(rest, &[outputs], None)?),
            Form::AdaLora => Part::Triplets { lambda: read(rest, &[rank, 1], Some(0))?, kept },
        };
        Lora::new(layer.path(), a, b, part, spec)
    }

    /// One of a layer's tensors, whose rank is its dimension of number `rank`.
    fn parameter(
        &self,
        backend: &dyn Backend,
        layer: &Linear,
        end: &str,
        expected: &[usize],
        rank: Option<usize>,
    ) -> Result<Parameter> {
        let (tensor, module) = (peft_name(layer.path(), end), layer.path().to_string());
        let path = self.tensors.path();
        let Some(info) = self.tensors.get(&tensor) else {
            return Err(Error::MissingTensor { path: path.into(), tensor, module });
        };
        let found = info.shape.clone();
        let differs = |at: usize| found.get(at) != expected.get(at);
        if found.len() != expected.len() || (0..expected.len()).any(|at| Some(at) != rank && differs(at)) {
            return Err(Error::OtherBase { path: path.into(), tensor, module, found, expected: expected.to_vec() });
        }
        if let Some(rank) = rank.filter(|&rank| differs(rank)) {
            let (found, expected) = (found[rank], expected[rank]);
            return Err(Error::OtherRank { path: path.into(), tensor, found, expected });
        }
        let values = self.tensors.read_f32(&tensor)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NonFinite { path: path.into(), tensor, index, value: values[index] });
        }
        Ok(Parameter::new(backend.upload(&values)?, expected)?)
    }

    /// That no tensor is there but those of the layers at `paths`.
    pub fn check_no_more(&self, paths: &[&str]) -> Result<()> {
        let ends = self.config.spec.form.ends();
        let of = |path: &&str| ends.iter().filter(|end| !end.is_empty()).map(|end| peft_name(path, end)).collect();
        let known: BTreeSet<String> = paths.iter().flat_map(|path| -> Vec<String> { of(path) }).collect();
        match self.tensors.names().find(|name| !known.contains(*name)) {
            Some(name) => Err(Error::ExtraTensor { path: self.tensors.path().into(), tensor: name.into() }),
            None => Ok(()),
        }
    }
}

/// Write the adapters of `layers`, those that have one and have not merged it, as a PEFT folder, made where it is missing.
///
/// Each of the two files appears whole or not at all, the configuration last: it is [`Attached::config`], which
/// names the layers that have one, with the pattern of the triplets that these have left.
///
/// [`Attached::config`]: crate::Attached::config
pub fn write_folder<'a>(
    backend: &dyn Backend,
    folder: &Path,
    config: &AdapterConfig,
    layers: impl IntoIterator<Item = &'a Linear>,
) -> Result<()> {
    let (mut tensors, mut pattern) = (Vec::new(), Vec::new());
    for layer in layers {
        let Some(lora) = layer.adapter() else { continue };
        for (end, parameter) in lora.parameters() {
            tensors.push((peft_name(layer.path(), end), parameter.clone()));
        }
        if let Part::Triplets { kept, .. } = lora.part() {
            pattern.push((layer.path().to_owned(), kept.clone()));
        }
    }
    fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
    let spec = |(name, value): &(String, Parameter)| Spec::new(name, DType::F32, value.shape().dims());
    let mut writer = Writer::create(&folder.join(TENSORS_FILE), tensors.iter().map(spec).collect())?;
    for (name, value) in &tensors {
        writer.write_view(name, backend, value.tensor().view())?;
    }
    writer.finish()?;
    let is_cut = pattern.iter().flat_map(|(_, kept)| kept).any(|kept| !kept);
    let adalora =
        config.adalora.clone().map(|adalora| AdaLora { pattern: if is_cut { pattern } else { Vec::new() }, ..adalora });
    let config = AdapterConfig { adalora, ..config.clone() };
    Ok(write_atomically(&folder.join(CONFIG_FILE), config.to_json().as_bytes())?)
}
