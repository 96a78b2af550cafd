//! One transformer block.

use super::Cache;
use crate::Result;
use rankfold_adapters::{Forward, Linear, VirtualTokens};
use rankfold_autograd::{AttentionShape, Tape, Tensor, Value};
use rankfold_backend::{Buffer, params};
use std::sync::Arc;
use tracing::debug_span;

/// The seven linear layers and the norms of a block.
#[derive(Debug)]
pub struct Block {
    /// ε of every norm.
    pub eps: f64,
    /// How attention sees its tensors; `batch` is the call's own.
    pub shape: AttentionShape,
    /// Gain of the norm before attention [width].
    pub input_norm: Value,
    /// [heads · head_dim, width]
    pub q: Linear,
    /// [kv_heads · head_dim, width]
    pub k: Linear,
    /// [kv_heads · head_dim, width]
    pub v: Linear,
    /// [width, heads · head_dim]
    pub o: Linear,
    /// Gains of the norms of each head of q and k [head_dim], where the architecture has them.
    pub qk_norm: Option<[Value; 2]>,
    /// Gain of the norm before the feed-forward [width].
    pub post_norm: Value,
    /// [feed_forward, width]
    pub gate: Linear,
    /// [feed_forward, width]
    pub up: Linear,
    /// [width, feed_forward]
    pub down: Linear,
}

/// Where the tokens of a call stand: shared by all blocks.
#[derive(Clone, Debug)]
pub struct Place {
    /// Sequences.
    pub batch: usize,
    /// u32 [tokens]: the position of each within its document.
    pub positions: Arc<Buffer>,
    /// u32 [tokens]: the first token of each one's document, within its row; `None` where rows are one document.
    pub starts: Option<Arc<Buffer>>,
    /// The rotary tables [positions, head_dim / 2].
    pub cos: Tensor,
    /// The same, of sines.
    pub sin: Tensor,
    /// Learned tokens and the block's number: keys and values before every row's own, where they are that.
    pub prefix: Option<(VirtualTokens, usize)>,
}

impl Block {
    /// h [tokens, width] → h [tokens, width]. With a cache: its layer, and keys of the tokens before.
    pub fn forward(
        &self,
        tape: &Tape,
        h: &Tensor,
        place: &Place,
        mode: &Forward,
        cache: Option<(&mut Cache, usize)>,
    ) -> Result<Tensor> {
        let attention = debug_span!("layer", kind = "attention").entered();
        let n = self.norm(tape, h, &self.input_norm)?;
        let mut q = self.q.forward(tape, &n, mode)?;
        let mut k = self.k.forward(tape, &n, mode)?;
        let v = self.v.forward(tape, &n, mode)?;
        if let Some([q_gain, k_gain]) = &self.qk_norm {
            q = self.norm(tape, &q, q_gain)?;
            k = self.norm(tape, &k, k_gain)?;
        }
        let q = tape.rope(&q, &place.positions, &place.cos, &place.sin)?;
        let k = tape.rope(&k, &place.positions, &place.cos, &place.sin)?;
        let mixed = match cache {
            Some((cache, layer)) => cache.attend(layer, &self.one_sequence(q.shape().rows(), mode), [&q, &k, &v])?,
            None => {
                let shape = AttentionShape { batch: place.batch, compute: mode.compute, ..self.shape };
                let learned = place.prefix.as_ref();
                let learned = learned.map(|(tokens, layer)| tokens.keys_and_values(tape, *layer));
                match learned.transpose()?.flatten() {
                    None => tape.attention(shape, [&q, &k, &v], place.starts.as_ref())?,
                    Some([keys, values]) => {
                        let shape = AttentionShape { query_offset: keys.shape().rows(), ..shape };
                        let k = tape.prepend(&keys, &k, place.batch)?;
                        let v = tape.prepend(&values, &v, place.batch)?;
                        tape.attention(shape, [&q, &k, &v], place.starts.as_ref())?
                    }
                }
            }
        };
        let h = tape.add(h, &self.o.forward(tape, &mixed, mode)?)?;
        drop(attention);

        let _mlp = debug_span!("layer", kind = "mlp").entered();
        let n = self.norm(tape, &h, &self.post_norm)?;
        let gate = self.gate.forward(tape, &n, mode)?;
        let up = self.up.forward(tape, &n, mode)?;
        let inner = tape.silu_mul(&gate, &up)?;
        Ok(tape.add(&h, &self.down.forward(tape, &inner, mode)?)?)
    }

    fn norm(&self, tape: &Tape, x: &Tensor, gain: &Value) -> Result<Tensor> {
        let _layer = debug_span!("layer", kind = "norm").entered();
        Ok(tape.rms_norm(x, &gain.tensor(), self.eps)?)
    }

    /// The kernel's parameters for new tokens of one sequence; the cache knows how many keys there are.
    fn one_sequence(&self, queries: usize, mode: &Forward) -> params::Attention {
        let AttentionShape { heads, kv_heads, head_dim, window, .. } = self.shape;
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        params::Attention {
            batch: 1,
            queries,
            keys: queries,
            heads,
            kv_heads,
            head_dim,
            scale,
            query_offset: 0,
            window,
            compute: mode.compute,
        }
    }

    /// The linear layers in the order of the forward pass.
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The same, to attach adapters to.
    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down]
    }
}
