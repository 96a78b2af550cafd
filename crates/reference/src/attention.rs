//! Causal grouped-query attention (Vaswani et al. 2017, eq. 1; Ainslie et al. 2023), segments and window included.
//!
//! For each query i of each head, over the keys j that it sees:
//! s_ij = scale · q_i·k_j,   P_ij = exp(s_ij) / Σ_j exp(s_ij),   out_i = Σ_j P_ij v_j
//!
//! q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; query head h reads key head
//! h / (heads/kv_heads). Saved for backward: lse_i = log Σ_j exp(s_ij) [batch, heads, queries], from which
//! P_ij = exp(s_ij − lse_i) is formed again, so that P [queries, keys] never lies in memory.
//!
//! `compute` rounds the two inputs of each product, P and dS too, after the softmax.

use crate::matmul::as_compute;
use crate::operands::{Kernel, to_bf16};
use rankfold_backend::params::{Attention, Compute};
use rankfold_backend::{AttentionGrads, AttentionSaved, Result, View, ViewMut};
use std::ops::RangeInclusive;

/// One query: where it, its keys and its results lie.
struct Query {
    /// The first element of q_i, of out_i and of their gradients.
    q: usize,
    /// The index of lse_i.
    lse: usize,
    /// The keys that it sees.
    keys: RangeInclusive<usize>,
    /// The first element of key 0 of its sequence and head, and the distance from a key to the next.
    k: usize,
    stride: usize,
}

impl Query {
    /// The first element of k_j, of v_j and of their gradients.
    fn key(&self, j: usize) -> usize {
        self.k + j * self.stride
    }
}

/// Every query of every head of every sequence.
fn queries(p: &Attention, kernel: Kernel, starts: Option<View>) -> Result<Vec<Query>> {
    let starts = starts.map(|starts| kernel.elements::<u32>("starts", starts)).transpose()?;
    let mut all = Vec::with_capacity(p.lse_elements());
    for b in 0..p.batch {
        for i in 0..p.queries {
            let start = starts.map_or(0, |starts| starts[b * p.queries + i] as usize);
            p.check_start(i, start)?;
            for h in 0..p.heads {
                let kv_head = h / (p.heads / p.kv_heads);
                all.push(Query {
                    q: ((b * p.queries + i) * p.heads + h) * p.head_dim,
                    lse: (b * p.heads + h) * p.queries + i,
                    keys: p.visible(i, start),
                    k: (b * p.keys * p.kv_heads + kv_head) * p.head_dim,
                    stride: p.kv_heads * p.head_dim,
                });
            }
        }
    }
    Ok(all)
}

/// The inputs of a product, rounded as `compute` says.
fn taken(p: &Attention, x: &[f64]) -> Vec<f64> {
    as_compute(p.compute, x)
}

/// A factor of a product that is made on the way: P or dS.
fn factor(p: &Attention, x: f64) -> f64 {
    match p.compute {
        Compute::F32 => x,
        Compute::Bf16 => f64::from(to_bf16(x)),
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// y += factor · x
fn add_scaled(factor: f64, x: &[f64], y: &mut [f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

/// out and lse.
pub(crate) fn attention(
    p: &Attention,
    q: View,
    k: View,
    v: View,
    starts: Option<View>,
    mut out: ViewMut,
    mut lse: ViewMut,
) -> Result<()> {
    let kernel = Kernel("attention");
    p.check(&q, &k, &v, starts.as_ref(), &out, &lse)?;
    let queries = queries(p, kernel, starts)?;
    let (q, k, v) = (kernel.floats("q", q)?, kernel.floats("k", k)?, kernel.floats("v", v)?);
    let (q, k, v) = (taken(p, &q), taken(p, &k), taken(p, &v));
    let mut out = kernel.floats_mut("out", &mut out)?;
    let mut lse = kernel.floats_mut("lse", &mut lse)?;

    let (mut outputs, mut lses) = (vec![0.0; p.query_elements()], vec![0.0; p.lse_elements()]);
    for query in queries {
        let q = &q[query.q..][..p.head_dim];
        let scores: Vec<f64> =
            query.keys.clone().map(|j| f64::from(p.scale) * dot(q, &k[query.key(j)..][..p.head_dim])).collect();
        // Shifted by the largest score, so that no exponential overflows.
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        for (j, s) in query.keys.clone().zip(scores) {
            add_scaled(
                factor(p, (s - lse).exp()),
                &v[query.key(j)..][..p.head_dim],
                &mut outputs[query.q..][..p.head_dim],
            );
        }
        lses[query.lse] = lse;
    }
    out.store(outputs);
    lse.store(lses);
    Ok(())
}

/// dv_j = Σ_i P_ij dout_i
/// dP_ij = dout_i·v_j
/// dS_ij = P_ij (dP_ij − D_i): the softmax's Jacobian P_ij (δ_jl − P_il) applied to dP, where
///         D_i = Σ_l P_il dP_il = dout_i · Σ_l P_il v_l = dout_i·out_i needs no second pass over the keys
/// dq_i = scale·Σ_j dS_ij k_j,   dk_j = scale·Σ_i dS_ij q_i
///
/// The sums over i run over the queries of all heads of j's group.
pub(crate) fn attention_grad(
    p: &Attention,
    saved: AttentionSaved,
    dout: View,
    mut grads: AttentionGrads,
) -> Result<()> {
    let kernel = Kernel("attention_grad");
    p.check_grad(&saved, &dout, &grads)?;
    let AttentionSaved { q, k, v, starts, out, lse } = saved;
    let queries = queries(p, kernel, starts)?;
    let (q, k, v) = (kernel.floats("q", q)?, kernel.floats("k", k)?, kernel.floats("v", v)?);
    let (out, lse, dout) = (kernel.floats("out", out)?, kernel.floats("lse", lse)?, kernel.floats("dout", dout)?);
    let dq = kernel.some_mut("dq", &mut grads.dq)?;
    let dk = kernel.some_mut("dk", &mut grads.dk)?;
    let dv = kernel.some_mut("dv", &mut grads.dv)?;

    let (q, k, v) = (taken(p, &q), taken(p, &k), taken(p, &v));
    let taken_dout = taken(p, &dout);
    let scale = f64::from(p.scale);
    let mut grad_q = vec![0.0; p.query_elements()];
    let (mut grad_k, mut grad_v) = (vec![0.0; p.key_elements()], vec![0.0; p.key_elements()]);
    for query in queries {
        let at_query = query.q..query.q + p.head_dim;
        let q = &q[at_query.clone()];
        // D is a sum of elements of its own, and no product of matrices.
        let d = dot(&dout[at_query.clone()], &out[at_query.clone()]);
        let dout = &taken_dout[at_query.clone()];
        for j in query.keys.clone() {
            let at_key = query.key(j)..query.key(j) + p.head_dim;
            let (k, v) = (&k[at_key.clone()], &v[at_key.clone()]);
            let probability = (scale * dot(q, k) - lse[query.lse]).exp();
            let ds = factor(p, probability * (dot(dout, v) - d));
            add_scaled(factor(p, probability), dout, &mut grad_v[at_key.clone()]);
            add_scaled(scale * ds, k, &mut grad_q[at_query.clone()]);
            add_scaled(scale * ds, q, &mut grad_k[at_key]);
        }
    }
    for (asked, grad) in [(dq, grad_q), (dk, grad_k), (dv, grad_v)] {
        if let Some(mut out) = asked {
            out.store(grad);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, numbers, output, values};
    use rankfold_backend::Error;

    const P: Attention = Attention {
        batch: 2,
        queries: 4,
        keys: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 3,
        scale: 0.5,
        query_offset: 0,
        window: None,
        compute: Compute::F32,
    };

    fn inputs(p: &Attention) -> [Vec<f64>; 3] {
        [numbers(1, p.query_elements()), numbers(2, p.key_elements()), numbers(3, p.key_elements())]
    }

    fn forward(p: &Attention, [q, k, v]: &[Vec<f64>; 3], starts: Option<&[u32]>) -> Result<[Vec<f64>; 2]> {
        let starts = starts.map(|starts| BACKEND.upload(starts)).transpose()?;
        let (mut out, mut lse) = (output(p.query_elements()), output(p.lse_elements()));
        let starts = starts.as_ref().map(|starts| starts.view());
        let (out_view, lse_view) = (out.view_mut(), lse.view_mut());
        BACKEND.attention(p, buffer(q).view(), buffer(k).view(), buffer(v).view(), starts, out_view, lse_view)?;
        Ok([values(&out), values(&lse)])
    }

    fn backward(p: &Attention, x: &[Vec<f64>; 3], starts: Option<&[u32]>, dout: &[f64]) -> [Vec<f64>; 3] {
        let [out, lse] = forward(p, x, starts).unwrap();
        let starts = starts.map(|starts| BACKEND.upload(starts).unwrap());
        let [q, k, v, out, lse, dout] = [&x[0], &x[1], &x[2], &out, &lse, dout].map(buffer);
        let mut grads = [output(p.query_elements()), output(p.key_elements()), output(p.key_elements())];
        let [dq, dk, dv] = &mut grads;
        let saved = AttentionSaved {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            starts: starts.as_ref().map(|starts| starts.view()),
            out: out.view(),
            lse: lse.view(),
        };
        let [dq, dk, dv] = [dq, dk, dv].map(|grad| Some(grad.view_mut()));
        BACKEND.attention_grad(p, saved, dout.view(), AttentionGrads { dq, dk, dv }).unwrap();
        grads.map(|grad| values(&grad))
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let starts = [0, 0, 2, 2, 0, 1, 1, 3];
        let cached = Attention { queries: 2, query_offset: 1, ..P };
        let windowed = Attention { window: Some(2), ..P };
        for (p, starts) in [(P, None), (P, Some(&starts[..])), (windowed, None), (cached, None)] {
            let (x, dout) = (inputs(&p), numbers(4, p.query_elements()));
            let grads = backward(&p, &x, starts, &dout);
            for (i, name) in ["q", "k", "v"].into_iter().enumerate() {
                assert_gradient(name, &x[i], &grads[i], |moved| {
                    let mut x = x.clone();
                    x[i] = moved.to_vec();
                    dot(&forward(&p, &x, starts).unwrap()[0], &dout)
                });
            }
        }
    }

    #[test]
    fn one_visible_key_is_copied_and_its_score_is_the_lse() {
        let p = Attention { kv_heads: 4, window: Some(1), ..P };
        let x = inputs(&p);
        let [out, lse] = forward(&p, &x, None).unwrap();
        assert_close("out", &out, &x[2]);
        let score = 0.5 * dot(&x[0][..3], &x[1][..3]);
        assert_close("lse", &lse[..1], &[score]);
    }

    #[test]
    fn equal_scores_average_the_visible_values() {
        let p = Attention { batch: 1, heads: 1, kv_heads: 1, head_dim: 1, ..P };
        let [out, lse] = forward(&p, &[vec![0.0; 4], vec![1.0; 4], vec![1.0, 3.0, 5.0, 7.0]], None).unwrap();
        assert_close("out", &out, &[1.0, 2.0, 3.0, 4.0]);
        assert_close("lse", &lse, &[0.0, 2f64.ln(), 3f64.ln(), 4f64.ln()]);
    }

    /// [batch, positions, rest]: the positions `from..to` of sequence `b`.
    fn cut(x: &[f64], positions: usize, b: usize, from: usize, to: usize) -> Vec<f64> {
        let rest = x.len() / P.batch / positions;
        x[(b * positions + from) * rest..(b * positions + to) * rest].to_vec()
    }

    #[test]
    fn packed_documents_are_as_if_apart() {
        let x = inputs(&P);
        let [packed, _] = forward(&P, &x, Some(&[0, 0, 2, 2, 0, 0, 2, 2])).unwrap();
        let apart = Attention { batch: 1, queries: 2, keys: 2, ..P };
        for (b, from) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
            let document = [0, 1, 2].map(|i| cut(&x[i], 4, b, from, from + 2));
            let [alone, _] = forward(&apart, &document, None).unwrap();
            assert_close("out", &cut(&packed, 4, b, from, from + 2), &alone);
        }
    }

    #[test]
    fn a_cache_of_keys_changes_nothing() {
        let x = inputs(&P);
        let [whole, _] = forward(&P, &x, None).unwrap();
        let p = Attention { batch: 1, queries: 1, query_offset: 3, ..P };
        for b in 0..2 {
            let last = [cut(&x[0], 4, b, 3, 4), cut(&x[1], 4, b, 0, 4), cut(&x[2], 4, b, 0, 4)];
            let [out, _] = forward(&p, &last, None).unwrap();
            assert_close("out", &out, &cut(&whole, 4, b, 3, 4));
        }
    }

    /// 10⁴·(k·q) would overflow exp; the softmax is then the largest score's value alone.
    #[test]
    fn large_scores_do_not_overflow() {
        let p = Attention { batch: 1, queries: 2, keys: 2, heads: 1, kv_heads: 1, head_dim: 1, scale: 1e4, ..P };
        let [out, lse] = forward(&p, &[vec![1.0, 1.0], vec![-1.0, 1.0], vec![3.0, 5.0]], None).unwrap();
        assert_eq!((out, lse), (vec![3.0, 5.0], vec![-1e4, 1e4]));
    }

    #[test]
    fn keys_that_no_query_sees_get_no_gradient() {
        let p = Attention { queries: 2, ..P };
        let grads = backward(&p, &inputs(&p), None, &numbers(4, p.query_elements()));
        for b in 0..2 {
            assert!(cut(&grads[1], 4, b, 2, 4).iter().chain(&cut(&grads[2], 4, b, 2, 4)).all(|&g| g == 0.0));
        }
    }

    #[test]
    fn a_segment_that_starts_after_its_query_is_refused() {
        let error = forward(&P, &inputs(&P), Some(&[0, 2, 0, 0, 0, 0, 0, 0])).unwrap_err();
        assert!(matches!(error, Error::Invalid { kernel: "attention", .. }));
        assert!(forward(&Attention { kv_heads: 3, ..P }, &inputs(&P), None).is_err());
    }
}
