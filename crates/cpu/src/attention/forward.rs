//! Forward: an online softmax (Milakov & Gimelshein 2018). Over the blocks of keys seen so far each query keeps
//! m = max s, l = Σ exp(s − m) and the output Σ exp(s − m) v; a block with a larger maximum scales the latter two by
//! exp(m_old − m_new). At the end out = output / l and lse = m + log l. A task is one head of one sequence.

use super::{KEYS, QUERIES, Scaled, Shape, blocks, padded, parts, take, within};
use crate::gemm::near::{Multiply, Strided};
use crate::scratch;
use crate::simd::{Isa, Kernel, Simd, exp};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::Result;
use rankfold_backend::params::Attention;
use std::ops::Range;

/// out and lse.
pub(crate) fn attention(
    threads: &Threads,
    isa: Isa,
    p: &Attention,
    inputs: [&[f32]; 3],
    starts: Option<&[u32]>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<()> {
    let shape = Shape::new(isa, p, starts)?;
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    threads.run(p.batch * p.heads, |task| {
        Head { shape, b: task / p.heads, h: task % p.heads, out, lse }.run(inputs);
    });
    Ok(())
}

/// Head h of sequence b.
struct Head<'a> {
    shape: Shape<'a>,
    b: usize,
    h: usize,
    out: Disjoint<'a, f32>,
    lse: Disjoint<'a, f32>,
}

/// A block of keys.
struct Keys<'a> {
    range: Range<usize>,
    /// k [head_dim, KEYS] and v [KEYS, head_dim] as right panels.
    k: &'a [f32],
    v: &'a [f32],
}

/// A block of queries.
struct Block<'a> {
    /// [QUERIES, head_dim] as left panels.
    q: &'a mut [f32],
    /// Σ exp(s − m) v [QUERIES, width]
    sums: &'a mut [f32],
    /// The running maximum and Σ exp(s − m), [QUERIES] each.
    m: &'a mut [f32],
    l: &'a mut [f32],
    /// Scores of a tile's queries, [height, KEYS]; and exp(s − m) as a left panel.
    scores: &'a mut [f32],
    weights: &'a mut [f32],
}

impl Head<'_> {
    fn run(&self, [q, k, v]: [&[f32]; 3]) {
        let Shape { p, near, width, .. } = self.shape;
        let (b, g, depth) = (self.b, self.h / self.shape.group(), p.head_dim);
        let span = self.shape.span(b, 0..p.queries);
        let first = span.start / KEYS * KEYS;
        let count = (span.end - first).div_ceil(KEYS);
        let (of_k, of_v) = (near.right_len(depth, KEYS), near.right_len(KEYS, depth));
        let (of_q, of_tile) = (near.left_len(QUERIES, depth), near.left_len(near.height(), KEYS));
        let of_block = of_q + QUERIES * (width + 2) + near.height() * KEYS + of_tile;
        scratch::with(count * (of_k + of_v) + of_block, |mut s| {
            let mut block = Block {
                q: take(&mut s, of_q),
                sums: take(&mut s, QUERIES * width),
                m: take(&mut s, QUERIES),
                l: take(&mut s, QUERIES),
                scores: take(&mut s, near.height() * KEYS),
                weights: take(&mut s, of_tile),
            };
            let (packed_k, packed_v) = (take(&mut s, count * of_k), take(&mut s, count * of_v));
            for (i, keys) in parts(first..span.end, KEYS).enumerate() {
                let (k, v) = (self.shape.key_head(k, b, g, true), self.shape.key_head(v, b, g, false));
                near.right(k, 0..depth, keys.clone(), &mut packed_k[i * of_k..]);
                near.right(v, keys, 0..depth, &mut packed_v[i * of_v..]);
            }
            for queries in parts(0..p.queries, QUERIES) {
                near.left(self.shape.head(q, b, self.h, true), queries.clone(), 0..depth, block.q);
                block.sums.fill(0.0);
                block.m.fill(f32::NEG_INFINITY);
                block.l.fill(0.0);
                let seen = self.shape.span(b, queries.clone());
                for (i, range) in blocks(first..span.end, seen) {
                    let keys = Keys { range, k: &packed_k[i * of_k..], v: &packed_v[i * of_v..] };
                    for rows in near.panels(queries.len()) {
                        self.pass(&keys, &mut block, queries.start, rows);
                    }
                }
                self.finish(&block, queries);
            }
        });
    }

    /// The queries of one left panel, rows of the block that starts at query `first`, through a block of keys.
    fn pass(&self, keys: &Keys, block: &mut Block, first: usize, rows: Range<usize>) {
        let Shape { p, isa, near, width, .. } = self.shape;
        let (m, queries, depth) = (rows.len(), first + rows.start..first + rows.end, p.head_dim);
        let seen = within(&self.shape.span(self.b, queries.clone()), keys.range.start);
        if seen.is_empty() {
            return;
        }
        let columns = padded(&seen);
        near.multiply(Multiply {
            rows: m,
            k: depth,
            left: &block.q[near.left_start(rows.start, depth)..],
            right: keys.k,
            right_k: depth,
            first: 0,
            columns: columns.clone(),
            c: &mut block.scores[columns.start..],
            stride: KEYS,
            accumulate: false,
        });
        isa.run(OnlineSoftmax {
            shape: self.shape,
            b: self.b,
            key: keys.range.start,
            queries,
            scores: block.scores,
            columns,
            m: &mut block.m[rows.clone()],
            l: &mut block.l[rows.clone()],
            sums: &mut block.sums[rows.start * width..rows.end * width],
        });
        let from = near.floor(seen.start);
        let weights = Strided { data: block.scores, stride: KEYS, along: true };
        near.left(weights, 0..m, from..seen.end, block.weights);
        near.multiply(Multiply {
            rows: m,
            k: seen.end - from,
            left: block.weights,
            right: keys.v,
            right_k: keys.range.len(),
            first: from,
            columns: 0..width,
            c: &mut block.sums[rows.start * width..],
            stride: width,
            accumulate: true,
        });
    }

    /// out = sums / l, lse = m + log l
    fn finish(&self, block: &Block, queries: Range<usize>) {
        let Shape { isa, width, .. } = self.shape;
        // SAFETY: this task alone writes this head of this sequence.
        let lse = unsafe { self.lse.get(self.shape.lse(self.b, self.h, queries.clone())) };
        for (r, (i, lse)) in queries.zip(lse).enumerate() {
            // SAFETY: as above.
            let out = unsafe { self.out.get(self.shape.query(self.b, i, self.h)) };
            let l = block.l[r];
            isa.run(Scaled { x: &block.sums[r * width..], factor: 1.0 / l, out });
            *lse = (f64::from(block.m[r]) + f64::from(l).ln()) as f32;
        }
    }
}

/// The products q·k of some queries with a block of keys become exp(s − m), 0 where a query does not see the key; m, l
/// and the sums of the queries follow.
struct OnlineSoftmax<'a> {
    shape: Shape<'a>,
    b: usize,
    /// The first key of the block.
    key: usize,
    queries: Range<usize>,
    /// [queries, KEYS], of which `columns`, whole vectors, hold products.
    scores: &'a mut [f32],
    columns: Range<usize>,
    /// [queries] each
    m: &'a mut [f32],
    l: &'a mut [f32],
    /// [queries, width]
    sums: &'a mut [f32],
}

impl Kernel for OnlineSoftmax<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { shape, columns, .. } = self;
        assert!(columns.len().is_multiple_of(S::LANES) && shape.width.is_multiple_of(S::LANES));
        let rows = self.scores.chunks_exact_mut(KEYS).zip(self.sums.chunks_exact_mut(shape.width));
        let state = self.m.iter_mut().zip(self.l.iter_mut());
        for (i, ((scores, sums), (m, l))) in self.queries.zip(rows.zip(state)) {
            let seen = within(&shape.visible(self.b, i), self.key);
            scores[..columns.start].fill(0.0);
            let scores = &mut scores[columns.clone()];
            if seen.is_empty() {
                scores.fill(0.0);
                continue;
            }
            // SAFETY: LANES elements from each i.
            unsafe {
                let mut max = scaled::<S>(scores, shape.p.scale);
                if seen != columns {
                    scores[..seen.start - columns.start].fill(f32::NEG_INFINITY);
                    scores[seen.end - columns.start..].fill(f32::NEG_INFINITY);
                    max = scaled::<S>(scores, 1.0);
                }
                let new = max.max(*m);
                let (mut sum, shift) = (S::splat(0.0), S::splat(new));
                for i in (0..scores.len()).step_by(S::LANES) {
                    let p = scores.as_mut_ptr().add(i);
                    let e = exp::<S>(S::sub(S::load(p), shift));
                    S::store(p, e);
                    sum = S::add(sum, e);
                }
                // Not in the first block, where nothing is to be scaled.
                if new > *m && *m > f32::NEG_INFINITY {
                    let factor = S::max_lane(exp::<S>(S::splat(*m - new)));
                    let factors = S::splat(factor);
                    for i in (0..sums.len()).step_by(S::LANES) {
                        let p = sums.as_mut_ptr().add(i);
                        S::store(p, S::mul(S::load(p), factors));
                    }
                    *l *= factor;
                }
                *m = new;
                *l += S::sum(sum);
            }
        }
    }
}

/// Scale whole vectors, and find the largest.
///
/// # Safety
/// The machine has S.
#[inline(always)]
unsafe fn scaled<S: Simd>(scores: &mut [f32], scale: f32) -> f32 {
    // SAFETY: LANES elements from each i.
    unsafe {
        let (scale, mut max) = (S::splat(scale), S::splat(f32::NEG_INFINITY));
        for i in (0..scores.len()).step_by(S::LANES) {
            let p = scores.as_mut_ptr().add(i);
            let v = S::mul(S::load(p), scale);
            S::store(p, v);
            max = S::max(v, max);
        }
        S::max_lane(max)
    }
}
