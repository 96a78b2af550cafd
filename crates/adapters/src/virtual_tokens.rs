//! Learned tokens before the text: prompt tuning, and prefix tuning with and without its projection.
//!
//! ```text
//! prompt   (Lester et al. 2021, §2)      h = [P; embedding(ids)]                 P [tokens, width]
//! prefix   (Li & Liang 2021, §4.2)       K' = [K_l; K],  V' = [V_l; V]           in every layer l
//! its projection (§4.3)                  [K_l, V_l] of W₂·tanh(W₁·E + b₁) + b₂    E [tokens, kv], while training
//! ```
//!
//! As in PEFT: the flat prefix is [tokens, layers · 2 · kv], of each layer first the keys and then the values, the keys
//! as attention sees them, which is after their rotation; the text's own positions go on behind the learned tokens. A
//! query sees the learned tokens before its own document; so a row holds one document, for a packed one would have them
//! before its first document alone.
//!
//! There is no start that leaves the base's output as it was: a key takes part in the softmax whatever its value is,
//! and so does an embedding's. New values are PEFT's: tables N(0, 1), the projection's matrices and biases uniform in
//! ±1/√inputs.
//!
//! A finished folder has `prompt_embeddings`, P or the flat prefix, formed by the projection where there was one, as
//! PEFT writes it; a checkpoint of a projection has its own tensors instead, `prompt_encoder.…`. From a finished prefix
//! training goes on without a projection, which cannot be had back.

use crate::config::{IGNORED, is_empty, rank, take_origin};
use crate::lora::check_rows;
use crate::streams;
use crate::values::{Opened, Start, Values};
use crate::{Error, Result};
use rankfold_autograd::{Base, Parameter, Tape, Tensor};
use rankfold_backend::params::{Activation, elements};
use rankfold_backend::{Backend, Compute};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Names of the tensors: of P or the flat prefix; of E, W₁, b₁, W₂ and b₂.
const FLAT: &str = "prompt_embeddings";
const PROJECTION: [&str; 5] = [
    "prompt_encoder.embedding.weight",
    "prompt_encoder.transform.0.weight",
    "prompt_encoder.transform.0.bias",
    "prompt_encoder.transform.2.weight",
    "prompt_encoder.transform.2.bias",
];

/// What the learned tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Embeddings.
    Prompt,
    /// Keys and values of every layer.
    Prefix {
        /// Whether they come out of a projection while training.
        projection: bool,
    },
}

/// The dimensions of a model, as far as its learned tokens are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimensions {
    /// Of an embedding.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Blocks.
    pub layers: usize,
}

/// What the adapter is.
#[derive(Clone, Debug, PartialEq)]
pub struct VirtualConfig {
    /// Embeddings, or keys and values.
    pub kind: Kind,
    /// How many there are.
    pub tokens: usize,
    /// Rows of W₁ (`encoder_hidden_size`); as many as the keys have columns where not given.
    pub hidden: Option<usize>,
    /// `token_dim`, `num_attention_heads` and `num_layers`, where given: they must be the model's.
    pub shape: [Option<usize>; 3],
    /// The base that the adapter was made for.
    pub base_model: Option<String>,
    /// The base's version.
    pub revision: Option<String>,
    /// PEFT's name of the task.
    pub task_type: Option<String>,
}

const SHAPE: [&str; 3] = ["token_dim", "num_attention_heads", "num_layers"];

impl VirtualConfig {
    /// So many tokens, for a causal language model.
    pub fn new(kind: Kind, tokens: usize) -> Self {
        let task_type = Some("CAUSAL_LM".into());
        Self { kind, tokens, hidden: None, shape: [None; 3], base_model: None, revision: None, task_type }
    }

    /// Its `peft_type`.
    pub fn peft_type(&self) -> &'static str {
        match self.kind {
            Kind::Prompt => "PROMPT_TUNING",
            Kind::Prefix { .. } => "PREFIX_TUNING",
        }
    }

    /// Read the fields of a file whose `peft_type` is one of these; `None` where it is another.
    pub(crate) fn from_fields(peft_type: &str, fields: &Map<String, Value>) -> Result<Option<Self>> {
        let kinds = [Kind::Prompt, Kind::Prefix { projection: false }];
        let all = kinds.map(|kind| Self { task_type: None, ..Self::new(kind, 0) });
        let Some(mut config) = all.into_iter().find(|config| config.peft_type() == peft_type) else { return Ok(None) };
        for (field, value) in fields {
            config.take(field, value)?;
        }
        config.check()?;
        Ok(Some(config))
    }

    fn take(&mut self, field: &str, value: &Value) -> Result<()> {
        let is_prefix = self.kind != Kind::Prompt;
        if let Some(i) = SHAPE.iter().position(|name| *name == field) {
            self.shape[i] = if value.is_null() { None } else { Some(rank(field, value)?) };
            return Ok(());
        }
        match field {
            "peft_type" => {}
            "num_virtual_tokens" => self.tokens = rank(field, value)?,
            "num_transformer_submodules" if value.is_null() || *value == 1 => {}
            // How they began; what they became is in the folder.
            "prompt_tuning_init" | "prompt_tuning_init_text" | "tokenizer_kwargs" | "tokenizer_name_or_path"
                if !is_prefix => {}
            "init_weights" if is_prefix => {}
            "encoder_hidden_size" if is_prefix && !value.is_null() => self.hidden = Some(rank(field, value)?),
            "prefix_projection" if is_prefix => {
                let projection = value.as_bool().ok_or_else(|| Error::field(field, value, "true or false"))?;
                self.kind = Kind::Prefix { projection };
            }
            _ if take_origin(field, value, [&mut self.base_model, &mut self.revision, &mut self.task_type])? => {}
            _ if IGNORED.contains(&field) || is_empty(value) => {}
            _ => return Err(Error::Unsupported { field: field.into(), value: value.to_string() }),
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        check_rows("num_virtual_tokens", self.tokens)?;
        self.hidden.map_or(Ok(()), |hidden| check_rows("encoder_hidden_size", hidden))
    }

    /// The text of the file, as PEFT lays it out.
    pub(crate) fn to_json(&self) -> String {
        let mut fields = json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "modules_to_save": null,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.tokens,
            "peft_type": self.peft_type(),
            "peft_version": "0.21.2",
            "revision": self.revision,
            "task_type": self.task_type,
        });
        let own: Vec<(&str, Value)> = match self.kind {
            Kind::Prompt => vec![
                ("prompt_tuning_init", "RANDOM".into()),
                ("prompt_tuning_init_text", Value::Null),
                ("tokenizer_kwargs", Value::Null),
                ("tokenizer_name_or_path", Value::Null),
            ],
            Kind::Prefix { projection } => vec![
                ("encoder_hidden_size", json!(self.hidden)),
                ("init_weights", Value::Null),
                ("prefix_projection", projection.into()),
            ],
        };
        if let Value::Object(fields) = &mut fields {
            let shape = SHAPE.into_iter().zip(self.shape).map(|(name, value)| (name, json!(value)));
            fields.extend(own.into_iter().chain(shape).map(|(name, value)| (name.to_owned(), value)));
            fields.sort_keys();
        }
        format!("{fields:#}")
    }

    /// The same for a model of these dimensions.
    ///
    /// Errors: a configuration of another model's.
    fn resolved(&self, model: &Dimensions) -> Result<Self> {
        let Dimensions { width, heads, kv_heads, head_dim, layers } = *model;
        let shape = match self.kind {
            Kind::Prompt => [width, heads, layers],
            Kind::Prefix { .. } => [kv_heads * head_dim, kv_heads, layers],
        };
        for ((field, given), expected) in SHAPE.into_iter().zip(self.shape).zip(shape) {
            if let Some(given) = given.filter(|given| *given != expected) {
                return Err(Error::OtherModel { field, found: given, expected });
            }
        }
        let hidden = self.hidden.or((self.kind != Kind::Prompt).then_some(shape[0]));
        Ok(Self { shape: shape.map(Some), hidden, ..self.clone() })
    }

    /// The tokens for a model of these dimensions, and the configuration that says so.
    ///
    /// Errors: a count of 0; a configuration of another model's; with a folder, tensors that are missing, left over, of
    /// other shapes, or not finite.
    pub fn tokens(
        &self,
        backend: &dyn Backend,
        model: &Dimensions,
        values: Values,
    ) -> Result<(VirtualTokens, VirtualConfig)> {
        self.check()?;
        let mut config = self.resolved(model)?;
        let opened = Opened::new(values)?;
        let (n, kv) = (self.tokens, model.kv_heads * model.head_dim);
        let mut first = 0;
        let mut parameter = |name: &str, dims: &[usize], start| {
            let place = [streams::VIRTUAL_TOKENS, first];
            first += elements(dims) as u64;
            opened.parameter(backend, name, "the learned tokens", dims, start, place)
        };
        let has_projection = match &opened {
            Opened::Saved(saved) => PROJECTION.iter().any(|name| saved.has(name)),
            _ => true,
        };
        let columns = model.layers * 2 * kv;
        let (form, parameters) = match self.kind {
            Kind::Prompt => (Form::Prompt, vec![parameter(FLAT, &[n, model.width], Start::Normal(1.0))?]),
            Kind::Prefix { projection: true } if has_projection => {
                let hidden = config.hidden.unwrap_or(kv);
                let [of_kv, of_hidden] = [kv, hidden].map(|inputs| Start::Uniform(1.0 / (inputs as f64).sqrt()));
                let parameters = vec![
                    parameter(PROJECTION[0], &[n, kv], Start::Normal(1.0))?,
                    parameter(PROJECTION[1], &[hidden, kv], of_kv)?,
                    parameter(PROJECTION[2], &[hidden], of_kv)?,
                    parameter(PROJECTION[3], &[columns, hidden], of_hidden)?,
                    parameter(PROJECTION[4], &[columns], of_hidden)?,
                ];
                (Form::Projection, parameters)
            }
            Kind::Prefix { .. } => {
                config.kind = Kind::Prefix { projection: false };
                (Form::Prefix, vec![parameter(FLAT, &[n, columns], Start::Normal(1.0))?])
            }
        };
        let tokens = VirtualTokens { form, count: n, kv, parameters: parameters.into() };
        if let Opened::Saved(saved) = &opened {
            saved.check_no_more(|name| tokens.parameters().iter().any(|(known, _)| *known == name))?;
        }
        Ok((tokens, config))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Prompt,
    Prefix,
    Projection,
}

/// The learned tokens of a model; clones share their values.
#[derive(Clone, Debug)]
pub struct VirtualTokens {
    form: Form,
    count: usize,
    kv: usize,
    parameters: Arc<[Parameter]>,
}

impl VirtualTokens {
    /// A prefix that comes out of E, W₁, b₁, W₂ and b₂; `kv` columns a layer of keys, and of values.
    pub fn projected(parts: [Parameter; 5], kv: usize) -> Self {
        let count = parts[0].shape().rows();
        Self { form: Form::Projection, count, kv, parameters: parts.into() }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What is trained, by its names in a folder.
    pub fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        let names = if self.form == Form::Projection { &PROJECTION[..] } else { &[FLAT] };
        names.iter().copied().zip(self.parameters.iter()).collect()
    }

    /// P [tokens, width], where they are embeddings.
    pub fn embeddings(&self) -> Option<Tensor> {
        (self.form == Form::Prompt).then(|| self.parameters[0].tensor())
    }

    /// Keys and values [tokens, kv] of a layer; `None` where they are embeddings. The MLP's few products are taken in f32,
    /// so that what is saved is what was trained.
    pub fn keys_and_values(&self, tape: &Tape, layer: usize) -> Result<Option<[Tensor; 2]>> {
        let (n, kv) = (self.count, self.kv);
        let own = layer * 2 * kv..(layer + 1) * 2 * kv;
        let (flat, first) = match (self.form, &self.parameters[..]) {
            (Form::Projection, [table, w1, b1, w2, b2]) => {
                // The layer's own rows of W₂: each layer forms what it needs, again where it is checkpointed.
                let columns = 0..w2.shape().width();
                let rows = tape.part(&w2.tensor(), own.clone(), columns)?;
                let bias = tape.part(&b2.tensor(), 0..1, own)?;
                let (first, exact) = (Base::Dense(w1.tensor()), Compute::F32);
                let inner = tape.linear(&table.tensor(), &first, Some(&b1.tensor()), None, exact)?;
                let inner = tape.activate(Activation::Tanh, &inner)?;
                (tape.linear(&inner, &Base::Dense(rows), Some(&bias), None, exact)?, 0)
            }
            (Form::Prefix, [flat]) => (flat.tensor(), own.start),
            _ => return Ok(None),
        };
        let part = |first: usize| tape.part(&flat, 0..n, first..first + kv);
        Ok(Some([part(first)?, part(first + kv)?]))
    }

    /// As they train.
    pub(crate) fn tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters().into_iter().map(|(name, parameter)| (name.to_owned(), parameter.tensor())).collect()
    }

    /// As other programs take them.
    pub(crate) fn finished(&self, backend: &Arc<dyn Backend>) -> Result<Vec<(String, Tensor)>> {
        if self.form != Form::Projection {
            return Ok(self.tensors());
        }
        let (tape, columns) = (Tape::inference(backend.clone()), self.parameters[4].shape().elements());
        let mut flat = backend.alloc(self.parameters[0].tensor().dtype(), self.count * columns)?;
        for layer in 0..columns / (2 * self.kv) {
            let parts = self.keys_and_values(&tape, layer)?.into_iter().flatten();
            for (i, part) in parts.enumerate() {
                for token in 0..self.count {
                    let to = token * columns + (2 * layer + i) * self.kv;
                    backend.copy(part.view().slice(token * self.kv, self.kv)?, flat.slice_mut(to, self.kv)?)?;
                }
            }
        }
        Ok(vec![(FLAT.to_owned(), Tensor::constant(flat, [self.count, columns])?)])
    }
}
