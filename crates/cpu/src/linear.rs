//! Every product with a weight (`linear`, `linear_grad_input`, `linear_grad_weight`) and the plain `matmul`, as sums
//! of products for the GEMM.
//!
//! With h = s·e∘(x̃ Aᵀ) [tokens, rank] and u = s·e∘(dz B) [tokens, rank], dz = g∘dy:
//!
//! - forward: y = g∘(x Wᵀ + h Bᵀ) + bias: one GEMM whose k runs through x's columns and then h's;
//! - gradient of the input: dx = dz W + u A: the same with the weights as they are stored;
//! - gradients of the weights: dA += uᵀ x̃, dB += dzᵀ h, dW += dyᵀ x.
//!
//! h and u are small products (rank columns) before the main one, on the same panels of x or dz. They are not saved from
//! the forward.

mod around;

use crate::gemm::{Gemm, Left, Output, ROWS, Right, Term, WeightSlice, part};
use crate::scratch;
use around::{scale_columns_in_place, scale_rows};
use rankfold_backend::params::{Dropout, Layout, Linear, MatMul};
use std::ops::Range;

/// [`rankfold_backend::LowRank`] as slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRankSlice<'a> {
    /// Rows of `a`, columns of `b`.
    pub rank: usize,
    /// [rank, inputs]
    pub a: &'a [f32],
    /// [outputs, rank]
    pub b: &'a [f32],
    /// s
    pub scale: f32,
    /// e [rank]
    pub per_rank: Option<&'a [f32]>,
    /// g [outputs]
    pub row_scale: Option<&'a [f32]>,
    /// On the input of A.
    pub dropout: Option<Dropout>,
}

/// [`rankfold_backend::LinearGrads`] as slices; each is added to.
#[derive(Debug, Default)]
pub(crate) struct GradSlices<'a> {
    /// [outputs, inputs]
    pub weight: Option<&'a mut [f32]>,
    /// [outputs]
    pub bias: Option<&'a mut [f32]>,
    /// [rank, inputs]
    pub a: Option<&'a mut [f32]>,
    /// [outputs, rank]
    pub b: Option<&'a mut [f32]>,
    /// [rank]
    pub per_rank: Option<&'a mut [f32]>,
    /// [outputs], and W, which it is formed of.
    pub row_scale: Option<(&'a mut [f32], WeightSlice<'a>)>,
}

impl Gemm<'_> {
    /// [`rankfold_backend::Backend::matmul`] on checked slices.
    pub(crate) fn matmul(&self, p: &MatMul, a: &[f32], b: &[f32], c: &mut [f32]) {
        let left = match p.layout {
            Layout::Nn | Layout::Nt => Left::rows(a, p.k),
            Layout::Tn => Left::transposed(a, p.m),
        };
        let right = match p.layout {
            Layout::Nn | Layout::Tn => Right::rows(b.into(), p.n),
            Layout::Nt => Right::transposed(b.into(), p.k),
        };
        let output = Output { accumulate: p.accumulate, ..Output::new(c, p.m, p.n) };
        self.product(&[Term { left, right, k: p.k }], output);
    }

    /// [`rankfold_backend::Backend::linear`] on checked slices.
    pub(crate) fn linear(
        &self,
        p: &Linear,
        x: &[f32],
        w: WeightSlice,
        low_rank: Option<&LowRankSlice>,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (m, n, k) = (p.tokens, p.outputs, p.inputs);
        let output = Output { bias, ..Output::new(y, m, n) };
        let Some(l) = low_rank else { return self.product(&[x_wt(p, w, Left::rows(x, k))], output) };
        if l.dropout.is_none() {
            for rows in blocks(m) {
                let (x, m) = (Left::rows(&x[rows.start * k..rows.end * k], k), rows.len());
                self.with_left(x, m, k, |x| {
                    self.with_small(m, l, x_at(p, l, x), |h| {
                        let y = &mut output.c[rows.start * n..rows.end * n];
                        let output = Output { scale: l.row_scale, bias, ..Output::new(y, m, n) };
                        self.product(&[x_wt(p, w, x), h_bt(l.b, l.rank, h)], output);
                    });
                });
            }
            return;
        }
        self.with_dropped(l.dropout, x, |x_dropped| {
            let (x, x_dropped) = (Left::rows(x, k), Left::rows(x_dropped, k));
            self.with_small(m, l, x_at(p, l, x_dropped), |h| match l.row_scale {
                Some(g) => scratch::with(n + l.b.len(), |parts| {
                    // y = (g − 1) ∘ x̃ Wᵀ first, then x Wᵀ + h (g∘B)ᵀ on top of it.
                    let (g_less_one, b_scaled) = parts.split_at_mut(n);
                    g_less_one.iter_mut().zip(g).for_each(|(out, g)| *out = g - 1.0);
                    scale_rows(l.b, g, l.rank, b_scaled);
                    let Output { c: y, .. } = output;
                    self.product(&[x_wt(p, w, x_dropped)], Output { scale: Some(g_less_one), ..Output::new(y, m, n) });
                    let output = Output { bias, accumulate: true, ..Output::new(y, m, n) };
                    self.product(&[x_wt(p, w, x), h_bt(b_scaled, l.rank, h)], output);
                }),
                None => self.product(&[x_wt(p, w, x), h_bt(l.b, l.rank, h)], output),
            });
        });
    }

    /// [`rankfold_backend::Backend::linear_grad_input`] on checked slices.
    pub(crate) fn linear_grad_input(
        &self,
        p: &Linear,
        dy: &[f32],
        w: WeightSlice,
        low_rank: Option<&LowRankSlice>,
        accumulate: bool,
        dx: &mut [f32],
    ) {
        let (m, n, k) = (p.tokens, p.outputs, p.inputs);
        let output = Output { accumulate, ..Output::new(dx, m, k) };
        let Some(l) = low_rank else { return self.product(&[dy_w(p, w, Left::rows(dy, n))], output) };
        self.with_column_scaled(l.row_scale.map(|g| (g, 0.0)), dy, |dz| {
            let Some(dropout) = l.dropout else {
                for rows in blocks(m) {
                    let (dz, m) = (Left::rows(&dz[rows.start * n..rows.end * n], n), rows.len());
                    self.with_left(dz, m, n, |dz| {
                        self.with_small(m, l, dz_b(p, l, dz), |u| {
                            let dx = &mut output.c[rows.start * k..rows.end * k];
                            let output = Output { accumulate, ..Output::new(dx, m, k) };
                            self.product(&[dy_w(p, w, dz), u_a(p, l, u)], output);
                        });
                    });
                }
                return;
            };
            self.with_small(m, l, dz_b(p, l, Left::rows(dz, n)), |u| {
                // What reached y through x̃: u A and, with g, ((g − 1)∘dy) W; it passes the mask on its way back.
                scratch::with(m * k, |dropped| {
                    self.with_column_scaled(l.row_scale.map(|g| (g, -1.0)), dy, |dy_less| {
                        let terms = [u_a(p, l, u), dy_w(p, w, Left::rows(dy_less, n))];
                        let count = 1 + usize::from(l.row_scale.is_some());
                        self.product(&terms[..count], Output::new(dropped, m, k));
                    });
                    let Output { c: dx, .. } = output;
                    self.product(&[dy_w(p, w, Left::rows(dy, n))], Output { accumulate, ..Output::new(dx, m, k) });
                    self.add_dropped(dropout, dropped, dx);
                });
            });
        });
    }

    /// [`rankfold_backend::Backend::linear_grad_weight`] on checked slices.
    pub(crate) fn linear_grad_weight(
        &self,
        p: &Linear,
        x: &[f32],
        dy: &[f32],
        low_rank: Option<&LowRankSlice>,
        grads: GradSlices,
    ) {
        let (m, n, k) = (p.tokens, p.outputs, p.inputs);
        if let Some(d_bias) = grads.bias {
            self.add_column_sums(dy, None, d_bias);
        }
        if let Some(dw) = grads.weight {
            let term = Term { left: Left::transposed(dy, n), right: Right::rows(x.into(), k), k: m };
            self.product(&[term], Output { accumulate: true, ..Output::new(dw, n, k) });
        }
        let of_update = [&grads.a, &grads.b, &grads.per_rank].into_iter().any(Option::is_some);
        let Some(l) = low_rank.filter(|_| of_update || grads.row_scale.is_some()) else { return };
        let r = l.rank;
        self.with_dropped(l.dropout, x, |x| {
            self.with_column_scaled(l.row_scale.map(|g| (g, 0.0)), dy, |dz| {
                scratch::with(2 * m * r, |small| {
                    // First without s·e, for the gradient of e.
                    let (u, h) = small.split_at_mut(m * r);
                    if grads.a.is_some() || grads.per_rank.is_some() {
                        self.product(&[dz_b(p, l, Left::rows(dz, n))], Output::new(u, m, r));
                    }
                    if grads.b.is_some() || grads.per_rank.is_some() || grads.row_scale.is_some() {
                        self.product(&[x_at(p, l, Left::rows(x, k))], Output::new(h, m, r));
                    }
                    if let Some(de) = grads.per_rank {
                        for (rank, de) in de.iter_mut().enumerate() {
                            let pairs = u.iter().zip(&*h).skip(rank).step_by(r);
                            *de += (f64::from(l.scale) * pairs.map(|(u, h)| f64::from(u * h)).sum::<f64>()) as f32;
                        }
                    }
                    with_rank_scales(l, |scales| {
                        scale_columns_in_place(u, scales);
                        scale_columns_in_place(h, scales);
                    });
                    if let Some(da) = grads.a {
                        let term = Term { left: Left::transposed(u, r), right: Right::rows(x.into(), k), k: m };
                        self.product(&[term], Output { accumulate: true, ..Output::new(da, r, k) });
                    }
                    if let Some(db) = grads.b {
                        // Its transpose, [rank, outputs], has rows long enough for the GEMM's panels.
                        scratch::with(r * n, |transposed| {
                            let right = Right::rows(WeightSlice::from(dz), n);
                            let term = Term { left: Left::transposed(h, r), right, k: m };
                            self.product(&[term], Output::new(transposed, r, n));
                            for (output, db) in db.chunks_exact_mut(r.max(1)).enumerate() {
                                db.iter_mut().enumerate().for_each(|(i, db)| *db += transposed[i * n + output]);
                            }
                        });
                    }
                    if let Some((dg, w)) = grads.row_scale {
                        scratch::with(m * n, |z| {
                            self.product(&[x_wt(p, w, Left::rows(x, k)), h_bt(l.b, r, h)], Output::new(z, m, n));
                            self.add_column_sums(dy, Some(z), dg);
                        });
                    }
                });
            });
        });
    }

    /// h = s·e∘(x̃ Aᵀ) or u = s·e∘(dz B), [tokens, rank]
    fn with_small(&self, tokens: usize, l: &LowRankSlice, term: Term, f: impl FnOnce(&[f32])) {
        scratch::with(tokens * l.rank, |small| {
            with_rank_scales(l, |scales| {
                self.product(&[term], Output { scale: Some(scales), ..Output::new(small, tokens, l.rank) });
            });
            f(small);
        });
    }
}

/// Rows of a product that are worked on together, so that they are packed once for all that is done with them: nearly
/// equal blocks, for none is to be few.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(ROWS);
    (0..count).map(move |i| part(rows, count, i))
}

/// x Wᵀ
fn x_wt<'a>(p: &Linear, w: WeightSlice<'a>, x: Left<'a>) -> Term<'a> {
    Term { left: x, right: Right::transposed(w, p.inputs), k: p.inputs }
}

/// dy W
fn dy_w<'a>(p: &Linear, w: WeightSlice<'a>, dy: Left<'a>) -> Term<'a> {
    Term { left: dy, right: Right::rows(w, p.inputs), k: p.outputs }
}

/// x̃ Aᵀ
fn x_at<'a>(p: &Linear, l: &LowRankSlice<'a>, x: Left<'a>) -> Term<'a> {
    Term { left: x, right: Right::transposed(l.a.into(), p.inputs), k: p.inputs }
}

/// dz B
fn dz_b<'a>(p: &Linear, l: &LowRankSlice<'a>, dz: Left<'a>) -> Term<'a> {
    Term { left: dz, right: Right::rows(l.b.into(), l.rank), k: p.outputs }
}

/// u A
fn u_a<'a>(p: &Linear, l: &LowRankSlice<'a>, u: &'a [f32]) -> Term<'a> {
    Term { left: Left::rows(u, l.rank), right: Right::rows(l.a.into(), p.inputs), k: l.rank }
}

/// h Bᵀ
fn h_bt<'a>(b: &'a [f32], rank: usize, h: &'a [f32]) -> Term<'a> {
    Term { left: Left::rows(h, rank), right: Right::transposed(b.into(), rank), k: rank }
}

/// s·e, or s for every rank.
fn with_rank_scales(l: &LowRankSlice, f: impl FnOnce(&[f32])) {
    scratch::with(l.rank, |scales| {
        match l.per_rank {
            Some(e) => scales.iter_mut().zip(e).for_each(|(out, e)| *out = l.scale * e),
            None => scales.fill(l.scale),
        }
        f(scales);
    });
}
