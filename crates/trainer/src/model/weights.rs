//! A model's tensors from its files: read one at a time, straight into the buffers that keep them.

use super::ModelConfig;
use super::block::Block;
use super::llama::Model;
use crate::{Error, Result};
use rankfold_adapters::{Linear, Weight};
use rankfold_autograd::{AttentionShape, Base, Parameter, Tensor, Value};
use rankfold_backend::{Backend, Buffer, Compute, DType, Format, Quantized};
use rankfold_files::{Checkpoint, quantized};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// How 4-bit weights are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// The format of the codes.
    pub format: Format,
    /// Elements a block.
    pub block: usize,
    /// Whether the scales are quantised too.
    pub double: bool,
}

impl Quantization {
    /// That the block is one that the formats have.
    pub fn check(&self) -> Result<()> {
        Ok(rankfold_backend::check_block(self.block)?)
    }
}

/// What the weights become as they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Frozen, in the file's own types; 4-bit weights stay so.
    AsStored,
    /// Frozen, every linear layer but the head in 4 bits; 4-bit weights stay as they are.
    Quantized(Quantization),
    /// Trained, all of it, in f32.
    Trained,
}

/// The element types that a weight may be stored in.
const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

impl ModelConfig {
    /// The name and shape of every tensor of the model, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (width, q, kv) = (self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, width])];
        for layer in 0..self.layers {
            let mut add =
                |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            add("input_layernorm.weight", &[width]);
            let linears = [
                ("self_attn.q_proj", q, width, self.qkv_bias),
                ("self_attn.k_proj", kv, width, self.qkv_bias),
                ("self_attn.v_proj", kv, width, self.qkv_bias),
                ("self_attn.o_proj", width, q, self.output_bias),
                ("mlp.gate_proj", self.feed_forward, width, self.mlp_bias),
                ("mlp.up_proj", self.feed_forward, width, self.mlp_bias),
                ("mlp.down_proj", width, self.feed_forward, self.mlp_bias),
            ];
            for (name, outputs, inputs, bias) in linears {
                add(&format!("{name}.weight"), &[outputs, inputs]);
                if bias {
                    add(&format!("{name}.bias"), &[outputs]);
                }
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("post_attention_layernorm.weight", &[width]);
        }
        tensors.push(("model.norm.weight".into(), vec![width]));
        if !self.tied {
            tensors.push(("lm_head.weight".into(), vec![self.vocab, width]));
        }
        tensors
    }

    /// Whether a tensor of that name is the weight of a linear layer other than the head: what 4 bits are for.
    pub fn is_linear(name: &str) -> bool {
        name.starts_with("model.layers.") && name.ends_with("_proj.weight")
    }

    /// Parameters of the whole model, a tied head counted once.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

impl Model {
    /// Read a model.
    ///
    /// Errors: a tensor that is missing, or of another shape or element type than the config asks for; a value that
    /// is not finite; `Precision::Trained` of a 4-bit checkpoint.
    pub fn load(
        backend: Arc<dyn Backend>,
        checkpoint: &Checkpoint,
        config: ModelConfig,
        precision: Precision,
    ) -> Result<Self> {
        let model = Reader { backend, source: checkpoint, precision }.model(config)?;
        refuse_unknown(checkpoint, &model.config)?;
        Ok(model)
    }
}

/// That the file has no layer, and no part of a layer, that the config does not speak of: a model without them would be
/// another one. What 4-bit weights have beside them, and the tables that old files keep, are no such part.
fn refuse_unknown(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let known: BTreeSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    let is_part = |name: &&str| {
        name.starts_with("model.layers.")
            && (name.ends_with(".weight") || name.ends_with(".bias"))
            && !known.contains(*name)
    };
    match checkpoint.names().find(is_part) {
        None => Ok(()),
        Some(name) => {
            let why = format!(
                "'{name}' is in the file, but not in a model of {} layers as config.json has it",
                config.layers
            );
            Err(Error::file(checkpoint.file(name), why))
        }
    }
}

/// Where a model's tensors come from.
pub(super) trait Source {
    /// A matrix that is stored in 4 bits.
    fn stored(&self, backend: &dyn Backend, name: &str, shape: [usize; 2]) -> Result<Option<Quantized>>;

    /// A dense tensor, every value of which is finite.
    fn dense(&self, backend: &dyn Backend, name: &str, shape: &[usize]) -> Result<Buffer>;

    /// A dense matrix, quantised.
    fn quantize(&self, backend: &dyn Backend, name: &str, shape: [usize; 2], q: Quantization) -> Result<Quantized>;

    /// Where a tensor is, for messages.
    fn file(&self, name: &str) -> &Path;
}

impl Source for Checkpoint {
    fn stored(&self, backend: &dyn Backend, name: &str, shape: [usize; 2]) -> Result<Option<Quantized>> {
        let Some(loaded) = quantized::load(self, name, backend)? else { return Ok(None) };
        if loaded.weight.shape != shape {
            let why = format!("'{name}' is {:?}, expected {shape:?}", loaded.weight.shape);
            return Err(Error::file(self.file(name), why));
        }
        Ok(Some(loaded.weight))
    }

    fn dense(&self, backend: &dyn Backend, name: &str, shape: &[usize]) -> Result<Buffer> {
        self.expect(name, &FLOATS, shape)?;
        Ok(self.load_finite(name, backend)?)
    }

    fn quantize(&self, backend: &dyn Backend, name: &str, shape: [usize; 2], q: Quantization) -> Result<Quantized> {
        let dense = self.dense(backend, name, &shape)?;
        Quantized::quantize(backend, dense.view(), shape, q.format, q.block, q.double)
            .map_err(|e| Error::file(Source::file(self, name), format!("'{name}': {e}")))
    }

    fn file(&self, name: &str) -> &Path {
        Self::file(self, name)
    }
}

pub(super) struct Reader<'a> {
    pub backend: Arc<dyn Backend>,
    pub source: &'a dyn Source,
    pub precision: Precision,
}

impl Reader<'_> {
    /// The whole model, in the order of the forward pass.
    pub(super) fn model(self, config: ModelConfig) -> Result<Model> {
        let embedding = self.table(&config, "model.embed_tokens.weight")?;
        let blocks =
            (0..config.layers).map(|layer| Ok(Arc::new(self.block(&config, layer)?))).collect::<Result<_>>()?;
        let norm = self.vector("model.norm.weight", config.width)?;
        let head = if config.tied { None } else { Some(self.table(&config, "lm_head.weight")?) };
        let (backend, tables) = (self.backend, Mutex::new(None));
        Ok(Model { config, backend, embedding, blocks, norm, head, virtual_tokens: None, tables })
    }

    fn block(&self, c: &ModelConfig, layer: usize) -> Result<Block> {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        let norm = |n: &str, width| self.vector(&name(&format!("{n}.weight")), width);
        let mut number = layer as u64 * 7;
        let mut linear = |n: &str, outputs: usize, inputs: usize, bias: bool| {
            number += 1;
            self.linear(name(n), number - 1, [outputs, inputs], bias)
        };
        Ok(Block {
            eps: c.eps,
            shape: AttentionShape {
                batch: 1,
                heads: c.heads,
                kv_heads: c.kv_heads,
                head_dim: c.head_dim,
                query_offset: 0,
                window: c.windows[layer],
                // Each pass says what it computes in.
                compute: Compute::F32,
            },
            input_norm: norm("input_layernorm", c.width)?,
            q: linear("self_attn.q_proj", q, c.width, c.qkv_bias)?,
            k: linear("self_attn.k_proj", kv, c.width, c.qkv_bias)?,
            v: linear("self_attn.v_proj", kv, c.width, c.qkv_bias)?,
            o: linear("self_attn.o_proj", c.width, q, c.output_bias)?,
            qk_norm: if c.qk_norm {
                Some([norm("self_attn.q_norm", c.head_dim)?, norm("self_attn.k_norm", c.head_dim)?])
            } else {
                None
            },
            post_norm: norm("post_attention_layernorm", c.width)?,
            gate: linear("mlp.gate_proj", c.feed_forward, c.width, c.mlp_bias)?,
            up: linear("mlp.up_proj", c.feed_forward, c.width, c.mlp_bias)?,
            down: linear("mlp.down_proj", c.width, c.feed_forward, c.mlp_bias)?,
        })
    }

    fn linear(&self, path: String, index: u64, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let name = format!("{path}.weight");
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), shape[0])).transpose()?;
        let quantized = |weight: Quantized, bias| {
            Ok(Linear::new(path.clone(), index, Weight::Frozen(Base::Quantized(Arc::new(weight))), bias)?)
        };
        if let Some(weight) = self.source.stored(self.backend.as_ref(), &name, shape)? {
            if self.precision == Precision::Trained {
                let why = format!("'{name}' is stored in 4 bits and cannot be trained: dequantise the model first");
                return Err(Error::file(self.source.file(&name), why));
            }
            return quantized(weight, bias);
        }
        if let Precision::Quantized(q) = self.precision {
            return quantized(self.source.quantize(self.backend.as_ref(), &name, shape, q)?, bias);
        }
        let weight = match self.value(&name, &shape, false)? {
            Value::Frozen(tensor) => Weight::Frozen(Base::Dense(tensor)),
            Value::Trained(parameter) => Weight::Trained(parameter),
        };
        Ok(Linear::new(path, index, weight, bias)?)
    }

    /// A norm's gain or a bias: small, and kept in f32.
    fn vector(&self, name: &str, width: usize) -> Result<Value> {
        self.value(name, &[width], true)
    }

    /// The embedding or the head.
    fn table(&self, config: &ModelConfig, name: &str) -> Result<Value> {
        self.value(name, &[config.vocab, config.width], false)
    }

    fn value(&self, name: &str, shape: &[usize], widen: bool) -> Result<Value> {
        let trained = self.precision == Precision::Trained;
        let mut buffer = self.source.dense(self.backend.as_ref(), name, shape)?;
        if (trained || widen) && buffer.dtype() != DType::F32 {
            let mut wide = self.backend.alloc(DType::F32, buffer.len())?;
            self.backend.cast(buffer.view(), wide.view_mut())?;
            buffer = wide;
        }
        Ok(if trained {
            Value::Trained(Parameter::new(buffer, shape)?)
        } else {
            Value::Frozen(Tensor::constant(buffer, shape)?)
        })
    }
}
