//! Causal grouped-query attention without a [queries, keys] matrix (Dao et al. 2022, FlashAttention; the backward
//! pass as in Dao 2023, FlashAttention-2), segments, window and query offset included.
//!
//! s_ij = scale · q_i·k_j,   P_ij = exp(s_ij − lse_i),   out_i = Σ_j P_ij v_j,   lse_i = log Σ_j exp(s_ij)
//!
//! q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; lse [batch, heads, queries].
//!
//! Queries come in blocks of [`QUERIES`] and keys in blocks of [`KEYS`], which with their scores fit a core's nearer
//! caches; only the blocks' own products are ever formed, by the microkernels of every other product
//! ([`crate::gemm::near`]). A head's rows, strided in memory, are packed once a block; P and dS as they are formed, which
//! is where they are rounded if products are of bf16. Within a block of queries, as many as a tile has rows go through a
//! block of keys together, and only from the first to the last key that one of them sees: blocks outside a segment, a
//! window or the causal triangle cost nothing, and the diagonal little.
//!
//! In reading order: this file, `forward`, `backward`.

mod backward;
mod forward;

pub(crate) use backward::{Gradients, Saved, attention_grad};
pub(crate) use forward::attention;

use crate::gemm::near::{Near, PAD, Strided};
use crate::simd::{Isa, Kernel, Simd};
use rankfold_backend::Result;
use rankfold_backend::params::Attention;
use std::ops::Range;

/// Keys of a block.
const KEYS: usize = 64;
/// Queries of a block.
const QUERIES: usize = 64;

/// What every task of a call knows.
#[derive(Clone, Copy)]
struct Shape<'a> {
    p: &'a Attention,
    isa: Isa,
    starts: Option<&'a [u32]>,
    near: Near,
    /// head_dim, padded.
    width: usize,
}

impl<'a> Shape<'a> {
    /// An error for a segment that starts after one of its queries.
    fn new(isa: Isa, p: &'a Attention, starts: Option<&'a [u32]>) -> Result<Self> {
        for (row, start) in starts.into_iter().flatten().enumerate() {
            p.check_start(row % p.queries, *start as usize)?;
        }
        let near = Near::new(isa, p.compute);
        Ok(Self { p, isa, starts, near, width: p.head_dim.next_multiple_of(PAD).max(PAD) })
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

    /// Head h of q, or of what is shaped like it, in sequence b: [queries, head_dim].
    fn head<'x>(&self, x: &'x [f32], b: usize, h: usize, along: bool) -> Strided<'x> {
        self.strided(x, b * self.p.queries * self.p.heads + h, self.p.heads, along)
    }

    /// Head g of k, or of what is shaped like it, in sequence b: [keys, head_dim].
    fn key_head<'x>(&self, x: &'x [f32], b: usize, g: usize, along: bool) -> Strided<'x> {
        self.strided(x, b * self.p.keys * self.p.kv_heads + g, self.p.kv_heads, along)
    }

    fn strided<'x>(&self, x: &'x [f32], first: usize, heads: usize, along: bool) -> Strided<'x> {
        Strided { data: &x[(first * self.p.head_dim).min(x.len())..], stride: heads * self.p.head_dim, along }
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

/// The blocks of keys of `all` that hold some of `seen`: their places, and their keys.
fn blocks(all: Range<usize>, seen: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    parts(all, KEYS).enumerate().filter(move |(_, keys)| keys.start < seen.end && seen.start < keys.end)
}

/// Cut `len` elements off the front of a scratch.
fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    front
}

/// out = factor·x, of as many elements as out has.
struct Scaled<'a> {
    x: &'a [f32],
    factor: f32,
    out: &'a mut [f32],
}

impl Kernel for Scaled<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = self.factor * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::CpuBackend;
    use crate::simd::{Isa, Units};
    use rankfold_backend::conformance::{Law, attention, judge};
    use rankfold_reference::ReferenceBackend;

    /// What the conformance suite asks of the machine's own units, on those that it may not have.
    #[test]
    fn every_microkernel_keeps_the_contract() {
        let laws: [(&str, Law); 4] = [
            ("attention_forward", attention::forward),
            ("attention_backward", attention::backward),
            ("attention_bf16_forward", attention::forward_bf16),
            ("attention_bf16_backward", attention::backward_bf16),
        ];
        for units in [Units::None, Units::Pairs, Units::Tiles] {
            let on = |threads| CpuBackend::with_isa(Isa::portable_16(units), Some(threads));
            for (name, law) in laws {
                let verdict = law(&on(1), &ReferenceBackend::new());
                judge(name, &verdict);
                assert_eq!(law(&on(2), &ReferenceBackend::new()), verdict, "{name} on two threads");
            }
        }
    }
}
