//! Forward: an online softmax (Milakov & Gimelshein 2018). Over the blocks of keys seen so far each query keeps
//! m = max s, l = Σ exp(s − m) and the output Σ exp(s − m) v; a block with a larger maximum scales the latter two by
//! exp(m_old − m_new). At the end out = output / l and lse = m + log l. A task is one head of one sequence.

use super::pack::{Rows, Transpose, taken};
use super::product::Product;
use super::{KEYS, QUERIES, ROWS, Shape, padded, parts, take, within};
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
    [q, k, v]: [&[f32]; 3],
    starts: Option<&[u32]>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<()> {
    let shape = Shape::new(isa, p, starts)?;
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    threads.run(p.batch * p.heads, |task| {
        let head = Head { shape, b: task / p.heads, h: task % p.heads, out, lse };
        head.run(q, k, v);
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

/// The keys and values of a head, from key `first` on: [blocks][head_dim][KEYS] and [blocks·KEYS][width].
struct Packed<'a> {
    first: usize,
    k: &'a [f32],
    v: &'a [f32],
}

/// The state of a block of queries.
struct Block<'a> {
    /// [QUERIES, width]
    q: &'a mut [f32],
    /// Σ exp(s − m) v [QUERIES, width]
    sums: &'a mut [f32],
    /// The running maximum and Σ exp(s − m), [QUERIES] each.
    m: &'a mut [f32],
    l: &'a mut [f32],
    /// Scores of ROWS queries, [ROWS, KEYS].
    scores: &'a mut [f32],
}

impl Head<'_> {
    fn run(&self, q: &[f32], k: &[f32], v: &[f32]) {
        let Shape { p, isa, width, round, .. } = self.shape;
        let span = self.shape.span(self.b, 0..p.queries);
        let first = span.start / KEYS * KEYS;
        let blocks = (span.end - first).div_ceil(KEYS);
        let (depth, stride) = (p.head_dim, p.kv_heads * p.head_dim);
        let g = self.h / self.shape.group();
        scratch::with(
            (blocks * KEYS + 2 * QUERIES) * width + blocks * KEYS * depth + 2 * QUERIES + ROWS * KEYS,
            |mut s| {
                let (packed_k, packed_v) = (take(&mut s, blocks * KEYS * depth), take(&mut s, blocks * KEYS * width));
                for (keys, out) in parts(first..span.end, KEYS).zip(packed_k.chunks_exact_mut((KEYS * depth).max(1))) {
                    let (first, rows) = (self.shape.key(self.b, keys.start, g).start, keys.len());
                    isa.run(Transpose { x: k, first, stride, rows, depth, columns: KEYS, round, out });
                }
                let rows = (first..span.end).map(|j| self.shape.key(self.b, j, g));
                isa.run(Rows { x: v, rows, width, round, out: &mut *packed_v });
                let packed = Packed { first, k: packed_k, v: packed_v };
                let mut block = Block {
                    q: take(&mut s, QUERIES * width),
                    sums: take(&mut s, QUERIES * width),
                    m: take(&mut s, QUERIES),
                    l: take(&mut s, QUERIES),
                    scores: take(&mut s, ROWS * KEYS),
                };
                for queries in parts(0..p.queries, QUERIES) {
                    let rows = queries.clone().map(|i| self.shape.query(self.b, i, self.h));
                    isa.run(Rows { x: q, rows, width, round, out: &mut *block.q });
                    block.sums.fill(0.0);
                    block.m.fill(f32::NEG_INFINITY);
                    block.l.fill(0.0);
                    let span = self.shape.span(self.b, queries.clone());
                    for keys in (span.start / KEYS * KEYS..span.end).step_by(KEYS) {
                        for rows in parts(queries.clone(), ROWS) {
                            self.pass(&packed, &mut block, keys, rows.clone(), rows.start - queries.start);
                        }
                    }
                    self.finish(&block, queries);
                }
            },
        );
    }

    /// Up to ROWS queries, the first of which is row `row` of the block, through the block of keys from `keys`.
    fn pass(&self, packed: &Packed, block: &mut Block, keys: usize, queries: Range<usize>, row: usize) {
        let Shape { p, isa, width, .. } = self.shape;
        let (m, depth) = (queries.len(), p.head_dim);
        let seen = within(&self.shape.span(self.b, queries.clone()), keys);
        if seen.is_empty() {
            return;
        }
        let columns = padded(&seen);
        let start = keys - packed.first;
        isa.run(Product {
            m,
            n: columns.len(),
            k: depth,
            a: &block.q[row * width..],
            strides: [width, 1],
            b: &packed.k[start * depth + columns.start..],
            b_row: KEYS,
            c: &mut block.scores[columns.start..],
            c_row: KEYS,
            accumulate: false,
        });
        for (r, i) in queries.enumerate() {
            let (scores, sums) = (&mut block.scores[r * KEYS..][columns.clone()], (row + r) * width);
            let seen = within(&self.shape.visible(self.b, i), keys);
            isa.run(OnlineSoftmax {
                scores,
                scale: p.scale,
                round: self.shape.round,
                seen: seen.start.max(columns.start) - columns.start..seen.end.max(columns.start) - columns.start,
                m: &mut block.m[row + r],
                l: &mut block.l[row + r],
                sums: &mut block.sums[sums..sums + width],
            });
        }
        isa.run(Product {
            m,
            n: width,
            k: seen.len(),
            a: &block.scores[seen.start..],
            strides: [KEYS, 1],
            b: &packed.v[(start + seen.start) * width..],
            b_row: width,
            c: &mut block.sums[row * width..],
            c_row: width,
            accumulate: true,
        });
    }

    /// out = sums / l, lse = m + log l
    fn finish(&self, block: &Block, queries: Range<usize>) {
        let width = self.shape.width;
        // SAFETY: this task alone writes this head of this sequence.
        let lse = unsafe { self.lse.get(self.shape.lse(self.b, self.h, queries.clone())) };
        for (r, (i, lse)) in queries.zip(lse).enumerate() {
            // SAFETY: as above.
            let out = unsafe { self.out.get(self.shape.query(self.b, i, self.h)) };
            let l = block.l[r];
            out.iter_mut().zip(&block.sums[r * width..]).for_each(|(out, sum)| *out = sum / l);
            *lse = (f64::from(block.m[r]) + f64::from(l).ln()) as f32;
        }
    }
}

/// One query's products q·k of a block become exp(s − m), 0 outside `seen`; m, l and the sums follow.
struct OnlineSoftmax<'a> {
    /// Whole vectors.
    scores: &'a mut [f32],
    scale: f32,
    /// Whether exp(s − m) is rounded to bf16 for its product with v; not so in l.
    round: bool,
    seen: Range<usize>,
    m: &'a mut f32,
    l: &'a mut f32,
    /// Whole vectors.
    sums: &'a mut [f32],
}

impl Kernel for OnlineSoftmax<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { scores, scale, round, seen, m, l, sums } = self;
        assert!(scores.len().is_multiple_of(S::LANES) && sums.len().is_multiple_of(S::LANES));
        if seen.is_empty() {
            return scores.fill(0.0);
        }
        scores.iter_mut().for_each(|score| *score *= scale);
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        // SAFETY: LANES elements from each i.
        unsafe {
            let mut max = S::splat(f32::NEG_INFINITY);
            for i in (0..scores.len()).step_by(S::LANES) {
                max = S::max(S::load(scores.as_ptr().add(i)), max);
            }
            let new = S::max_lane(max).max(*m);
            let (mut sum, shift) = (S::splat(0.0), S::splat(new));
            for i in (0..scores.len()).step_by(S::LANES) {
                let p = scores.as_mut_ptr().add(i);
                let e = exp::<S>(S::sub(S::load(p), shift));
                S::store(p, taken::<S>(round, e));
                sum = S::add(sum, e);
            }
            if new > *m {
                // 0 in the first block, where nothing is to be scaled.
                let factor = S::max_lane(exp::<S>(S::splat(*m - new)));
                let factors = S::splat(factor);
                for i in (0..sums.len()).step_by(S::LANES) {
                    let p = sums.as_mut_ptr().add(i);
                    S::store(p, S::mul(S::load(p), factors));
                }
                *l *= factor;
                *m = new;
            }
            *l += S::sum(sum);
        }
    }
}
