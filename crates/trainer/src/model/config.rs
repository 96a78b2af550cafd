//! A Hugging Face `config.json` of the Llama family.
//!
//! transformers 5 writes `rope_parameters` and `dtype`, 4.x `rope_theta`, `rope_scaling` and `torch_dtype`: both are
//! read. What would change the mathematics and is not known here is an error that names the field.

use crate::{Error, Result};
use rankfold_backend::rope::Scaling;
use serde_json::Value;
use std::path::Path;

/// The architectures that are known: one skeleton, few differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3 and its many descendants.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Biases on q, k and v.
    Qwen2,
    /// RMS norms on each head of q and k.
    Qwen3,
}

impl Architecture {
    const ALL: [(&str, Self); 4] = [
        ("LlamaForCausalLM", Self::Llama),
        ("MistralForCausalLM", Self::Mistral),
        ("Qwen2ForCausalLM", Self::Qwen2),
        ("Qwen3ForCausalLM", Self::Qwen3),
    ];

    /// `model_type` in `config.json`, and the name by which PEFT knows its default targets.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// A model's dimensions.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Which of the family.
    pub architecture: Architecture,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// The residual stream's width (`hidden_size`).
    pub width: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head: as given, or width / heads.
    pub head_dim: usize,
    /// Width of the gated feed-forward (`intermediate_size`).
    pub feed_forward: usize,
    /// ε of every norm.
    pub eps: f64,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: Scaling,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub output_bias: bool,
    /// Biases in the feed-forward.
    pub mlp_bias: bool,
    /// RMS norms on each head of q and k.
    pub qk_norm: bool,
    /// The sliding window of each layer, if it has one.
    pub windows: Vec<Option<usize>>,
    /// The file as read, for writing a folder of the same model.
    pub raw: Value,
}

/// Far beyond any model, and few enough for what is made of each.
const MAX_LAYERS: usize = 4096;
/// The same of every other dimension.
const MAX_COUNT: usize = 1 << 24;

impl ModelConfig {
    /// Read `config.json` of a model's folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        Self::parse(&text, &path)
    }

    /// Parse the text of a `config.json`; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let raw: Value = serde_json::from_str(text).map_err(|e| Error::file(path, format!("not JSON: {e}")))?;
        Fields { raw: &raw }.config().map_err(|why| Error::file(path, why))
    }
}

/// The JSON object, with readers that say which field is wrong.
struct Fields<'a> {
    raw: &'a Value,
}

impl Fields<'_> {
    fn config(&self) -> Result<ModelConfig, String> {
        let architecture = self.architecture()?;
        let width = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let kv_heads = self.count_or("num_key_value_heads", heads)?;
        let layers = self.count("num_hidden_layers")?;
        // Every layer costs a list of its tensors' names before any of them is looked for.
        if layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers is {layers}, expected at most {MAX_LAYERS}"));
        }
        let head_dim = self.count_or("head_dim", width / heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("head_dim {head_dim}: expected an even number above 0"));
        }
        // So that a matrix has no more elements than can be counted.
        if heads * head_dim > MAX_COUNT {
            return Err(format!(
                "num_attention_heads {heads} of head_dim {head_dim}: expected a product of at most 2^24"
            ));
        }
        self.same("hidden_act", "silu")?;
        let (rope_base, rope_scaling) = self.rope()?;
        let attention_bias = self.flag("attention_bias")?;
        Ok(ModelConfig {
            architecture,
            vocab: self.count("vocab_size")?,
            width,
            layers,
            heads,
            kv_heads,
            head_dim,
            feed_forward: self.count("intermediate_size")?,
            eps: self.eps()?,
            rope_base,
            rope_scaling,
            tied: self.flag("tie_word_embeddings")?,
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            output_bias: attention_bias && architecture != Architecture::Qwen2,
            mlp_bias: self.flag("mlp_bias")?,
            qk_norm: architecture == Architecture::Qwen3,
            windows: self.windows(architecture, layers)?,
            raw: self.raw.clone(),
        })
    }

    fn architecture(&self) -> Result<Architecture, String> {
        let named = self.raw["architectures"][0].as_str();
        let known = || Architecture::ALL.map(|(name, _)| name).join(", ");
        let by_type = || Architecture::ALL.iter().find(|(_, a)| self.raw["model_type"] == a.model_type());
        match named {
            Some(name) => Architecture::ALL.iter().find(|(known, _)| *known == name),
            None => by_type(),
        }
        .map(|(_, architecture)| *architecture)
        .ok_or_else(|| format!("unknown architecture {}: expected one of {}", named.unwrap_or("(none given)"), known()))
    }

    /// A field that is present and not null.
    fn given(&self, field: &str) -> Option<&Value> {
        self.raw.get(field).filter(|value| !value.is_null())
    }

    fn eps(&self) -> Result<f64, String> {
        let eps = self.number("rms_norm_eps")?.ok_or("rms_norm_eps is missing")?;
        if eps >= 0.0 { Ok(eps) } else { Err(format!("rms_norm_eps is {eps}, expected 0 or more")) }
    }

    fn number(&self, field: &str) -> Result<Option<f64>, String> {
        number(self.raw, field)
    }

    fn count_or(&self, field: &str, default: usize) -> Result<usize, String> {
        let Some(value) = self.given(field) else { return Ok(default) };
        // An upper bound keeps products of dimensions from overflowing and absurd files from allocating.
        value
            .as_u64()
            .map(|n| n as usize)
            .filter(|n| (1..=MAX_COUNT).contains(n))
            .ok_or_else(|| format!("{field} is {value}, expected a whole number from 1 to 2^24"))
    }

    fn count(&self, field: &str) -> Result<usize, String> {
        match self.count_or(field, 0)? {
            0 => Err(format!("{field} is missing")),
            n => Ok(n),
        }
    }

    fn flag(&self, field: &str) -> Result<bool, String> {
        let Some(value) = self.given(field) else { return Ok(false) };
        value.as_bool().ok_or_else(|| format!("{field} is {value}, expected true or false"))
    }

    fn same(&self, field: &str, expected: &str) -> Result<(), String> {
        match self.given(field) {
            Some(value) if value != expected => Err(format!("{field} is {value}, expected \"{expected}\"")),
            _ => Ok(()),
        }
    }

    fn rope(&self) -> Result<(f64, Scaling), String> {
        let parameters = self.given("rope_parameters").or_else(|| self.given("rope_scaling")).unwrap_or(&Value::Null);
        let Some(base) = number(parameters, "rope_theta")?.or(self.number("rope_theta")?) else {
            return Err(
                "no rope_theta, neither at the top nor in rope_parameters: add the base the model was trained with"
                    .into(),
            );
        };
        if !(base > 1.0 && base.is_finite()) {
            return Err(format!("rope_theta is {base}, expected a finite number above 1"));
        }
        if let Some(factor) = number(parameters, "partial_rotary_factor")?.or(self.number("partial_rotary_factor")?)
            && factor != 1.0
        {
            return Err(format!("partial_rotary_factor is {factor}, only 1 is known"));
        }
        let need = |field: &str| {
            let value = number(parameters, field)?;
            value.filter(|v| *v > 0.0).ok_or_else(|| format!("rotary scaling without a positive {field}"))
        };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        let scaling = match kind.unwrap_or("default") {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: need("factor")? },
            "llama3" => {
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if high <= low {
                    return Err(format!("high_freq_factor {high} is not above low_freq_factor {low}"));
                }
                let original = need("original_max_position_embeddings")?;
                Scaling::Llama3 { factor: need("factor")?, low, high, original }
            }
            other => return Err(format!("unknown rotary scaling \"{other}\": expected default, linear or llama3")),
        };
        Ok((base, scaling))
    }

    fn windows(&self, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>, String> {
        let window = match self.given("sliding_window") {
            Some(_) => Some(self.count("sliding_window")?),
            None => None,
        };
        // Qwen gives a window even where it is switched off; Mistral's, where given, is meant for every layer.
        let used = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => true,
            Architecture::Qwen2 | Architecture::Qwen3 => self.flag("use_sliding_window")?,
        };
        let Some(window) = window.filter(|_| used) else { return Ok(vec![None; layers]) };
        if let Some(types) = self.given("layer_types") {
            let types = types.as_array().filter(|types| types.len() == layers);
            let types = types.ok_or_else(|| format!("layer_types: expected a list of {layers}"))?;
            return types
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") => Ok(Some(window)),
                    _ => Err(format!("unknown layer type {kind}")),
                })
                .collect();
        }
        // Without layer_types, Qwen's window starts at layer max_window_layers.
        let first = if architecture == Architecture::Mistral { 0 } else { self.count_or("max_window_layers", 28)? };
        Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect())
    }
}

fn number(object: &Value, field: &str) -> Result<Option<f64>, String> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) => Ok(Some(n)),
            None => Err(format!("{field} is {value}, expected a number")),
        },
    }
}
