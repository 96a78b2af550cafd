//! Causal grouped-query attention: out = softmax(scale · q kᵀ) v over the keys that each query sees.
//!
//! Saved: q, k, v, out and the log-sum-exp of every row, from which backward forms the probabilities again, block
//! by block (Dao et al. 2022, FlashAttention, algorithm 4); T×T is never in memory.

use crate::gradients::output;
use crate::saved::Saved;
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{AttentionGrads, AttentionSaved, Backend, Buffer, Compute, params};
use std::sync::Arc;

/// What the tensors' own shapes do not say.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences in the batch.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Keys before the first query.
    pub query_offset: usize,
    /// Sliding window, if any.
    pub window: Option<usize>,
    /// Precision of the products' inputs.
    pub compute: Compute,
}

struct Attention {
    p: params::Attention,
    q: Saved,
    k: Saved,
    v: Saved,
    starts: Option<Arc<Buffer>>,
    out: Saved,
    lse: Buffer,
}

impl Tape {
    /// q [batch · queries, heads · head_dim], k and v [batch · keys, kv_heads · head_dim]; starts u32
    /// [batch · queries]: the first key of each query's segment.
    pub fn attention(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&Tensor; 3],
        starts: Option<&Arc<Buffer>>,
    ) -> Result<Tensor> {
        let AttentionShape { batch, heads, kv_heads, head_dim, query_offset, window, compute } = shape;
        let rows_each = |tensor: &'static str, x: &Tensor, width: usize| {
            if batch > 0 && x.shape().width() == width && x.shape().rows().is_multiple_of(batch) {
                return Ok(x.shape().rows() / batch);
            }
            let expected = format!("[{batch} · tokens, {width}]");
            Err(Error::Shape { op: "attention", tensor, expected, found: x.shape().clone() })
        };
        let queries = rows_each("q", q, heads * head_dim)?;
        let keys = rows_each("k", k, kv_heads * head_dim)?;
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        let p =
            params::Attention { batch, queries, keys, heads, kv_heads, head_dim, scale, query_offset, window, compute };
        let mut out = self.alloc(q.dtype(), p.query_elements())?;
        let mut lse = self.alloc(q.dtype(), p.lse_elements())?;
        let starts_view = starts.map(|starts| starts.view());
        self.backend().attention(&p, q.view(), k.view(), v.view(), starts_view, out.view_mut(), lse.view_mut())?;
        let inputs = [q.variable(), k.variable(), v.variable()];
        self.record(out, q.shape().clone(), &inputs, |out| {
            let [q, k, v, out] = [self.save(q)?, self.save(k)?, self.save(v)?, self.save(out)?];
            Ok(Attention { p, q, k, v, starts: starts.cloned(), out, lse })
        })
    }
}

impl Op for Attention {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { p, q, k, v, starts, out, lse } = *self;
        let [q, k, v, out] = [q.get(backend)?, k.get(backend)?, v.get(backend)?, out.get(backend)?];
        let [mut dq, mut dk, mut dv] = [gradients.slot(&q)?, gradients.slot(&k)?, gradients.slot(&v)?];
        let starts = starts.as_ref().map(|starts| starts.view());
        let saved = AttentionSaved { q: q.view(), k: k.view(), v: v.view(), starts, out: out.view(), lse: lse.view() };
        let grads = AttentionGrads { dq: output(&mut dq), dk: output(&mut dk), dv: output(&mut dv) };
        backend.attention_grad(&p, saved, grad.view(), grads)?;
        [dq, dk, dv].into_iter().try_for_each(|slot| gradients.add_slot(slot))
    }
}
