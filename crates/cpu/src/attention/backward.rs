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

use super::{KEYS, QUERIES, Scaled, Shape, blocks, padded, parts, take, within};
use crate::elementwise::Dot;
use crate::gemm::near::{Multiply, Strided};
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

/// The keys from key `first` on, block by block, and their gradients. What no gradient asked for needs is empty.
struct Keys<'a> {
    first: usize,
    end: usize,
    /// As right panels: kᵀ and vᵀ [head_dim, KEYS], and k [KEYS, head_dim].
    kt: &'a mut [f32],
    vt: &'a mut [f32],
    k: &'a mut [f32],
    /// dk and dv [blocks·KEYS, width]
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// A block of queries of one head. What no gradient asked for needs is empty.
struct Block<'a> {
    head: usize,
    queries: Range<usize>,
    /// As left panels: q and dout [QUERIES, head_dim].
    q: &'a mut [f32],
    dout: &'a mut [f32],
    /// As right panels: q and dout [QUERIES, head_dim].
    right_q: &'a mut [f32],
    right_dout: &'a mut [f32],
    /// Σ dS k [QUERIES, width]
    dq: &'a mut [f32],
    /// D [QUERIES]
    d: &'a mut [f32],
    /// P and dS [QUERIES, KEYS], and a left panel of either.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    panel: &'a mut [f32],
}

/// Room for the panels of one head.
struct Room {
    /// [head_dim, KEYS], [KEYS, head_dim] and [QUERIES, head_dim] as right panels.
    kt: usize,
    keys: usize,
    queries: usize,
    /// [QUERIES, head_dim] as left panels.
    left: usize,
    /// A left panel of P or dS, whichever side is its rows.
    panel: usize,
}

impl KeyHead<'_> {
    /// Whether a gradient is asked for that dS goes into.
    fn needs_ds(&self) -> bool {
        self.dq.is_some() || self.dk.is_some()
    }

    fn room(&self) -> Room {
        let (near, depth) = (self.shape.near, self.shape.p.head_dim);
        Room {
            kt: near.right_len(depth, KEYS),
            keys: near.right_len(KEYS, depth),
            queries: near.right_len(QUERIES, depth),
            left: near.left_len(QUERIES, depth),
            panel: near.left_len(near.height(), QUERIES.max(KEYS)),
        }
    }

    fn run(&self) {
        let (Shape { p, width, .. }, b, room) = (self.shape, self.b, self.room());
        let span = self.shape.span(b, 0..p.queries);
        let first = span.start / KEYS * KEYS;
        let count = (span.end - first).div_ceil(KEYS);
        let [dq, dk, dv, ds] = [self.dq.is_some(), self.dk.is_some(), self.dv.is_some(), self.needs_ds()];
        // Long enough for all three.
        let of_keys = count * (2 * room.kt + room.keys + 2 * KEYS * width);
        let of_block = 2 * (room.left + room.queries) + QUERIES * (width + 1 + 2 * KEYS) + room.panel;
        scratch::with(of_keys + of_block, |mut s| {
            let mut take_if = |needed: bool, len: usize| take(&mut s, if needed { len } else { 0 });
            let mut keys = Keys {
                first,
                end: span.end,
                kt: take_if(true, count * room.kt),
                vt: take_if(ds, count * room.kt),
                k: take_if(dq, count * room.keys),
                dk: take_if(dk, count * KEYS * width),
                dv: take_if(dv, count * KEYS * width),
            };
            self.pack_keys(&mut keys, &room);
            let mut block = Block {
                head: 0,
                queries: 0..0,
                q: take_if(true, room.left),
                dout: take_if(ds, room.left),
                right_q: take_if(dk, room.queries),
                right_dout: take_if(dv, room.queries),
                dq: take_if(dq, QUERIES * width),
                d: take_if(ds, QUERIES),
                p: take_if(true, QUERIES * KEYS),
                ds: take_if(ds, QUERIES * KEYS),
                panel: take_if(true, room.panel),
            };
            let group = self.shape.group();
            for h in self.g * group..(self.g + 1) * group {
                for queries in parts(0..p.queries, QUERIES) {
                    (block.head, block.queries) = (h, queries);
                    self.queries(&mut keys, &mut block, &room);
                }
            }
            self.write_keys(&keys);
        });
    }

    fn pack_keys(&self, keys: &mut Keys, room: &Room) {
        let Shape { p, near, .. } = self.shape;
        let head = |x, along| self.shape.key_head(x, self.b, self.g, along);
        for (i, range) in parts(keys.first..keys.end, KEYS).enumerate() {
            near.right(head(self.saved.k, true), 0..p.head_dim, range.clone(), &mut keys.kt[i * room.kt..]);
            if self.needs_ds() {
                let out = &mut keys.vt[i * room.kt..];
                near.right(head(self.saved.v, true), 0..p.head_dim, range.clone(), out);
            }
            if self.dq.is_some() {
                near.right(head(self.saved.k, false), range, 0..p.head_dim, &mut keys.k[i * room.keys..]);
            }
        }
        keys.dk.fill(0.0);
        keys.dv.fill(0.0);
    }

    fn pack_queries(&self, block: &mut Block) {
        let (Shape { p, near, isa, .. }, saved, queries) = (self.shape, self.saved, block.queries.clone());
        let head = |x, along| self.shape.head(x, self.b, block.head, along);
        near.left(head(saved.q, true), queries.clone(), 0..p.head_dim, block.q);
        if self.dk.is_some() {
            near.right(head(saved.q, false), queries.clone(), 0..p.head_dim, block.right_q);
        }
        if self.dv.is_some() {
            near.right(head(saved.dout, false), queries.clone(), 0..p.head_dim, block.right_dout);
        }
        if self.needs_ds() {
            near.left(head(saved.dout, true), queries.clone(), 0..p.head_dim, block.dout);
            for (d, i) in block.d.iter_mut().zip(queries) {
                let elements = self.shape.query(self.b, i, block.head);
                *d = isa.run(Dot(&saved.dout[elements.clone()], &saved.out[elements])) as f32;
            }
        }
    }

    /// A block of queries: all of its dq, and its part of dk and dv.
    fn queries(&self, keys: &mut Keys, block: &mut Block, room: &Room) {
        let Shape { p, isa, width, .. } = self.shape;
        self.pack_queries(block);
        block.dq.fill(0.0);
        let seen = self.shape.span(self.b, block.queries.clone());
        for (i, range) in blocks(keys.first..keys.end, seen) {
            self.scores(keys, block, room, i, range.clone());
            self.key_gradients(keys, block, range);
        }
        let Some(dq) = self.dq else { return };
        for (r, i) in block.queries.clone().enumerate() {
            // SAFETY: this task alone writes the query heads of its group.
            let dq = unsafe { dq.get(self.shape.query(self.b, i, block.head)) };
            isa.run(Scaled { x: &block.dq[r * width..], factor: p.scale, out: dq });
        }
    }

    /// P and dS of a block of queries and block i of the keys, and its part of dq.
    fn scores(&self, keys: &Keys, block: &mut Block, room: &Room, i: usize, range: Range<usize>) {
        let (Shape { isa, near, width, .. }, depth) = (self.shape, self.shape.p.head_dim);
        for rows in near.panels(block.queries.len()) {
            let queries = block.queries.start + rows.start..block.queries.start + rows.end;
            let (seen, m) = (within(&self.shape.span(self.b, queries.clone()), range.start), rows.len());
            let columns = padded(&seen);
            let scores = (true, &*block.q, &*keys.kt, &mut *block.p);
            let dp = (self.needs_ds(), &*block.dout, &*keys.vt, &mut *block.ds);
            for (_, left, right, c) in [scores, dp].into_iter().filter(|(needed, ..)| *needed) {
                near.multiply(Multiply {
                    rows: m,
                    k: depth,
                    left: &left[near.left_start(rows.start, depth)..],
                    right: &right[i * room.kt..],
                    right_k: depth,
                    first: 0,
                    columns: columns.clone(),
                    c: &mut c[rows.start * KEYS + columns.start..],
                    stride: KEYS,
                    accumulate: false,
                });
            }
            let of_rows = rows.start * KEYS..rows.end * KEYS;
            isa.run(ScoreGradients {
                shape: self.shape,
                b: self.b,
                key: range.start,
                queries: queries.clone(),
                columns,
                lse: &self.saved.lse[self.shape.lse(self.b, block.head, queries)],
                p: &mut block.p[of_rows.clone()],
                ds: self.needs_ds().then(|| (&mut block.ds[of_rows], &block.d[rows.clone()])),
            });
            if self.dq.is_some() && !seen.is_empty() {
                let from = near.floor(seen.start);
                near.left(
                    Strided { data: block.ds, stride: KEYS, along: true },
                    rows.clone(),
                    from..seen.end,
                    block.panel,
                );
                near.multiply(Multiply {
                    rows: m,
                    k: seen.end - from,
                    left: block.panel,
                    right: &keys.k[i * room.keys..],
                    right_k: range.len(),
                    first: from,
                    columns: 0..width,
                    c: &mut block.dq[rows.start * width..],
                    stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// The part of a block of queries in dv and dk of a block of keys.
    fn key_gradients(&self, keys: &mut Keys, block: &mut Block, range: Range<usize>) {
        let (Shape { p, near, width, .. }, n) = (self.shape, block.queries.len());
        let seen = within(&self.shape.span(self.b, block.queries.clone()), range.start);
        for rows in near.panels(seen.len()) {
            let rows = seen.start + rows.start..seen.start + rows.end;
            // The causal triangle: queries before the first of these keys do not see it.
            let from = near.floor((range.start + rows.start).saturating_sub(p.query_offset + block.queries.start));
            let of_key = (range.start - keys.first + rows.start) * width;
            let dv = (self.dv.is_some(), &*block.p, &*block.right_dout, &mut *keys.dv);
            let dk = (self.dk.is_some(), &*block.ds, &*block.right_q, &mut *keys.dk);
            for (_, data, right, c) in [dv, dk].into_iter().filter(|(asked, ..)| *asked) {
                near.left(Strided { data, stride: KEYS, along: false }, rows.clone(), from..n, block.panel);
                near.multiply(Multiply {
                    rows: rows.len(),
                    k: n - from,
                    left: block.panel,
                    right,
                    right_k: n,
                    first: from,
                    columns: 0..width,
                    c: &mut c[of_key..],
                    stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// dk and dv of every key, each where asked for; 0 of those that no query sees.
    fn write_keys(&self, keys: &Keys) {
        let (Shape { p, isa, width, .. }, b) = (self.shape, self.b);
        for (grad, sums, factor) in [(self.dk, &*keys.dk, p.scale), (self.dv, &*keys.dv, 1.0)] {
            let Some(grad) = grad else { continue };
            for j in 0..p.keys {
                // SAFETY: this task alone writes this key head of this sequence.
                let grad = unsafe { grad.get(self.shape.key(b, j, self.g)) };
                if (keys.first..keys.end).contains(&j) {
                    isa.run(Scaled { x: &sums[(j - keys.first) * width..], factor, out: grad });
                } else {
                    grad.fill(0.0);
                }
            }
        }
    }
}

/// The products q·k of some queries with a block of keys become P, and their dP, where given with D, become dS; both 0
/// where a query does not see the key.
struct ScoreGradients<'a> {
    shape: Shape<'a>,
    b: usize,
    /// The first key of the block.
    key: usize,
    queries: Range<usize>,
    /// Whole vectors of a row, those that hold products.
    columns: Range<usize>,
    /// [queries]
    lse: &'a [f32],
    /// [queries, KEYS]
    p: &'a mut [f32],
    /// [queries, KEYS] and [queries]
    ds: Option<(&'a mut [f32], &'a [f32])>,
}

impl Kernel for ScoreGradients<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { shape, columns, lse, p, mut ds, .. } = self;
        assert!(columns.end <= KEYS && columns.len().is_multiple_of(S::LANES));
        for (r, ((i, p), lse)) in self.queries.zip(p.chunks_exact_mut(KEYS)).zip(lse).enumerate() {
            let seen = within(&shape.visible(self.b, i), self.key);
            let mut of_row = ds.as_mut().map(|(ds, d)| (&mut ds[r * KEYS..(r + 1) * KEYS], d[r]));
            // SAFETY: LANES elements from each column.
            unsafe {
                let (scale, lse) = (S::splat(shape.p.scale), S::splat(*lse));
                for j in columns.clone().step_by(S::LANES) {
                    let at_p = p.as_mut_ptr().add(j);
                    let probability = exp::<S>(S::sub(S::mul(S::load(at_p), scale), lse));
                    S::store(at_p, probability);
                    if let Some((ds, d)) = &mut of_row {
                        let at_ds = ds.as_mut_ptr().add(j);
                        S::store(at_ds, S::mul(probability, S::sub(S::load(at_ds), S::splat(*d))));
                    }
                }
            }
            for x in [Some(p), of_row.map(|(ds, _)| ds)].into_iter().flatten() {
                x[..seen.start].fill(0.0);
                x[seen.end..].fill(0.0);
            }
        }
    }
}
