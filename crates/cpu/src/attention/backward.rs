//! Backward: P is formed again, block by block, from the saved lse.
//!
//! dv_j = Σ_i P_ij dout_i
//! dP_ij = dout_i·v_j
//! dS_ij = P_ij (dP_ij − D_i): the softmax's Jacobian P_ij (δ_jl − P_il) applied to dP, where
//!         D_i = Σ_l P_il dP_il = dout_i · Σ_l P_il v_l = dout_i·out_i needs no second pass over the keys
//! dq_i = scale·Σ_j dS_ij k_j,   dk_j = scale·Σ_i dS_ij q_i
//!
//! A task is one key head of one sequence with all query heads of its group, so that dk and dv have one writer and
//! the order of their sums is that of the queries, head by head.
//!
//! dq, dk and dv are formed each where asked for, and dP and dS only for dq and dk.

use super::pack::{Rows, Transpose, taken};
use super::product::Product;
use super::{KEYS, QUERIES, ROWS, Shape, padded, parts, take, within};
use crate::elementwise::Dot;
use crate::scratch;
use crate::simd::{Isa, Kernel, Simd, exp};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::Result;
use rankfold_backend::params::Attention;
use std::ops::Range;

/// What the forward read and wrote, and the gradient of its output.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) starts: Option<&'a [u32]>,
    pub(crate) out: &'a [f32],
    pub(crate) lse: &'a [f32],
    pub(crate) dout: &'a [f32],
}

/// What is written: those that are asked for.
pub(crate) struct Gradients<'a> {
    pub(crate) dq: Option<&'a mut [f32]>,
    pub(crate) dk: Option<&'a mut [f32]>,
    pub(crate) dv: Option<&'a mut [f32]>,
}

/// dq, dk and dv, each where asked for.
pub(crate) fn attention_grad(
    threads: &Threads,
    isa: Isa,
    p: &Attention,
    saved: Saved,
    gradients: Gradients,
) -> Result<()> {
    let shape = Shape::new(isa, p, saved.starts)?;
    let Gradients { dq, dk, dv } = gradients;
    let [dq, dk, dv] = [dq, dk, dv].map(|grad| grad.map(Disjoint::new));
    threads.run(p.batch * p.kv_heads, |task| {
        KeyHead { shape, saved, b: task / p.kv_heads, g: task % p.kv_heads, dq, dk, dv }.run();
    });
    Ok(())
}

/// Key head g of sequence b.
struct KeyHead<'a> {
    shape: Shape<'a>,
    saved: Saved<'a>,
    b: usize,
    g: usize,
    dq: Option<Disjoint<'a, f32>>,
    dk: Option<Disjoint<'a, f32>>,
    dv: Option<Disjoint<'a, f32>>,
}

/// The keys and values from key `first` on, and their gradients. What no gradient asked for needs is empty.
struct Keys<'a> {
    first: usize,
    /// kᵀ and vᵀ [blocks][head_dim][KEYS]
    kt: &'a mut [f32],
    vt: &'a mut [f32],
    /// k, dk and dv [blocks·KEYS][width]
    k: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// A block of queries of one head. What no gradient asked for needs is empty.
struct Block<'a> {
    /// q, dout and Σ dS k, [QUERIES, width] each
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    /// P and dS, [QUERIES, KEYS] each
    p: &'a mut [f32],
    ds: &'a mut [f32],
}

impl KeyHead<'_> {
    /// Whether a gradient is asked for that dS goes into.
    fn needs_ds(&self) -> bool {
        self.dq.is_some() || self.dk.is_some()
    }

    fn run(&self) {
        let (Shape { p, width, .. }, b) = (self.shape, self.b);
        let span = self.shape.span(b, 0..p.queries);
        let first = span.start / KEYS * KEYS;
        let keys = (span.end - first).next_multiple_of(KEYS);
        let [dq, dk, dv, ds] = [self.dq.is_some(), self.dk.is_some(), self.dv.is_some(), self.needs_ds()];
        // Long enough for all three.
        let len = keys * (2 * p.head_dim + 3 * width) + QUERIES * (3 * width + 2 * KEYS);
        scratch::with(len, |mut s| {
            let mut take_if = |needed: bool, len: usize| take(&mut s, if needed { len } else { 0 });
            let mut keys = Keys {
                first,
                kt: take_if(true, keys * p.head_dim),
                vt: take_if(ds, keys * p.head_dim),
                k: take_if(dq, keys * width),
                dk: take_if(dk, keys * width),
                dv: take_if(dv, keys * width),
            };
            self.pack(&mut keys, first..span.end);
            let mut block = Block {
                q: take_if(true, QUERIES * width),
                dout: take_if(true, QUERIES * width),
                dq: take_if(dq, QUERIES * width),
                p: take_if(true, QUERIES * KEYS),
                ds: take_if(ds, QUERIES * KEYS),
            };
            let group = self.shape.group();
            for h in self.g * group..(self.g + 1) * group {
                for queries in parts(0..p.queries, QUERIES) {
                    self.queries(&mut keys, &mut block, h, queries);
                }
            }
            self.write_keys(&keys, first..span.end);
        });
    }

    fn pack(&self, keys: &mut Keys, range: Range<usize>) {
        let Shape { p, isa, width, round, .. } = self.shape;
        let (depth, stride) = (p.head_dim, p.kv_heads * p.head_dim);
        for (x, out) in [(self.saved.k, &mut *keys.kt), (self.saved.v, &mut *keys.vt)] {
            for (keys, out) in parts(range.clone(), KEYS).zip(out.chunks_exact_mut((KEYS * depth).max(1))) {
                let (first, rows) = (self.shape.key(self.b, keys.start, self.g).start, keys.len());
                isa.run(Transpose { x, first, stride, rows, depth, columns: KEYS, round, out });
            }
        }
        let rows = range.map(|j| self.shape.key(self.b, j, self.g));
        isa.run(Rows { x: self.saved.k, rows, width, round, out: &mut *keys.k });
        keys.dk.fill(0.0);
        keys.dv.fill(0.0);
    }

    /// A block of queries of head h: all of its dq, and its part of dk and dv.
    fn queries(&self, keys: &mut Keys, block: &mut Block, h: usize, queries: Range<usize>) {
        let (Shape { p, isa, width, round, .. }, b, saved) = (self.shape, self.b, self.saved);
        let elements = |i| self.shape.query(b, i, h);
        for (x, out) in [(saved.q, &mut *block.q), (saved.dout, &mut *block.dout)] {
            isa.run(Rows { x, rows: queries.clone().map(elements), width, round, out });
        }
        block.dq.fill(0.0);
        let mut d = [0.0; QUERIES];
        if self.needs_ds() {
            for (d, i) in d.iter_mut().zip(queries.clone()) {
                let (dout, out) = (&saved.dout[elements(i)], &saved.out[elements(i)]);
                *d = isa.run(Dot(dout, out)) as f32;
            }
        }
        let span = self.shape.span(b, queries.clone());
        for key in (span.start / KEYS * KEYS..span.end).step_by(KEYS) {
            self.block(keys, block, key, h, queries.clone(), &d);
        }
        let Some(dq) = self.dq else { return };
        for (r, i) in queries.enumerate() {
            // SAFETY: this task alone writes the query heads of its group.
            let dq = unsafe { dq.get(elements(i)) };
            dq.iter_mut().zip(&block.dq[r * width..]).for_each(|(dq, sum)| *dq = p.scale * sum);
        }
    }

    /// A block of queries and the block of keys from `key`.
    fn block(&self, keys: &mut Keys, block: &mut Block, key: usize, h: usize, queries: Range<usize>, d: &[f32]) {
        let (Shape { p, isa, width, .. }, depth) = (self.shape, self.shape.p.head_dim);
        let start = key - keys.first;
        for rows in parts(queries.clone(), ROWS) {
            let (row, m) = (rows.start - queries.start, rows.len());
            let seen = within(&self.shape.span(self.b, rows.clone()), key);
            let columns = padded(&seen);
            let scores = (true, &*block.q, &*keys.kt, &mut *block.p);
            let dp = (self.needs_ds(), &*block.dout, &*keys.vt, &mut *block.ds);
            for (_, a, b, c) in [scores, dp].into_iter().filter(|(needed, ..)| *needed) {
                isa.run(Product {
                    m,
                    n: columns.len(),
                    k: depth,
                    a: &a[row * width..],
                    strides: [width, 1],
                    b: &b[start * depth + columns.start..],
                    b_row: KEYS,
                    c: &mut c[row * KEYS + columns.start..],
                    c_row: KEYS,
                    accumulate: false,
                });
            }
            let lse = &self.saved.lse[self.shape.lse(self.b, h, rows.clone())];
            for (r, (i, lse)) in rows.zip(lse).enumerate() {
                let of_row = (row + r) * KEYS..(row + r + 1) * KEYS;
                isa.run(ScoreGradients {
                    p: &mut block.p[of_row.clone()],
                    ds: self.needs_ds().then(|| &mut block.ds[of_row]),
                    seen: within(&self.shape.visible(self.b, i), key),
                    scale: p.scale,
                    round: self.shape.round,
                    lse: *lse,
                    d: d[row + r],
                });
            }
            if self.dq.is_some() {
                isa.run(Product {
                    m,
                    n: width,
                    k: seen.len(),
                    a: &block.ds[row * KEYS + seen.start..],
                    strides: [KEYS, 1],
                    b: &keys.k[(start + seen.start) * width..],
                    b_row: width,
                    c: &mut block.dq[row * width..],
                    c_row: width,
                    accumulate: true,
                });
            }
        }
        for columns in parts(within(&self.shape.span(self.b, queries.clone()), key), ROWS) {
            // The causal triangle: queries before the first of these keys do not see it.
            let row = (key + columns.start).saturating_sub(p.query_offset + queries.start);
            let (n, first) = (queries.len() - row, (start + columns.start) * width);
            let dv = (self.dv.is_some(), &*block.p, &*block.dout, &mut *keys.dv);
            let dk = (self.dk.is_some(), &*block.ds, &*block.q, &mut *keys.dk);
            for (_, a, b, c) in [dv, dk].into_iter().filter(|(asked, ..)| *asked) {
                isa.run(Product {
                    m: columns.len(),
                    n: width,
                    k: n,
                    a: &a[row * KEYS + columns.start..],
                    strides: [1, KEYS],
                    b: &b[row * width..],
                    b_row: width,
                    c: &mut c[first..],
                    c_row: width,
                    accumulate: true,
                });
            }
        }
    }

    /// dk and dv of every key, each where asked for; 0 of those that no query sees.
    fn write_keys(&self, keys: &Keys, packed: Range<usize>) {
        let (Shape { p, width, .. }, b) = (self.shape, self.b);
        for (grad, sums, factor) in [(self.dk, &*keys.dk, p.scale), (self.dv, &*keys.dv, 1.0)] {
            let Some(grad) = grad else { continue };
            for j in 0..p.keys {
                // SAFETY: this task alone writes this key head of this sequence.
                let grad = unsafe { grad.get(self.shape.key(b, j, self.g)) };
                if packed.contains(&j) {
                    let sums = &sums[(j - keys.first) * width..];
                    grad.iter_mut().zip(sums).for_each(|(grad, sum)| *grad = factor * sum);
                } else {
                    grad.fill(0.0);
                }
            }
        }
    }
}

/// One query's products q·k of a block become P, and its dP, where given, become dS; both 0 outside `seen`.
struct ScoreGradients<'a> {
    /// [KEYS]
    p: &'a mut [f32],
    /// [KEYS]
    ds: Option<&'a mut [f32]>,
    seen: Range<usize>,
    scale: f32,
    /// Whether both are rounded to bf16 for their products.
    round: bool,
    lse: f32,
    d: f32,
}

impl Kernel for ScoreGradients<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { p, mut ds, seen, scale, round, lse, d } = self;
        assert!(p.len() == KEYS && ds.as_ref().is_none_or(|ds| ds.len() == KEYS) && KEYS.is_multiple_of(S::LANES));
        let columns = if seen.is_empty() { 0..0 } else { padded(&seen) };
        // SAFETY: LANES elements from each i < KEYS.
        unsafe {
            let (scale, lse, d) = (S::splat(scale), S::splat(lse), S::splat(d));
            for i in columns.step_by(S::LANES) {
                let at_p = p.as_mut_ptr().add(i);
                let probability = exp::<S>(S::sub(S::mul(S::load(at_p), scale), lse));
                S::store(at_p, taken::<S>(round, probability));
                if let Some(ds) = &mut ds {
                    let at_ds = ds.as_mut_ptr().add(i);
                    let ds = S::mul(probability, S::sub(S::load(at_ds), d));
                    S::store(at_ds, taken::<S>(round, ds));
                }
            }
        }
        for x in [Some(p), ds].into_iter().flatten() {
            x[..seen.start].fill(0.0);
            x[seen.end..].fill(0.0);
        }
    }
}
