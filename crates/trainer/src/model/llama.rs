//! The whole model: embedding, blocks, head; its loss, its logits.

use super::block::{Block, Place};
use super::{Cache, ModelConfig};
use crate::data::Batch;
use crate::optimizer::Named;
use crate::{Error, Result};
use rankfold_adapters::linear::peft_name;
use rankfold_adapters::{
    AdapterConfig, AdapterFolder, AttachedPeft, Forward, Linear, PeftConfig, Values, VirtualTokens, Weight,
    attach_remade, train_modules, virtual_tokens,
};
use rankfold_autograd::{Base, Parameter, Tape, Tensor, Value};
use rankfold_backend::params::IGNORED;
use rankfold_backend::{Backend, Buffer, Compute, DType, rope};
use std::sync::{Arc, Mutex};
use tracing::debug_span;

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
    /// What was learned to stand before the text, if anything.
    pub(super) virtual_tokens: Option<VirtualTokens>,
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

/// What a model has learned to stand before each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    Nothing,
    /// So many rows of its own.
    Rows(usize),
    /// So many keys, which no row of its own belongs to.
    Keys(usize),
}

impl DeviceBatch {
    /// Upload a batch; labels are shifted within each row, so that position t predicts token t + 1.
    pub fn new(backend: &dyn Backend, batch: &Batch) -> Result<Self> {
        Self::behind(backend, batch, Before::Nothing)
    }

    /// The same behind what a model has learned: positions and the keys that a token sees are counted from there, and a
    /// learned row has no label.
    pub(super) fn behind(backend: &dyn Backend, batch: &Batch, before: Before) -> Result<Self> {
        let seq = batch.seq.max(1);
        let (rows, keys) = match before {
            Before::Nothing => (0, 0),
            Before::Rows(rows) => (rows, rows),
            Before::Keys(keys) => (0, keys),
        };
        // A document that begins within a row would not see what stands before the row.
        let alone = |i: usize| batch.labels[i] == IGNORED || batch.starts[i] == 0;
        if let Some(i) = (0..batch.labels.len()).find(|i| keys > 0 && !alone(*i)) {
            let found = format!("with a document that begins at token {} of row {}", batch.starts[i], i / seq);
            return Err(Error::Setting {
                setting: "batch",
                found,
                expected: "one document a row behind learned tokens",
            });
        }
        let behind = |x: u32| x + keys as u32;
        let start = |start: u32| if start == 0 { 0 } else { behind(start) };
        let length = rows + seq;
        let tokens = batch.rows * length;
        let (mut positions, mut starts) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        let mut targets = Vec::with_capacity(tokens);
        for row in 0..batch.rows {
            let own = row * batch.seq..(row + 1) * batch.seq;
            positions.extend((0..rows as u32).chain(batch.positions[own.clone()].iter().map(|p| behind(*p))));
            starts.extend(std::iter::repeat_n(0, rows).chain(batch.starts[own.clone()].iter().map(|s| start(*s))));
            let labels = std::iter::repeat_n(IGNORED, rows).chain(batch.labels[own].iter().copied());
            targets.extend(labels.skip(1).chain([IGNORED]));
        }
        debug_assert_eq!(targets.len(), tokens);
        let packed = starts.iter().any(|start| *start != 0);
        Ok(Self {
            ids: Arc::new(backend.upload(&batch.ids)?),
            starts: if packed { Some(Arc::new(backend.upload(&starts)?)) } else { None },
            rows: batch.rows,
            reach: positions.iter().max().map_or(0, |p| *p as usize + 1),
            positions: Arc::new(backend.upload(&positions)?),
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

    /// Put an adapter of any method onto the model; the configuration that belongs in its folder.
    ///
    /// Errors: those of [`PeftConfig::attach`]; learned tokens of another model's; of a folder, with its name. The
    /// model is then as it was.
    pub fn attach(&mut self, config: &PeftConfig, values: Values) -> Result<AttachedPeft> {
        self.attach_peft(config, values).map_err(|why| match (why, values) {
            (Error::Adapters(why), Values::Saved(folder)) => why.in_folder(folder).into(),
            (why @ Error::Setting { .. }, Values::Saved(folder)) => {
                Error::File { path: folder.into(), why: why.to_string() }
            }
            (why, _) => why,
        })
    }

    fn attach_peft(&mut self, config: &PeftConfig, values: Values) -> Result<AttachedPeft> {
        let backend = self.backend.clone();
        let Some(learned) = config.virtual_tokens() else {
            let architecture = self.config.architecture.model_type();
            let folder = match (values, config.lora()) {
                (Values::Saved(folder), Some(lora)) if !lora.modules_to_save.is_empty() => {
                    Some(AdapterFolder::open(folder)?)
                }
                _ => None,
            };
            return self.training_modules(config.lora(), folder.as_ref(), |model| {
                Ok(config.attach(backend.as_ref(), &mut model.linears_mut(), architecture, values)?)
            });
        };
        let ModelConfig { width, heads, kv_heads, head_dim, layers, .. } = self.config;
        let dimensions = virtual_tokens::Dimensions { width, heads, kv_heads, head_dim, layers };
        let (tokens, config) = learned.tokens(backend.as_ref(), &dimensions, values)?;
        let parameters = tokens.parameters().iter().map(|(_, parameter)| parameter.shape().elements()).sum();
        self.virtual_tokens = Some(tokens);
        Ok(AttachedPeft { config: PeftConfig::Virtual(config), parameters, warnings: Vec::new() })
    }

    /// Put a new LoRA on by LoftQ or PiSSA, which make the 4-bit base anew from `dense`, the values of a matrix by its
    /// path.
    ///
    /// Errors: those of [`attach_remade`].
    pub fn attach_remade(
        &mut self,
        config: &AdapterConfig,
        dense: &dyn Fn(&str) -> rankfold_adapters::Result<Vec<f32>>,
    ) -> Result<AttachedPeft> {
        let (backend, architecture) = (self.backend.clone(), self.config.architecture.model_type());
        self.training_modules(Some(config), None, |model| {
            Ok(attach_remade(backend.as_ref(), &mut model.linears_mut(), config, architecture, dense)?.into())
        })
    }

    /// Whether its base is one that was made for its adapter, in 4 bits, without which that is of no use.
    pub fn has_own_base(&self) -> bool {
        self.linears().any(Linear::has_own_base)
    }

    /// What was learned to stand before the text, if anything.
    pub fn virtual_tokens(&self) -> Option<&VirtualTokens> {
        self.virtual_tokens.as_ref()
    }

    /// A batch in the backend's memory, as this model takes it: behind its learned tokens.
    ///
    /// Errors: a row of several documents where there are such tokens.
    pub fn batch(&self, batch: &Batch) -> Result<DeviceBatch> {
        let _layer = debug_span!("layer", kind = "batch").entered();
        let before = match &self.virtual_tokens {
            None => Before::Nothing,
            Some(tokens) if tokens.embeddings().is_some() => Before::Rows(tokens.count()),
            Some(tokens) => Before::Keys(tokens.count()),
        };
        DeviceBatch::behind(self.backend.as_ref(), batch, before)
    }

    /// Positions of a batch that this model predicts something at: with learned embeddings, the first token of a row
    /// too.
    pub fn targets(&self, batch: &Batch) -> usize {
        let firsts = batch.labels.iter().step_by(batch.seq.max(1)).filter(|label| **label != IGNORED).count();
        let learned = self.virtual_tokens.as_ref().and_then(VirtualTokens::embeddings);
        batch.targets() + if learned.is_some() { firsts } else { 0 }
    }

    /// Final hidden states [tokens, width] of a batch, normalised, ready for the head: of learned rows, too.
    fn hidden(&self, tape: &Tape, batch: &DeviceBatch, mode: &Forward, checkpointing: bool) -> Result<Tensor> {
        let (cos, sin) = self.rotary(batch.reach)?;
        let place = Place {
            batch: batch.rows,
            positions: batch.positions.clone(),
            starts: batch.starts.clone(),
            cos,
            sin,
            prefix: None,
        };
        let embedding = debug_span!("layer", kind = "embedding").entered();
        let mut h = tape.embedding(&batch.ids, &self.embedding.tensor(), DType::F32)?;
        if let Some(learned) = self.virtual_tokens.as_ref().and_then(VirtualTokens::embeddings) {
            h = tape.prepend(&learned, &h, batch.rows)?;
        }
        drop(embedding);
        for (layer, block) in self.blocks.iter().enumerate() {
            let _block = debug_span!("block", number = layer).entered();
            let prefix = self.virtual_tokens.clone().map(|tokens| (tokens, layer));
            let place = Place { prefix, ..place.clone() };
            h = if checkpointing {
                let (block, mode) = (block.clone(), *mode);
                tape.checkpoint(&h, move |tape, h| {
                    block.forward(tape, h, &place, &mode, None).map_err(Error::into_autograd)
                })?
            } else {
                block.forward(tape, &h, &place, mode, None)?
            };
        }
        let _layer = debug_span!("layer", kind = "norm").entered();
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
        let _layer = debug_span!("layer", kind = "head").entered();
        Ok(tape.linear_cross_entropy(&h, &self.head(), &batch.targets, normalizer, mode.compute)?)
    }

    /// h [rows · tokens, width] without the first `learned` of each row.
    fn without_first(&self, h: &Tensor, rows: usize, learned: usize) -> Result<Tensor> {
        let (width, tokens) = (h.shape().width(), h.shape().rows() / rows.max(1));
        let kept = tokens - learned;
        let mut own = self.backend.alloc(h.dtype(), rows * kept * width)?;
        for row in 0..rows {
            let from = h.view().slice((row * tokens + learned) * width, kept * width)?;
            self.backend.copy(from, own.slice_mut(row * kept * width, kept * width)?)?;
        }
        Ok(Tensor::constant(own, [rows * kept, width])?)
    }

    /// All logits [tokens, vocab] of a batch, without dropout.
    pub fn logits(&self, batch: &DeviceBatch, compute: Compute) -> Result<Tensor> {
        let tape = Tape::inference(self.backend.clone());
        let mut h = self.hidden(&tape, batch, &Forward::evaluation(compute), false)?;
        if let Some(learned) = self.virtual_tokens.as_ref().and_then(VirtualTokens::embeddings) {
            h = self.without_first(&h, batch.rows, learned.shape().rows())?;
        }
        Ok(tape.linear(&h, &self.head(), None, None, compute)?)
    }

    /// An empty KV cache for `tokens`, and for the learned ones before them.
    pub fn cache(&self, tokens: usize) -> Result<Cache> {
        let width = self.config.kv_heads * self.config.head_dim;
        let learned = self.virtual_tokens.as_ref().map_or(0, VirtualTokens::count);
        Cache::new(self.backend.clone(), self.blocks.len(), tokens.saturating_add(learned), width)
    }

    /// Put the learned tokens into an empty cache.
    fn begin(&self, cache: &mut Cache, compute: Compute) -> Result<()> {
        let Some(learned) = &self.virtual_tokens else { return Ok(()) };
        let tape = Tape::inference(self.backend.clone());
        match learned.embeddings() {
            Some(h) => drop(self.append(&tape, h.detach(), cache, compute)?),
            None => {
                for layer in 0..self.blocks.len() {
                    if let Some([k, v]) = learned.keys_and_values(&tape, layer)? {
                        cache.put(layer, learned.count(), [&k, &v])?;
                    }
                }
                cache.len = learned.count();
            }
        }
        Ok(())
    }

    /// Run h [tokens, width] behind what the cache holds, and append it.
    fn append(&self, tape: &Tape, mut h: Tensor, cache: &mut Cache, compute: Compute) -> Result<Tensor> {
        let (first, end) = (cache.len, cache.len + h.shape().rows());
        let (cos, sin) = self.rotary(end)?;
        let positions: Vec<u32> = (first as u32..end as u32).collect();
        let positions = Arc::new(self.backend.upload(&positions)?);
        let place = Place { batch: 1, positions, starts: None, cos, sin, prefix: None };
        for (layer, block) in self.blocks.iter().enumerate() {
            h = block.forward(tape, &h, &place, &Forward::evaluation(compute), Some((&mut *cache, layer)))?;
        }
        cache.len = end;
        Ok(h)
    }

    /// Append `ids` to the cache's sequence; the logits `[vocab]` of the token that follows.
    pub fn next_logits(&self, ids: &[u32], cache: &mut Cache, compute: Compute) -> Result<Vec<f32>> {
        if cache.len == 0 {
            self.begin(cache, compute)?;
        }
        if ids.is_empty() || ids.len() > cache.free() {
            let found = format!("{} tokens", ids.len());
            return Err(Error::Setting { setting: "prompt", found, expected: "at least one, and no more than fit" });
        }
        let tape = Tape::inference(self.backend.clone());
        let ids = Arc::new(self.backend.upload(ids)?);
        let h = tape.embedding(&ids, &self.embedding.tensor(), DType::F32)?;
        let h = self.append(&tape, h, cache, compute)?;
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
    pub fn linears(&self) -> impl Iterator<Item = &Linear> + Clone {
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
        let of_linears = self.linears().flat_map(|linear| linear.parameters());
        let learned = self.virtual_tokens.iter().flat_map(VirtualTokens::parameters);
        let learned = learned.map(|(name, parameter)| (name.to_owned(), parameter.clone()));
        values.into_iter().chain(of_linears).chain(learned).map(named).collect()
    }

    /// The modules that are trained whole beside an adapter, under the names of its file.
    pub(crate) fn trained_modules(&self) -> Vec<(String, Parameter)> {
        let trained = |(name, value): (String, &Value)| {
            let path = name.strip_suffix(".weight").unwrap_or(&name);
            Some((peft_name(path, "weight"), value.parameter()?.clone()))
        };
        self.values().into_iter().filter_map(trained).collect()
    }

    /// Attach, and train the modules that the configuration's `modules_to_save` names; where either is refused, the
    /// modules are as they were.
    fn training_modules(
        &mut self,
        config: Option<&AdapterConfig>,
        folder: Option<&AdapterFolder>,
        attach: impl FnOnce(&mut Self) -> Result<AttachedPeft>,
    ) -> Result<AttachedPeft> {
        let before: Vec<Value> = self.modules_mut().into_iter().map(|(_, value)| value.clone()).collect();
        let trained = config.map_or(Ok(()), |config| self.train_modules(config, folder));
        let attached = trained.and_then(|()| attach(self));
        if attached.is_err() {
            self.modules_mut().into_iter().zip(before).for_each(|((_, value), before)| *value = before);
        }
        attached
    }

    /// Train the modules that a configuration's `modules_to_save` names: from the values that they have or, with a
    /// folder, from its.
    ///
    /// Errors: a name that means no embedding, head or norm; the embedding or the head where they are one matrix, which
    /// an adapter's file, that has the two apart, cannot say. Some may then be trained already.
    fn train_modules(&mut self, config: &AdapterConfig, folder: Option<&AdapterFolder>) -> Result<()> {
        if let (true, Some(path)) =
            (self.config.tied, ["model.embed_tokens", "lm_head"].iter().find(|p| config.saves(p)))
        {
            let expected = "none of the two: here the head is the embedding, and would be trained under one name alone";
            return Err(Error::Setting { setting: "modules_to_save", found: (*path).into(), expected });
        }
        let backend = self.backend.clone();
        Ok(train_modules(backend.as_ref(), self.modules_mut(), config, folder)?)
    }

    /// The embedding, the norms and the head, by path.
    fn modules_mut(&mut self) -> Vec<(String, &mut Value)> {
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
        modules
    }

    /// What is trained of the base itself, under the names that the model's own files give it.
    pub fn trained_of_the_base(&self) -> Vec<(String, Parameter)> {
        let values = self.values().into_iter().filter_map(|(name, value)| Some((name, value.parameter()?.clone())));
        let bias = |linear: &Linear| Some((format!("{}.bias", linear.path()), linear.bias()?.parameter()?.clone()));
        values.chain(self.linears().filter_map(bias)).collect()
    }
}

/// Rows of the rotary tables that are made for so many positions: seldom made again as text grows.
pub(super) fn table_rows(positions: usize) -> usize {
    positions.next_power_of_two().max(64)
}
