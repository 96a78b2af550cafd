//! Causal grouped-query attention without a [queries, keys] matrix (Dao et al. 2022, FlashAttention; the backward
//! pass as in Dao 2023, FlashAttention-2), segments, window and query offset included.
//!
//! s_ij = scale · q_i·k_j,   P_ij = exp(s_ij − lse_i),   out_i = Σ_j P_ij v_j,   lse_i = log Σ_j exp(s_ij)
//!
//! q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; lse [batch, heads, queries].
//!
//! Queries come in blocks of [`QUERIES`] and keys in blocks of [`KEYS`], which with their scores fit a core's nearer
//! caches; only the blocks' own products are ever formed. A head's rows are strided in memory, so they are packed
//! first: row by row with the head padded to whole vectors (where the product runs along the head), and transposed
//! block by block (where it runs along the keys). Within a block of queries, [`ROWS`] of them go through a block of
//! keys together, and only from the first to the last key that one of them sees: blocks outside a segment, a window
//! or the causal triangle cost nothing, and the diagonal little.
//!
//! With bf16 products their inputs are rounded as they are packed or formed, and multiplied in f32: exactly, as bf16
//! units do.
//!
//! In reading order: `product` (the small products), `pack`, then `forward` and `backward`.

mod backward;
mod forward;
mod pack;
mod product;

pub(crate) use backward::{Gradients, Saved, attention_grad};
pub(crate) use forward::attention;

use crate::simd::Isa;
use rankfold_backend::Result;
use rankfold_backend::params::{Attention, Compute};
use std::ops::Range;

/// Keys of a block.
const KEYS: usize = 64;
/// Queries of a block.
const QUERIES: usize = 48;
/// Queries that share a pass over a block of keys: rows of the largest register tile.
const ROWS: usize = product::ROWS;
/// Elements that rows and ranges of keys are padded to a multiple of: the widest vector.
const PAD: usize = 16;

/// What every task of a call knows.
#[derive(Clone, Copy)]
struct Shape<'a> {
    p: &'a Attention,
    isa: Isa,
    starts: Option<&'a [u32]>,
    /// head_dim, padded.
    width: usize,
    /// Whether the inputs of products are rounded to bf16.
    round: bool,
}

impl<'a> Shape<'a> {
    /// An error for a segment that starts after one of its queries.
    fn new(isa: Isa, p: &'a Attention, starts: Option<&'a [u32]>) -> Result<Self> {
        for (row, start) in starts.into_iter().flatten().enumerate() {
            p.check_start(row % p.queries, *start as usize)?;
        }
        Ok(Self { p, isa, starts, width: p.head_dim.next_multiple_of(PAD).max(PAD), round: p.compute == Compute::Bf16 })
    }

    /// The keys that query i of sequence b sees.
    fn visible(&self, b: usize, i: usize) -> Range<usize> {
        let start = self.starts.map_or(0, |starts| starts[b * self.p.queries + i] as usize);
        let keys = self.p.visible(i, start);
        *keys.start()..*keys.end() + 1
    }

    /// From the first to the last key that one of the queries sees.
    fn span(&self, b: usize, queries: Range<usize>) -> Range<usize> {
        let all = queries.map(|i| self.visible(b, i));
        all.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }

    /// Query i of head h: its elements in q and out.
    fn query(&self, b: usize, i: usize, h: usize) -> Range<usize> {
        let start = ((b * self.p.queries + i) * self.p.heads + h) * self.p.head_dim;
        start..start + self.p.head_dim
    }

    /// Key j of key head g: its elements in k and v.
    fn key(&self, b: usize, j: usize, g: usize) -> Range<usize> {
        let start = ((b * self.p.keys + j) * self.p.kv_heads + g) * self.p.head_dim;
        start..start + self.p.head_dim
    }

    /// Query heads a key head.
    fn group(&self) -> usize {
        self.p.heads / self.p.kv_heads
    }

    /// lse of the queries of head h.
    fn lse(&self, b: usize, h: usize, queries: Range<usize>) -> Range<usize> {
        let start = (b * self.p.heads + h) * self.p.queries;
        start + queries.start..start + queries.end
    }
}

/// The part of `range` within the block of keys from `first`, counted from there.
fn within(range: &Range<usize>, first: usize) -> Range<usize> {
    let start = range.start.clamp(first, first + KEYS) - first;
    start..(range.end.clamp(first, first + KEYS) - first).max(start)
}

/// The whole vectors that hold `range`.
fn padded(range: &Range<usize>) -> Range<usize> {
    range.start / PAD * PAD..range.end.next_multiple_of(PAD)
}

/// The ranges of `range` in steps of at most `step`.
fn parts(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..range.end.min(start + step))
}

/// Cut `len` elements off the front of a scratch.
fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    front
}
