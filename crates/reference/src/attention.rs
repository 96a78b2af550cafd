//! Causal grouped-query attention (Vaswani et al. 2017, eq. 1; Ainslie et al. 2023), segments and window included.
//!
//! For each query i of each head, over the keys j that it sees:
//! s_ij = scale · q_i·k_j,   P_ij = exp(s_ij) / Σ_j exp(s_ij),   out_i = Σ_j P_ij v_j
//!
//! q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; query head h reads key head
//! h / (heads/kv_heads). Saved for backward: lse_i = log Σ_j exp(s_ij) [batch, heads, queries], from which
//! P_ij = exp(s_ij − lse_i) is formed again, so that P [queries, keys] never lies in memory.

use crate::operands::Kernel;
use rankfold_backend::params::{Attention, expect};
use rankfold_backend::{AttentionSaved, Result, View, ViewMut};
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
    p.check(&q, &k, &v, starts.as_ref())?;
    expect(kernel.0, "out", out.len(), p.query_elements())?;
    expect(kernel.0, "lse", lse.len(), p.lse_elements())?;
    let queries = queries(p, kernel, starts)?;
    let (q, k, v) = (kernel.floats("q", q)?, kernel.floats("k", k)?, kernel.floats("v", v)?);
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
            add_scaled((s - lse).exp(), &v[query.key(j)..][..p.head_dim], &mut outputs[query.q..][..p.head_dim]);
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
    mut dq: ViewMut,
    mut dk: ViewMut,
    mut dv: ViewMut,
) -> Result<()> {
    let kernel = Kernel("attention_grad");
    let AttentionSaved { q, k, v, starts, out, lse } = saved;
    p.check(&q, &k, &v, starts.as_ref())?;
    expect(kernel.0, "out", out.len(), p.query_elements())?;
    expect(kernel.0, "lse", lse.len(), p.lse_elements())?;
    expect(kernel.0, "dout", dout.len(), p.query_elements())?;
    expect(kernel.0, "dq", dq.len(), p.query_elements())?;
    expect(kernel.0, "dk", dk.len(), p.key_elements())?;
    expect(kernel.0, "dv", dv.len(), p.key_elements())?;
    let queries = queries(p, kernel, starts)?;
    let (q, k, v) = (kernel.floats("q", q)?, kernel.floats("k", k)?, kernel.floats("v", v)?);
    let (out, lse, dout) = (kernel.floats("out", out)?, kernel.floats("lse", lse)?, kernel.floats("dout", dout)?);
    let mut dq = kernel.floats_mut("dq", &mut dq)?;
    let mut dk = kernel.floats_mut("dk", &mut dk)?;
    let mut dv = kernel.floats_mut("dv", &mut dv)?;

    let scale = f64::from(p.scale);
    let mut grad_q = vec![0.0; p.query_elements()];
    let (mut grad_k, mut grad_v) = (vec![0.0; p.key_elements()], vec![0.0; p.key_elements()]);
    for query in queries {
        let at_query = query.q..query.q + p.head_dim;
        let (q, dout) = (&q[at_query.clone()], &dout[at_query.clone()]);
        let d = dot(dout, &out[at_query.clone()]);
        for j in query.keys.clone() {
            let at_key = query.key(j)..query.key(j) + p.head_dim;
            let (k, v) = (&k[at_key.clone()], &v[at_key.clone()]);
            let probability = (scale * dot(q, k) - lse[query.lse]).exp();
            let ds = probability * (dot(dout, v) - d);
            add_scaled(probability, dout, &mut grad_v[at_key.clone()]);
            add_scaled(scale * ds, k, &mut grad_q[at_query.clone()]);
            add_scaled(scale * ds, q, &mut grad_k[at_key]);
        }
    }
    dq.store(grad_q);
    dk.store(grad_k);
    dv.store(grad_v);
    Ok(())
}
