//! Any method's folder: one reader of `adapter_config.json`, one way onto a model, one way back to a folder.

use crate::adapter::Adapter;
use crate::config::CONFIG_FILE;
use crate::relatives::RelativeConfig;
use crate::tensors;
use crate::values::Values;
use crate::virtual_tokens::{VirtualConfig, VirtualTokens};
use crate::{
    AdapterConfig, AdapterFolder, Attached, Error, Linear, Purpose, Result, attach_blank, attach_folder, attach_new,
    peft_name, write_folder,
};
use rankfold_autograd::{Parameter, Tensor};
use rankfold_backend::Backend;
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The methods that are known, by their `peft_type`.
pub(crate) const KNOWN: &str = "LORA, ADALORA, IA3, PROMPT_TUNING, PREFIX_TUNING, BITFIT, BOTTLENECK or DIFF_PRUNING";

/// An adapter's configuration, whichever the method.
#[derive(Clone, Debug, PartialEq)]
pub enum PeftConfig {
    /// LoRA, DoRA, AdaLoRA.
    Lora(AdapterConfig),
    /// A relative on linear layers.
    Relative(RelativeConfig),
    /// Learned tokens before the text.
    Virtual(VirtualConfig),
}

impl From<AdapterConfig> for PeftConfig {
    fn from(config: AdapterConfig) -> Self {
        Self::Lora(config)
    }
}

/// What was attached, for printing and for writing.
#[derive(Clone, Debug)]
pub struct AttachedPeft {
    /// The configuration with its layers by name: what belongs in the adapter's folder.
    pub config: PeftConfig,
    /// Numbers that train.
    pub parameters: usize,
    /// What a user may want to know.
    pub warnings: Vec<String>,
}

impl From<Attached> for AttachedPeft {
    fn from(attached: Attached) -> Self {
        let (parameters, warnings) = (attached.parameters(), warnings(&attached));
        Self { config: attached.config.into(), parameters, warnings }
    }
}

impl PeftConfig {
    /// That of an adapter's folder.
    ///
    /// Errors, each with the file: it cannot be read; what [`PeftConfig::from_json`] refuses.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let text = fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
        Self::from_json(&text).map_err(Error::within(&path))
    }

    /// Read a text.
    ///
    /// Errors: no JSON object; an unknown method; a field that is not supported or has an impossible value.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| Error::Json { why: error.to_string() })?;
        let method = fields.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if let Some(config) = RelativeConfig::from_fields(method, &fields)? {
            return Ok(Self::Relative(config));
        }
        if let Some(config) = VirtualConfig::from_fields(method, &fields)? {
            return Ok(Self::Virtual(config));
        }
        AdapterConfig::from_json(text).map(Self::Lora)
    }

    /// The text of the file.
    pub fn to_json(&self) -> String {
        match self {
            Self::Lora(config) => config.to_json(),
            Self::Relative(config) => config.to_json(),
            Self::Virtual(config) => config.to_json(),
        }
    }

    /// LoRA's, where it is that.
    pub fn lora(&self) -> Option<&AdapterConfig> {
        match self {
            Self::Lora(config) => Some(config),
            _ => None,
        }
    }

    /// That the adapter is what sits on the linear layers and nothing else: that without it they are the base as it is.
    ///
    /// Errors: a start that changes the base; biases or modules that are trained beside it; learned tokens.
    pub fn check_alone(&self) -> Result<()> {
        let with = match self {
            Self::Lora(lora) if lora.init.changes_the_base() => "a base that its start changes",
            Self::Lora(lora) if lora.trains_the_base() => "biases or modules that are trained beside it",
            Self::Virtual(_) => "tokens before the text",
            _ => return Ok(()),
        };
        Err(Error::NotAlone { with })
    }

    /// The base that the adapter was made for.
    pub fn base_model(&self) -> Option<&str> {
        match self {
            Self::Lora(config) => config.base_model.as_deref(),
            Self::Relative(config) => config.base_model.as_deref(),
            Self::Virtual(config) => config.base_model.as_deref(),
        }
    }

    /// Learned tokens', where it is that.
    pub fn virtual_tokens(&self) -> Option<&VirtualConfig> {
        match self {
            Self::Virtual(config) => Some(config),
            _ => None,
        }
    }

    /// Put what sits on linear layers onto those of a model's blocks; `architecture` is the `model_type` of its
    /// `config.json`. Learned tokens are the model's to attach, not its layers'.
    ///
    /// Errors: targets that match nothing; hyper-parameters out of range; a base that is trained; with a folder,
    /// tensors that are missing, left over, of other shapes, or not finite; learned tokens. No layer is then changed.
    pub fn attach(
        &self,
        backend: &dyn Backend,
        layers: &mut [&mut Linear],
        architecture: &str,
        values: Values,
    ) -> Result<AttachedPeft> {
        let config = match self {
            Self::Lora(config) => {
                let attached = match values {
                    Values::New(seed) => attach_new(backend, layers, config, architecture, seed)?,
                    Values::Blank => attach_blank(backend, layers, config, architecture)?,
                    Values::Saved(folder) => {
                        attach_folder(backend, layers, &AdapterFolder::open(folder)?, architecture)?
                    }
                };
                return Ok(attached.into());
            }
            Self::Relative(config) => config,
            Self::Virtual(config) => return Err(Error::NoLayers { method: config.peft_type() }),
        };
        let (config, parameters, unused) = config.attach(backend, layers, architecture, values)?;
        let warnings = unused.iter().map(|entry| no_layer(&format!("exclude_modules: {entry}"))).collect();
        Ok(AttachedPeft { config: Self::Relative(config), parameters, warnings })
    }

    /// Write the adapters of `layers`, the `modules` that are trained whole beside them, or the learned tokens, as a
    /// folder, made where it is missing: so that training can go on, or as other programs take them.
    ///
    /// Each of the two files appears whole or not at all, the configuration last.
    pub fn write<'a>(
        &self,
        backend: &Arc<dyn Backend>,
        folder: &Path,
        layers: impl IntoIterator<Item = &'a Linear>,
        modules: Vec<(String, Parameter)>,
        tokens: Option<&VirtualTokens>,
        purpose: Purpose,
    ) -> Result<()> {
        if let Self::Lora(config) = self {
            return write_folder(backend.as_ref(), folder, config, layers, modules, purpose);
        }
        let finished = purpose == Purpose::Exchange;
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for layer in layers {
            match layer.attached() {
                Some(Adapter::Diff(diff)) if finished => {
                    let (end, _) = diff.parameters()[0];
                    tensors.push((peft_name(layer.path(), end), diff.fixed(backend.as_ref())?));
                }
                Some(adapter) => {
                    let named =
                        |(end, parameter): (&str, &Parameter)| (peft_name(layer.path(), end), parameter.tensor());
                    tensors.extend(adapter.parameters().into_iter().map(named));
                }
                None => {}
            }
        }
        if let Some(tokens) = tokens {
            tensors.extend(if finished { tokens.finished(backend)? } else { tokens.tensors() });
        }
        tensors::write(backend.as_ref(), folder, &self.to_json(), &tensors)
    }
}

/// What to say of low-rank updates.
fn warnings(attached: &Attached) -> Vec<String> {
    let mut warnings = Vec::new();
    let wasteful: Vec<_> = attached.modules.iter().filter(|module| module.is_wasteful).collect();
    if let [first, ..] = wasteful.as_slice() {
        let (path, rank, count) = (&first.path, first.spec.rank, wasteful.len());
        warnings.push(format!(
            "{path}: rank {rank} is above the smaller side of its matrix: legal, and wasteful; {count} such"
        ));
    }
    warnings.extend(attached.unused.iter().map(|unused| no_layer(unused)));
    warnings
}

fn no_layer(entry: &str) -> String {
    format!("{entry} means no layer of this model")
}
