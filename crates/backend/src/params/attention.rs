//! Causal grouped-query attention.

use super::{Compute, elements, expect, expect_some};
use crate::{Error, Result, View, ViewMut};

/// Causal grouped-query attention over `batch` sequences.
///
/// q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; heads a multiple of kv_heads,
/// query head h reading key head h / (heads / kv_heads).
///
/// Query i has position p = query_offset + i and sees key j where start_i ≤ j ≤ p, and p − j < window if there is
/// one. `starts` [batch, queries] (u32) is the first key of the query's own segment, ≤ p; without it, 0.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sequences.
    pub batch: usize,
    /// Queries a sequence.
    pub queries: usize,
    /// Keys a sequence: at least query_offset + queries.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// What scores are multiplied by: 1/√head_dim.
    pub scale: f32,
    /// Keys before the first query: the length of the KV cache.
    pub query_offset: usize,
    /// Sliding window: the number of last keys that a query sees, itself included.
    pub window: Option<usize>,
    /// Precision of the products' inputs: q and k; P and v; and backward dout and v, P and dout, dS and k, dS and q.
    ///
    /// P and dS are rounded at a scale of the backend's choice, one for all keys of a query.
    pub compute: Compute,
}

impl Attention {
    /// Elements of q, out and their gradients.
    pub fn query_elements(&self) -> usize {
        elements(&[self.batch, self.queries, self.heads, self.head_dim])
    }

    /// Elements of k, of v and of their gradients.
    pub fn key_elements(&self) -> usize {
        elements(&[self.batch, self.keys, self.kv_heads, self.head_dim])
    }

    /// Elements of the saved log-sum-exps [batch, heads, queries].
    pub fn lse_elements(&self) -> usize {
        elements(&[self.batch, self.heads, self.queries])
    }

    /// The keys that query `i` sees, given its segment's start.
    #[inline]
    pub fn visible(&self, i: usize, start: usize) -> std::ops::RangeInclusive<usize> {
        let position = self.query_offset + i;
        let window = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        start.max(window)..=position
    }

    /// The dimensions' agreement and the lengths for `attention`.
    pub fn check(
        &self,
        q: &View,
        k: &View,
        v: &View,
        starts: Option<&View>,
        out: &ViewMut,
        lse: &ViewMut,
    ) -> Result<()> {
        let kernel = "attention";
        self.check_inputs(kernel, q, k, v, starts)?;
        expect(kernel, "out", out.len(), self.query_elements())?;
        expect(kernel, "lse", lse.len(), self.lse_elements())
    }

    /// The dimensions' agreement and the lengths for `attention_grad`.
    pub fn check_grad(&self, saved: &AttentionSaved, dout: &View, grads: &AttentionGrads) -> Result<()> {
        let (kernel, s) = ("attention_grad", saved);
        self.check_inputs(kernel, &s.q, &s.k, &s.v, s.starts.as_ref())?;
        expect(kernel, "out", s.out.len(), self.query_elements())?;
        expect(kernel, "lse", s.lse.len(), self.lse_elements())?;
        expect(kernel, "dout", dout.len(), self.query_elements())?;
        expect_some(kernel, "dq", grads.dq.as_ref().map(ViewMut::len), self.query_elements())?;
        expect_some(kernel, "dk", grads.dk.as_ref().map(ViewMut::len), self.key_elements())?;
        expect_some(kernel, "dv", grads.dv.as_ref().map(ViewMut::len), self.key_elements())
    }

    fn check_inputs(&self, kernel: &'static str, q: &View, k: &View, v: &View, starts: Option<&View>) -> Result<()> {
        let invalid = |why: String| Err(Error::Invalid { kernel, why });
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return invalid(format!("{} heads: expected a multiple of {} kv_heads", self.heads, self.kv_heads));
        }
        if self.query_offset.saturating_add(self.queries) > self.keys {
            return invalid(format!("{} keys: expected at least {} + {}", self.keys, self.query_offset, self.queries));
        }
        if self.window == Some(0) {
            return invalid("window 0: expected at least 1".into());
        }
        expect(kernel, "q", q.len(), self.query_elements())?;
        expect(kernel, "k", k.len(), self.key_elements())?;
        expect(kernel, "v", v.len(), self.key_elements())?;
        expect_some(kernel, "starts", starts.map(View::len), elements(&[self.batch, self.queries]))
    }

    /// That a segment's start lies at or before its query. For backends, a query at a time.
    pub fn check_start(&self, i: usize, start: usize) -> Result<()> {
        if start <= self.query_offset + i {
            return Ok(());
        }
        let why = format!("query {i} starts at key {start}, after its own position {}", self.query_offset + i);
        Err(Error::Invalid { kernel: "attention", why })
    }
}

/// What [`Backend::attention`](crate::Backend::attention) read and wrote, for its gradient.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSaved<'a> {
    /// Queries.
    pub q: View<'a>,
    /// Keys.
    pub k: View<'a>,
    /// Values.
    pub v: View<'a>,
    /// Segment starts.
    pub starts: Option<View<'a>>,
    /// The forward's output.
    pub out: View<'a>,
    /// The forward's log-sum-exps.
    pub lse: View<'a>,
}

/// Where [`Backend::attention_grad`](crate::Backend::attention_grad) writes the gradients that are asked for.
#[derive(Debug, Default)]
pub struct AttentionGrads<'a> {
    /// [batch, queries, heads, head_dim]
    pub dq: Option<ViewMut<'a>>,
    /// [batch, keys, kv_heads, head_dim]
    pub dk: Option<ViewMut<'a>>,
    /// [batch, keys, kv_heads, head_dim]
    pub dv: Option<ViewMut<'a>>,
}
