//! The whole model: embedding, blocks, head; its loss, its logits.

use super::block::{Block, Place};
use super::{Cache, ModelConfig};
use crate::data::Batch;
use crate::optimizer::Named;
use crate::{Error, Result};
use rankfold_adapters::linear::peft_name;
use rankfold_adapters::{AdapterConfig, AdapterFolder, Forward, Linear, Weight, train_modules};
use rankfold_autograd::{Base, Parameter, Tape, Tensor, Value};
use rankfold_backend::params::IGNORED;
use rankfold_backend::{Backend, Buffer, Compute, DType, rope};
use std::sync::{Arc, Mutex};

/// A language model on some backend.
#[derive(Debug)]
pub struct Model {
    /// Its dimensions.
    pub config: ModelConfig,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) embedding: Value,
    pub(super) blocks: Vec<Arc<Block>>,
    pub(super) norm: Value,
    /// `None` where the head is the embedding.
    pub(super) head: Option<Value>,
    /// The rotary tables (cos, sin) so far made: [positions, head_dim / 2], grown on demand.
    pub(super) tables: Mutex<Option<(usize, Tensor, Tensor)>>,
}

/// A batch in the backend's memory.
#[derive(Debug)]
pub struct DeviceBatch {
    pub(super) ids: Arc<Buffer>,
    pub(super) positions: Arc<Buffer>,
    pub(super) starts: Option<Arc<Buffer>>,
    /// Labels shifted by one: what each position is to predict.
    pub(super) targets: Buffer,
    pub(super) rows: usize,
    /// One more than the largest position.
    pub(super) reach: usize,
    /// Positions that predict something.
    pub kept: usize,
}

impl DeviceBatch {
    /// Upload a batch; labels are shifted within each row, so that position t predicts token t + 1.
    pub fn new(backend: &dyn Backend, batch: &Batch) -> Result<Self> {
        let mut targets = vec![IGNORED; batch.labels.len()];
        for (targets, labels) in targets.chunks_mut(batch.seq.max(1)).zip(batch.labels.chunks(batch.seq.max(1))) {
            let last = targets.len() - 1;
            targets[..last].copy_from_slice(&labels[1..]);
        }
        let packed = batch.starts.iter().any(|start| *start != 0);
        Ok(Self {
            ids: Arc::new(backend.upload(&batch.ids)?),
            positions: Arc::new(backend.upload(&batch.positions)?),
            starts: if packed { Some(Arc::new(backend.upload(&batch.starts)?)) } else { None },
            rows: batch.rows,
            reach: batch.positions.iter().max().map_or(0, |p| *p as usize + 1),
            kept: targets.iter().filter(|target| **target != IGNORED).count(),
            targets: backend.upload(&targets)?,
        })
    }
}

impl Model {
    /// Where it runs.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Final hidden states [tokens, width] of a batch, normalised, ready for the head.
    fn hidden(&self, tape: &Tape, batch: &DeviceBatch, mode: &Forward, checkpointing: bool) -> Result<Tensor> {
        let (cos, sin) = self.rotary(batch.reach)?;
        let place =
            Place { batch: batch.rows, positions: batch.positions.clone(), starts: batch.starts.clone(), cos, sin };
        let mut h = tape.embedding(&batch.ids, &self.embedding.tensor(), DType::F32)?;
        for block in &self.blocks {
            h = if checkpointing {
                let (block, place, mode) = (block.clone(), place.clone(), *mode);
                tape.checkpoint(&h, move |tape, h| {
                    block.forward(tape, h, &place, &mode, None).map_err(Error::into_autograd)
                })?
            } else {
                block.forward(tape, &h, &place, mode, None)?
            };
        }
        Ok(tape.rms_norm(&h, &self.norm.tensor(), self.config.eps)?)
    }

    /// The summed loss of a batch over `normalizer` targets: the scalar to walk back from, and its value.
    pub fn loss(
        &self,
        tape: &Tape,
        batch: &DeviceBatch,
        normalizer: f64,
        mode: &Forward,
        checkpointing: bool,
    ) -> Result<(Tensor, f64)> {
        let h = self.hidden(tape, batch, mode, checkpointing)?;
        Ok(tape.linear_cross_entropy(&h, &self.head(), &batch.targets, normalizer, mode.compute)?)
    }

    /// All logits [tokens, vocab] of a batch, without dropout.
    pub fn logits(&self, batch: &DeviceBatch, compute: Compute) -> Result<Tensor> {
        let tape = Tape::inference(self.backend.clone());
        let h = self.hidden(&tape, batch, &Forward::evaluation(compute), false)?;
        Ok(tape.linear(&h, &self.head(), None, None, compute)?)
    }

    /// An empty KV cache for `tokens`.
    pub fn cache(&self, tokens: usize) -> Result<Cache> {
        let width = self.config.kv_heads * self.config.head_dim;
        Cache::new(self.backend.clone(), self.blocks.len(), tokens, width)
    }

    /// Append `ids` to the cache's sequence; the logits `[vocab]` of the token that follows.
    pub fn next_logits(&self, ids: &[u32], cache: &mut Cache, compute: Compute) -> Result<Vec<f32>> {
        let (first, end) = (cache.len, cache.len + ids.len());
        if ids.is_empty() || ids.len() > cache.free() {
            let found = format!("{} tokens", ids.len());
            return Err(Error::Setting { setting: "prompt", found, expected: "at least one, and no more than fit" });
        }
        let tape = Tape::inference(self.backend.clone());
        let (cos, sin) = self.rotary(end)?;
        let positions: Vec<u32> = (first as u32..end as u32).collect();
        let positions = Arc::new(self.backend.upload(&positions)?);
        let place = Place { batch: 1, positions, starts: None, cos, sin };
        let ids = Arc::new(self.backend.upload(ids)?);
        let mut h = tape.embedding(&ids, &self.embedding.tensor(), DType::F32)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            h = block.forward(&tape, &h, &place, &Forward::evaluation(compute), Some((cache, layer)))?;
        }
        cache.len = end;
        let width = self.config.width;
        let mut last = self.backend.alloc(DType::F32, width)?;
        self.backend.copy(h.view().slice((ids.len() - 1) * width, width)?, last.view_mut())?;
        let last = tape.rms_norm(&Tensor::constant(last, [1, width])?, &self.norm.tensor(), self.config.eps)?;
        let logits = tape.linear(&last, &self.head(), None, None, compute)?;
        Ok(self.backend.download(logits.view())?)
    }

    /// The head [vocab, width].
    fn head(&self) -> Base {
        Base::Dense(self.head.as_ref().unwrap_or(&self.embedding).tensor())
    }

    /// The rotary tables for at least `positions` positions.
    pub(crate) fn rotary(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        // The tables are replaced whole: a panic elsewhere cannot leave half of one.
        let mut tables = self.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*tables {
            Some((made, cos, sin)) if *made >= positions => Ok((cos.clone(), sin.clone())),
            _ => {
                let made = table_rows(positions);
                let ModelConfig { rope_base, rope_scaling, head_dim, .. } = self.config;
                let (cos, sin) = rope::tables(&rope::frequencies(rope_base, head_dim, rope_scaling), made);
                let tensor = |values: &[f32]| Tensor::constant(self.backend.upload(values)?, [made, head_dim / 2]);
                let (cos, sin) = (tensor(&cos)?, tensor(&sin)?);
                *tables = Some((made, cos.clone(), sin.clone()));
                Ok((cos, sin))
            }
        }
    }

    /// Bytes of the base's weights: everything but adapters.
    pub fn base_bytes(&self) -> usize {
        let dense = |value: &Value| value.tensor().buffer().bytes();
        let linear = |linear: &Linear| match linear.base() {
            Base::Dense(tensor) => tensor.buffer().bytes(),
            Base::Quantized(quantized) => quantized.bytes(),
        };
        let tables = dense(&self.embedding) + self.head.as_ref().map_or(0, dense);
        tables + self.linears().map(linear).sum::<usize>()
    }

    /// All linear layers but the head, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| block.linears())
    }

    /// The same, to attach adapters to. Empty while a tape still holds a block.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.blocks.iter_mut().filter_map(Arc::get_mut).flat_map(Block::linears_mut).collect()
    }

    /// Every tensor that is in no linear layer of a block, under the name of its file.
    pub(crate) fn values(&self) -> Vec<(String, &Value)> {
        let mut values = vec![("model.embed_tokens.weight".to_owned(), &self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            let mut add = |name: &str, value| values.push((format!("model.layers.{layer}.{name}.weight"), value));
            add("input_layernorm", &block.input_norm);
            add("post_attention_layernorm", &block.post_norm);
            if let Some([q, k]) = &block.qk_norm {
                add("self_attn.q_norm", q);
                add("self_attn.k_norm", k);
            }
        }
        values.push(("model.norm.weight".into(), &self.norm));
        values.extend(self.head.iter().map(|head| ("lm_head.weight".into(), head)));
        values
    }

    /// The trained parameters under the names of their files: an adapter's, or, with `--method full`, all.
    pub fn parameters(&self) -> Vec<Named> {
        let named = |(name, parameter)| Named { name, parameter };
        let trained = |(name, value): (String, &Value)| Some((name, value.parameter()?.clone()));
        let values = match self.linears().any(|linear| matches!(linear.weight(), Weight::Trained(_))) {
            true => self.values().into_iter().filter_map(trained).collect(),
            false => self.trained_modules(),
        };
        values.into_iter().chain(self.linears().flat_map(|linear| linear.parameters())).map(named).collect()
    }

    /// The modules that are trained whole beside an adapter, under the names of its file.
    pub(crate) fn trained_modules(&self) -> Vec<(String, Parameter)> {
        let trained = |(name, value): (String, &Value)| {
            let path = name.strip_suffix(".weight").unwrap_or(&name);
            Some((peft_name(path, "weight"), value.parameter()?.clone()))
        };
        self.values().into_iter().filter_map(trained).collect()
    }

    /// Train the modules that a configuration's `modules_to_save` names: from the values that they have or, with a
    /// folder, from its.
    ///
    /// Errors: a name that means no embedding, head or norm; the embedding or the head where they are one matrix, which
    /// an adapter's file, that has the two apart, cannot say.
    pub fn train_modules(&mut self, config: &AdapterConfig, folder: Option<&AdapterFolder>) -> Result<()> {
        if let (true, Some(path)) =
            (self.config.tied, ["model.embed_tokens", "lm_head"].iter().find(|p| config.saves(p)))
        {
            let expected = "none of the two: here the head is the embedding, and would be trained under one name alone";
            return Err(Error::Setting { setting: "modules_to_save", found: (*path).into(), expected });
        }
        let Self { embedding, blocks, norm, head, .. } = self;
        let mut modules = vec![("model.embed_tokens".to_owned(), embedding)];
        for (layer, block) in blocks.iter_mut().enumerate() {
            let Some(Block { input_norm, post_norm, qk_norm, .. }) = Arc::get_mut(block) else { continue };
            let mut add = |name: &str, value| modules.push((format!("model.layers.{layer}.{name}"), value));
            add("input_layernorm", input_norm);
            add("post_attention_layernorm", post_norm);
            if let Some([q, k]) = qk_norm {
                add("self_attn.q_norm", q);
                add("self_attn.k_norm", k);
            }
        }
        modules.push(("model.norm".into(), norm));
        modules.extend(head.iter_mut().map(|head| ("lm_head".into(), head)));
        Ok(train_modules(self.backend.as_ref(), modules, config, folder)?)
    }

    /// What is trained of the base itself, under the names that the model's own files give it.
    pub(crate) fn trained_of_the_base(&self) -> Vec<(String, Parameter)> {
        let values = self.values().into_iter().filter_map(|(name, value)| Some((name, value.parameter()?.clone())));
        let bias = |linear: &Linear| Some((format!("{}.bias", linear.path()), linear.bias()?.parameter()?.clone()));
        values.chain(self.linears().filter_map(bias)).collect()
    }
}

/// Rows of the rotary tables that are made for so many positions: seldom made again as text grows.
pub(super) fn table_rows(positions: usize) -> usize {
    positions.next_power_of_two().max(64)
}
