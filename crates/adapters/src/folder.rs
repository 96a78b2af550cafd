//! A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The tensors of a layer are `base_model.model.PATH.lora_A.weight` [rank, inputs] and `….lora_B.weight`
//! [outputs, rank], with DoRA `….lora_magnitude_vector` `[outputs]`; with AdaLoRA `….lora_A`, `….lora_B` and `….lora_E`
//! [rank, 1] of the triplets that are left. Beside them stands what else is trained ([`saved`](crate::saved)). They are
//! in f32, or in bf16 or f16, which reading widens. The folder is believed where it agrees with the model and with
//! itself: every targeted layer has its tensors, no tensor is left over, ranks are the configuration's, and every number
//! is finite.

use crate::adalora::AdaLora;
use crate::config::CONFIG_FILE;
use crate::linear::peft_name;
use crate::start::{doubled, first_values, taken_out};
use crate::tensors::{self, SavedTensors};
use crate::{AdapterConfig, Form, Linear, Lora, LoraSpec, Part, Result};
use rankfold_autograd::{Parameter, Tensor};
use rankfold_backend::Backend;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The name of the file of tensors in an adapter's folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// The name of the file of A₀ and B₀ in the folder of an adapter that is to be trained on.
pub const START_FILE: &str = "start.safetensors";

/// An adapter on disk: its configuration, and its tensors by name.
#[derive(Debug)]
pub struct AdapterFolder {
    config: AdapterConfig,
    tensors: SavedTensors,
    /// A₀ and B₀ under the names of A and B, where they were kept.
    start: Option<SavedTensors>,
}

impl AdapterFolder {
    /// Open a folder: the configuration is read, of the tensors only the header.
    ///
    /// Errors: a file that is missing or broken; a configuration that is not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = AdapterConfig::read(&folder.join(CONFIG_FILE))?;
        let tensors = SavedTensors::open(&folder.join(TENSORS_FILE))?;
        let start = folder.join(START_FILE);
        let start = start.exists().then(|| SavedTensors::open(&start)).transpose()?;
        Ok(Self { config, tensors, start })
    }

    /// Its configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The update of one layer. What it began by taking out of the base is A₀ and B₀ as they were kept, or else as the
    /// base that the layer has gives them again.
    ///
    /// Errors: a tensor that is missing, has another rank than `spec`, another shape than the layer, another type
    /// than f32, bf16 or f16, or holds a number that is not finite.
    pub fn lora(&self, backend: &dyn Backend, layer: &Linear, spec: LoraSpec) -> Result<Lora> {
        let (outputs, inputs) = (layer.outputs(), layer.inputs());
        let read = |end: &str, expected: &[usize], rank| -> Result<Parameter> {
            let values = self.tensors.values(&peft_name(layer.path(), end), layer.path(), expected, rank)?;
            Ok(Parameter::new(backend.upload(&values)?, expected)?)
        };
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
        let lora = Lora::new(layer.path(), a, b, part, spec)?;
        if !self.config.init.takes_from_the_base() {
            return Ok(lora);
        }
        let [a0, b0] = match &self.start {
            None => first_values(backend, layer, spec, self.config.init)?,
            Some(kept) => {
                let read = |end: &str, expected: &[usize]| {
                    kept.values(&peft_name(layer.path(), end), layer.path(), expected, None)
                };
                [read(in_a, &[rank, inputs])?, read(in_b, &[outputs, rank])?]
            }
        };
        Ok(lora.started(taken_out(backend, layer, [&a0, &b0], spec, self.config.init)?))
    }

    /// A tensor of `module`, in f32.
    ///
    /// Errors: those of [`AdapterFolder::lora`].
    pub(crate) fn tensor(
        &self,
        backend: &dyn Backend,
        module: &str,
        name: &str,
        expected: &[usize],
    ) -> Result<Parameter> {
        self.tensors.parameter(backend, name, module, expected)
    }

    /// That no tensor is there but those of the layers at `paths`, those of these names, and modules that are saved.
    pub fn check_no_more(&self, paths: &[&str], names: &[&str]) -> Result<()> {
        let ends = self.config.spec.form.ends();
        let of = |path: &&str| ends.iter().filter(|end| !end.is_empty()).map(|end| peft_name(path, end)).collect();
        let known: BTreeSet<String> = paths.iter().flat_map(|path| -> Vec<String> { of(path) }).collect();
        let is_module = |name: &str| {
            let path = name.strip_prefix("base_model.model.").and_then(|name| name.strip_suffix(".weight"));
            path.is_some_and(|path| self.config.saves(path))
        };
        self.tensors.check_no_more(|name| known.contains(name) || names.contains(&name) || is_module(name))
    }
}

/// What a folder is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be used beside the base that others have: as a plain update of twice the rank where it began by taking
    /// something out of the base.
    Exchange,
    /// To be trained on: as it is, with A₀ and B₀ in a file of their own.
    Resume,
}

/// Write the adapters of `layers`, those that have one and have not merged it, and what is trained beside them, as a
/// PEFT folder, made where it is missing. `modules` are those that are trained whole, by the names of
/// [`peft_name`].
///
/// Each of the files appears whole or not at all, the configuration last: it is [`Attached::config`], which
/// names the layers that have one, with the pattern of the triplets that these have left.
///
/// [`Attached::config`]: crate::Attached::config
pub fn write_folder<'a>(
    backend: &dyn Backend,
    folder: &Path,
    config: &AdapterConfig,
    layers: impl IntoIterator<Item = &'a Linear>,
    modules: Vec<(String, Parameter)>,
    purpose: Purpose,
) -> Result<()> {
    let (mut tensors, mut started, mut pattern) = (modules, Vec::new(), Vec::new());
    for layer in layers {
        let mut own = layer.parameters();
        if let Some((lora, start)) = layer.adapter().and_then(|lora| Some((lora, lora.start()?))) {
            let named = |(end, parameter): (&str, &Parameter)| (peft_name(layer.path(), end), parameter.clone());
            if purpose == Purpose::Resume {
                started.extend(start.parameters().into_iter().map(named));
            } else {
                let [end_a, end_b, _] = lora.spec().form.ends();
                let [a, b] = doubled(backend, lora, start)?;
                let whole = BTreeMap::from([(end_a, &a), (end_b, &b)].map(named));
                own.iter_mut().for_each(|(name, value)| *value = whole.get(name).unwrap_or(value).clone());
            }
        }
        tensors.extend(own);
        if let Some(Part::Triplets { kept, .. }) = layer.adapter().map(Lora::part) {
            pattern.push((layer.path().to_owned(), kept.clone()));
        }
    }
    let values = |named: Vec<(String, Parameter)>| -> Vec<(String, Tensor)> {
        named.into_iter().map(|(name, parameter)| (name, parameter.tensor())).collect()
    };
    if !started.is_empty() {
        tensors::write_file(backend, &folder.join(START_FILE), &values(started))?;
    }
    let is_cut = pattern.iter().flat_map(|(_, kept)| kept).any(|kept| !kept);
    let adalora =
        config.adalora.clone().map(|adalora| AdaLora { pattern: if is_cut { pattern } else { Vec::new() }, ..adalora });
    let config = AdapterConfig { adalora, ..config.clone() };
    let config = if purpose == Purpose::Exchange { config.exchanged() } else { config };
    tensors::write(backend, folder, &config.to_json(), &values(tensors))
}
