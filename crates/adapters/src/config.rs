//! `adapter_config.json`, both ways.
//!
//! Read: every field is taken, or known to change nothing, or null, false or empty; any other is an error that
//! names it, for it might change the mathematics. Written: the keys that PEFT 0.21.2 writes for LoRA or AdaLoRA, in
//! its order.

use crate::adalora::AdaLora;
use crate::lora::check_rows;
use crate::peft::KNOWN;
use crate::{Bias, Error, Form, Init, LoraSpec, Names, Result, Targets};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// The name of the file in an adapter's folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// PEFT's names of the two methods.
const LORA: &str = "LORA";
const ADALORA: &str = "ADALORA";

/// Fields that say nothing about the mathematics, whatever their value: whence the file comes, how Megatron would
/// split a layer, and the group size of a method whose own switch is checked.
pub(crate) const IGNORED: [&str; 7] = [
    "auto_mapping",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// What an adapter is: where it goes, and its hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// r, α, the kind of scale, the dropout and the form of layers that no pattern means.
    pub spec: LoraSpec,
    /// What AdaLoRA has beside it; there where the form is AdaLoRA's.
    pub adalora: Option<AdaLora>,
    /// How A and B begin.
    pub init: Init,
    /// The layers that get an adapter,
    pub targets: Targets,
    /// but for these.
    pub exclude: Option<Names>,
    /// Ranks by pattern, in the file's order.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas by pattern, in the file's order.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Which biases are trained.
    pub bias: Bias,
    /// Modules that are trained whole, as `target_modules` names them.
    pub modules_to_save: Vec<String>,
    /// The base that the adapter was made for.
    pub base_model: Option<String>,
    /// The base's version.
    pub revision: Option<String>,
    /// PEFT's name of the task.
    pub task_type: Option<String>,
}

/// PEFT's defaults, for a causal language model.
impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            spec: LoraSpec::new(8, 8.0),
            adalora: None,
            init: Init::default(),
            targets: Targets::default(),
            exclude: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: Bias::None,
            modules_to_save: Vec::new(),
            base_model: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

impl AdapterConfig {
    /// Read a file.
    ///
    /// Errors, each with the file: it cannot be read; what [`AdapterConfig::from_json`] refuses.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        Self::from_json(&text).map_err(Error::within(path))
    }

    /// Read a text.
    ///
    /// Errors: no JSON object; another method; a field that is not supported or has an impossible value.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| Error::Json { why: error.to_string() })?;
        let mut config = Self { task_type: None, ..Self::default() };
        match fields.get("peft_type") {
            Some(Value::String(method)) if method == LORA => {}
            Some(Value::String(method)) if method == ADALORA => {
                // PEFT's own default.
                config.spec = LoraSpec { rank: 12, form: Form::AdaLora, ..config.spec };
                config.adalora = Some(AdaLora::default());
            }
            Some(Value::String(method)) => return Err(Error::Method { found: method.clone() }),
            other => return Err(Error::field("peft_type", other.unwrap_or(&Value::Null), KNOWN)),
        }
        // `init_lora_weights` first: it says how `loftq_config` is to be read.
        let (init, others): (Vec<_>, Vec<_>) = fields.iter().partition(|(field, _)| *field == "init_lora_weights");
        for (field, value) in init.into_iter().chain(others) {
            config.take(field, value)?;
        }
        config.check()?;
        Ok(config)
    }

    fn take(&mut self, field: &str, value: &Value) -> Result<()> {
        let unsupported = || Error::Unsupported { field: field.into(), value: value.to_string() };
        match field {
            "peft_type" => {}
            _ if self.adalora.as_mut().map_or(Ok(false), |adalora| adalora.take(field, value))? => {}
            "init_r" if self.adalora.is_some() => self.spec.rank = rank(field, value)?,
            // AdaLoRA's is `init_r`; this one PEFT ignores.
            "r" if self.adalora.is_some() => {}
            "r" => self.spec.rank = rank(field, value)?,
            "use_dora" if value == true && self.adalora.is_none() => self.spec.form = Form::Dora,
            "lora_alpha" => self.spec.alpha = number(field, value)?,
            "lora_dropout" => self.spec.dropout = number(field, value)?,
            "use_rslora" => {
                self.spec.rslora = value.as_bool().ok_or_else(|| Error::field(field, value, "true or false"))?;
            }
            "init_lora_weights" => {
                self.init = match value {
                    Value::Bool(true) => Init::Kaiming,
                    Value::Bool(false) => Init::Random,
                    Value::String(name) => match name.to_ascii_lowercase().as_str() {
                        "gaussian" => Init::Gaussian,
                        "pissa" => Init::Pissa,
                        "olora" => Init::Olora,
                        // How often, `loftq_config` says.
                        "loftq" => Init::Loftq { iterations: 1 },
                        _ => return Err(unsupported()),
                    },
                    _ => return Err(unsupported()),
                };
            }
            // Where the start is LoftQ's; beside another it would say nothing, and is refused.
            "loftq_config" if matches!(self.init, Init::Loftq { .. }) => {
                self.init = Init::Loftq { iterations: turns(value)? };
            }
            "target_modules" => self.targets = Targets::from_json(value)?,
            "exclude_modules" if !is_empty(value) => self.exclude = Some(Names::from_json(field, value)?),
            "rank_pattern" => self.rank_pattern = pattern(field, value, rank)?,
            "alpha_pattern" => self.alpha_pattern = pattern(field, value, number)?,
            _ if take_origin(field, value, [&mut self.base_model, &mut self.revision, &mut self.task_type])? => {}
            "bias" => {
                let bias = value.as_str().and_then(Bias::of);
                self.bias = bias.ok_or_else(|| Error::field(field, value, "none, all or lora_only"))?;
            }
            "modules_to_save" if !is_empty(value) => {
                let names = value
                    .as_array()
                    // An empty one would be the end of every path.
                    .and_then(|list| {
                        list.iter().map(|name| name.as_str().filter(|n| !n.is_empty()).map(str::to_owned)).collect()
                    });
                self.modules_to_save = names.ok_or_else(|| Error::field(field, value, "a list of names"))?;
            }
            _ if IGNORED.contains(&field) || is_empty(value) => {}
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    /// Hyper-parameters in range, those of the patterns too.
    pub fn check(&self) -> Result<()> {
        self.spec.check()?;
        if let Some(adalora) = &self.adalora {
            adalora.check(self.spec.rank)?;
        }
        if self.init.changes_the_base() {
            if self.adalora.is_some() {
                return Err(Error::field("init_lora_weights", self.init, "a start that AdaLoRA has"));
            }
            let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha).chain([self.spec.alpha]);
            if let Some(alpha) = alphas.into_iter().find(|alpha| *alpha <= 0.0) {
                return Err(Error::field("lora_alpha", alpha, "a positive number with this start"));
            }
        }
        if self.init == (Init::Loftq { iterations: 0 }) {
            return Err(Error::field("loftq_config: loftq_iter", 0, "1 or more"));
        }
        for (key, rank) in &self.rank_pattern {
            check_rows(&format!("rank_pattern: {key}"), *rank)?;
        }
        if let (Some(_), Some((key, alpha))) = (&self.adalora, self.alpha_pattern.first()) {
            let found = format!("{alpha} for {key}");
            return Err(Error::field("alpha_pattern", found, "none with AdaLoRA, where PEFT passes over it"));
        }
        for (key, alpha) in &self.alpha_pattern {
            if !alpha.is_finite() {
                return Err(Error::field(format!("alpha_pattern: {key}"), alpha, "a finite number"));
            }
        }
        Ok(())
    }

    /// The text of the file, as PEFT lays it out.
    pub fn to_json(&self) -> String {
        let mut fields = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": object(&self.alpha_pattern, |&alpha| json_number(alpha)),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": self.bias.name(),
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": self.exclude.as_ref().map(Names::to_json),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match self.init {
                Init::Kaiming => json!(true),
                Init::Random => json!(false),
                init => json!(init.to_string()),
            },
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": match self.init {
                Init::Loftq { iterations } => json!({"loftq_bits": 4, "loftq_iter": iterations}),
                _ => json!({}),
            },
            "lora_alpha": json_number(self.spec.alpha),
            "lora_bias": false,
            "lora_dropout": self.spec.dropout,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": match self.modules_to_save.as_slice() {
                [] => Value::Null,
                names => json!(names),
            },
            "monteclora_config": null,
            "peft_type": LORA,
            "peft_version": "0.21.2",
            "qalora_group_size": 16,
            "r": self.spec.rank,
            "rank_pattern": object(&self.rank_pattern, |&rank| rank.into()),
            "revision": self.revision,
            "target_modules": self.targets.to_json(),
            "target_parameters": null,
            "task_type": self.task_type,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": self.spec.form == Form::Dora,
            "use_qalora": false,
            "use_rslora": self.spec.rslora,
            "velora_config": null,
        });
        if let (Some(adalora), Value::Object(fields)) = (&self.adalora, &mut fields) {
            fields.insert("peft_type".into(), ADALORA.into());
            fields.insert("init_r".into(), self.spec.rank.into());
            fields.insert("r".into(), 8.into());
            adalora.put(fields);
            fields.sort_keys();
        }
        format!("{fields:#}")
    }
}

pub(crate) fn rank(field: &str, value: &Value) -> Result<usize> {
    let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
    rank.ok_or_else(|| Error::field(field, value, "a whole number, 1 or more"))
}

pub(crate) fn number(field: &str, value: &Value) -> Result<f64> {
    value.as_f64().ok_or_else(|| Error::field(field, value, "a number"))
}

/// `loftq_iter` of a `loftq_config`.
fn turns(config: &Value) -> Result<usize> {
    let wrong =
        |field: &str, value: &Value, expected| Err(Error::field(format!("loftq_config: {field}"), value, expected));
    match (&config["loftq_bits"], &config["loftq_iter"]) {
        (bits, _) if !bits.is_null() && bits != 4 => wrong("loftq_bits", bits, "4"),
        (_, Value::Null) => Ok(1),
        (_, turns) => rank("loftq_config: loftq_iter", turns),
    }
}

/// Take what every method's file says of its base and its task, if a field is one of these.
pub(crate) fn take_origin(
    field: &str,
    value: &Value,
    [base_model, revision, task_type]: [&mut Option<String>; 3],
) -> Result<bool> {
    match field {
        "base_model_name_or_path" => *base_model = text(field, value)?,
        "revision" => *revision = text(field, value)?,
        "task_type" => *task_type = text(field, value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn text(field: &str, value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        _ => Err(Error::field(field, value, "a text or null")),
    }
}

pub(crate) fn pattern<T>(
    field: &str,
    value: &Value,
    read: impl Fn(&str, &Value) -> Result<T>,
) -> Result<Vec<(String, T)>> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Object(keys) => {
            keys.iter().map(|(key, value)| Ok((key.clone(), read(&format!("{field}: {key}"), value)?))).collect()
        }
        _ => Err(Error::field(field, value, "an object of names and numbers")),
    }
}

/// Null, false, or a text, list or object without content.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

fn object<T>(pairs: &[(String, T)], value: impl Fn(&T) -> Value) -> Value {
    Value::Object(pairs.iter().map(|(key, item)| (key.clone(), value(item))).collect())
}

/// A whole number without a point, as PEFT's own type of alpha has it.
pub(crate) fn json_number(x: f64) -> Value {
    // Exact: a whole number below 2⁵³.
    if x.fract() == 0.0 && x.abs() < 9e15 { json!(x as i64) } else { json!(x) }
}
