//! Attention: its bounds follow the formula step by step.
//!
//! Forward, for one query: a score s_j = scale·Σ q k is off by δs_j = γ_(d+1)·|scale|·Σ|q k|. Its weight is
//! exp(s_j − m), off by δ_j = δs_j + u·|s_j − m| + EXP in relative terms (a sum in pieces, rescaled to new maxima,
//! splits s_j − m into parts of one sign that add up to it, and takes fewer exps than it saves roundings). The shift
//! m itself cancels. So P_j = exp(s_j − m)/S is off by δ_j + D + (n + 2)·u with D = Σ P_j δ_j the error of S, n the
//! number of keys, whose sum takes n roundings, and the division and the product with v_j two. The sum of P_j v_j
//! takes n more. lse = m + log S is off by D + n·u, by log's own error, and by the error of m and the rounding of
//! the sum; m is a score, off by δs_m, but S makes up for it: what remains is Σ P_j δs_j, which D holds.
//!
//! Backward, where lse and out are inputs: P = exp(s_j − lse) is off by δs_j + u·|s_j − lse| + EXP; dP = Σ dout v and
//! D = Σ dout out by γ_d of their terms; dP − D by a rounding more; dS = P∘(dP − D) by a rounding more. The rest are
//! sums of products with these: dq over the keys, dk and dv over queries and the heads of a group, each with a
//! product by scale.
//!
//! In bf16 the inputs q, k, v and dout are rounded alike on both sides; the bounds above then hold of the rounded ones.
//! P and dS are made on the way and rounded by either side at a scale of its own: twice the unit of bf16 of each, in the
//! products that follow.
//!
//! Weights that are next to nothing make denormal products: each term adds 2⁻¹⁵⁰, and where dS was denormal already
//! that much times scale and the key or query it is multiplied with.

use super::bound::{DENORMAL, EXP, FLUSHED, UNIT, gamma_of, second_order, to_bf16};
use super::draw::Draw;
use super::harness::*;
use crate::params::Attention;
use crate::{AttentionGrads, AttentionSaved, Backend, Compute};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: Attention,
    segments: bool,
    /// Which of dq, dk and dv are asked for in the second of two calls.
    asked: [bool; 3],
    seed: u64,
}

fn cases(compute: Compute) -> impl Strategy<Value = Case> {
    let lengths = (
        0..3usize,
        select(vec![0, 1, 2, 5, 8, 15, 17, 33, 64, 150]),
        select(vec![0, 0, 1, 7, 16, 31]),
        select(vec![0, 0, 1, 9]),
    );
    let heads = (1..4usize, 1..4usize, select(vec![1, 2, 7, 8, 16, 31, 64, 72, 80, 96, 128]));
    let window = option::of(select(vec![1, 2, 5, 16, 100]));
    (lengths, heads, window, any::<bool>(), any::<[bool; 3]>(), any::<u64>()).prop_map(
        move |((batch, queries, query_offset, beyond), (kv_heads, group, head_dim), window, segments, asked, seed)| {
            Case {
                p: Attention {
                    batch,
                    queries,
                    keys: query_offset + queries + beyond,
                    heads: kv_heads * group,
                    kv_heads,
                    head_dim,
                    scale: 1.0 / (head_dim as f32).sqrt(),
                    query_offset,
                    window,
                    compute,
                },
                segments,
                asked,
                seed,
            }
        },
    )
}

struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    starts: Option<Vec<u32>>,
    out: Vec<f32>,
    lse: Vec<f32>,
    dout: Vec<f32>,
    /// As products take it.
    taken_dout: Vec<f32>,
}

impl Data {
    fn draw(case: &Case) -> Self {
        let (p, mut draw) = (&case.p, Draw::new(case.seed));
        // Scores are of the order of the product of the two: flat softmaxes and nearly one-hot ones.
        let sigma = [0.1, 1.0, 3.0][draw.below(3)];
        let (q, k) = (draw.normal(p.query_elements(), sigma), draw.normal(p.key_elements(), sigma));
        let (v, dout) = (draw.scaled(p.key_elements()), draw.scaled(p.query_elements()));
        let starts = case.segments.then(|| {
            let mut starts = Vec::new();
            for _ in 0..p.batch {
                let mut start = 0;
                for position in p.query_offset..p.query_offset + p.queries {
                    // The first query may begin a segment, or continue one that lies in the cache.
                    start = match draw.below(6) {
                        0 => position,
                        1 if position == p.query_offset => draw.below(position + 1),
                        _ => start,
                    };
                    starts.push(start as u32);
                }
            }
            starts
        });
        let (out, lse) = (Vec::new(), Vec::new());
        Self { q, k, v, starts, out, lse, taken_dout: dout.clone(), dout }
    }

    /// What products take: all but D's own inputs rounded to bf16.
    fn taken(self, p: &Attention) -> Self {
        let round = |x: Vec<f32>| match p.compute {
            Compute::F32 => x,
            Compute::Bf16 => x.into_iter().map(|x| to_bf16(x.into()) as f32).collect(),
        };
        let Self { q, k, v, taken_dout, .. } = self;
        Self { q: round(q), k: round(k), v: round(v), taken_dout: round(taken_dout), ..self }
    }
}

fn forward_call<T: Real>(backend: &dyn Backend, case: &Case, data: &Data) -> TestCaseResult<Outputs<T>> {
    let (p, desk) = (&case.p, Desk::new(backend, case.seed));
    let (q, k, v) = (desk.real::<T>(&data.q)?, desk.real::<T>(&data.k)?, desk.real::<T>(&data.v)?);
    let starts = data.starts.as_ref().map(|starts| desk.put(starts)).transpose()?;
    let (mut out, mut lse) = (desk.blank(T::DTYPE, p.query_elements())?, desk.blank(T::DTYPE, p.lse_elements())?);
    let starts = starts.as_ref().map(Placed::view);
    backend.attention(p, q.view(), k.view(), v.view(), starts, out.view_mut(), lse.view_mut())?;
    Ok(vec![desk.take(&out)?, desk.take(&lse)?])
}

/// dq, dk and dv, each blank where it is not asked for.
fn backward_call<T: Real>(
    backend: &dyn Backend,
    case: &Case,
    data: &Data,
    asked: [bool; 3],
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (q, k, v) = (desk.real::<T>(&data.q)?, desk.real::<T>(&data.k)?, desk.real::<T>(&data.v)?);
    let starts = data.starts.as_ref().map(|starts| desk.put(starts)).transpose()?;
    let (out, lse, dout) = (desk.real::<T>(&data.out)?, desk.real::<T>(&data.lse)?, desk.real::<T>(&data.dout)?);
    let mut dq = desk.blank(T::DTYPE, data.q.len())?;
    let (mut dk, mut dv) = (desk.blank(T::DTYPE, data.k.len())?, desk.blank(T::DTYPE, data.v.len())?);
    let saved = AttentionSaved {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        starts: starts.as_ref().map(Placed::view),
        out: out.view(),
        lse: lse.view(),
    };
    let grads = AttentionGrads {
        dq: asked[0].then(|| dq.view_mut()),
        dk: asked[1].then(|| dk.view_mut()),
        dv: asked[2].then(|| dv.view_mut()),
    };
    backend.attention_grad(&case.p, saved, dout.view(), grads)?;
    Ok(vec![desk.take(&dq)?, desk.take(&dk)?, desk.take(&dv)?])
}

/// One query of one head: where it lies, and its keys with their scores and the scores' errors.
struct Query {
    at: usize,
    lse: usize,
    /// The first element of each key that it sees, its score and that score's error.
    keys: Vec<(usize, f64, f64)>,
}

fn product(a: &[f32], b: &[f32]) -> (f64, f64) {
    let terms = || a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
    (terms().sum(), terms().map(f64::abs).sum())
}

fn queries(p: &Attention, data: &Data) -> Vec<Query> {
    let mut all = Vec::new();
    for (b, i, h) in positions(p) {
        let start = data.starts.as_ref().map_or(0, |starts| starts[b * p.queries + i] as usize);
        let at = ((b * p.queries + i) * p.heads + h) * p.head_dim;
        let key = |j: usize| {
            let key = ((b * p.keys + j) * p.kv_heads + h / (p.heads / p.kv_heads)) * p.head_dim;
            let (sum, mass) = product(&data.q[at..][..p.head_dim], &data.k[key..][..p.head_dim]);
            let scale = f64::from(p.scale);
            (key, scale * sum, gamma_of(p.compute, p.head_dim + 1) * scale.abs() * mass)
        };
        all.push(Query { at, lse: (b * p.heads + h) * p.queries + i, keys: p.visible(i, start).map(key).collect() });
    }
    all
}

fn positions(p: &Attention) -> impl Iterator<Item = (usize, usize, usize)> {
    let (batch, queries, heads) = (p.batch, p.queries, p.heads);
    (0..batch).flat_map(move |b| (0..queries).flat_map(move |i| (0..heads).map(move |h| (b, i, h))))
}

/// How far two roundings of P or of dS may lie apart, relative to it: half a step of bf16 each, 2⁻⁸.
fn parted(p: &Attention) -> f64 {
    match p.compute {
        Compute::F32 => 0.0,
        Compute::Bf16 => 2.0 / 256.0,
    }
}

/// The bounds of out and of lse.
fn forward_bounds(p: &Attention, data: &Data) -> [Vec<f64>; 2] {
    let (mut out, mut lses) = (vec![0.0; p.query_elements()], vec![0.0; p.lse_elements()]);
    for Query { at, lse, keys } in queries(p, data) {
        let max = keys.iter().fold(f64::NEG_INFINITY, |max, (_, s, _)| max.max(*s));
        let sum: f64 = keys.iter().map(|(_, s, _)| (s - max).exp()).sum();
        let probability = |s: f64| (s - max).exp() / sum;
        let relative = |s: f64, error: f64| error + UNIT * (max - s) + EXP;
        let mean: f64 = keys.iter().map(|&(_, s, error)| probability(s) * relative(s, error)).sum();
        let (n, log_sum) = (keys.len() as f64, sum.ln());
        // The sum of P takes n roundings, that of P v as many, or cuts, each of which is worth two.
        let sums = n + 2.0 + if p.compute == Compute::Bf16 { 2.0 * n } else { n };
        for &(key, s, error) in &keys {
            let relative = relative(s, error) + mean + sums * UNIT;
            let error = second_order(probability(s) * relative, relative) + flushed(probability(s));
            let weight = error + parted(p) * (probability(s) + error);
            for i in 0..p.head_dim {
                out[at + i] += weight * f64::from(data.v[key + i].abs()) + DENORMAL;
            }
        }
        let sum_error = mean + n * UNIT;
        lses[lse] = second_order(sum_error, sum_error) + EXP * log_sum + UNIT * (max + log_sum).abs();
    }
    [out, lses]
}

/// What a weight that is next to nothing may lose to exp's flush.
fn flushed(probability: f64) -> f64 {
    if probability < 2.0 * FLUSHED { FLUSHED } else { 0.0 }
}

/// The bounds of dq, dk and dv.
fn backward_bounds(p: &Attention, data: &Data) -> [Vec<f64>; 3] {
    let mut dq = vec![0.0; p.query_elements()];
    let (mut dk, mut dv) = (vec![0.0; p.key_elements()], vec![0.0; p.key_elements()]);
    let (scale, d) = (f64::from(p.scale).abs(), p.head_dim);
    let per_key = p.queries * p.heads / p.kv_heads;
    for Query { at, lse, keys } in queries(p, data) {
        let (big_d, mass_d) = product(&data.dout[at..][..d], &data.out[at..][..d]);
        let (dout, lse) = (&data.taken_dout[at..][..d], f64::from(data.lse[lse]));
        for &(key, s, error) in &keys {
            let (dp, mass_p) = product(dout, &data.v[key..][..d]);
            let probability = (s - lse).exp();
            let relative = error + UNIT * (s - lse).abs() + EXP;
            let p_error = second_order(probability * relative, relative) + flushed(probability);
            let (difference, ds) = ((dp - big_d).abs(), (probability * (dp - big_d)).abs());
            let ds_error = (probability + p_error)
                * (gamma_of(p.compute, d + 1) * (mass_p + mass_d) + UNIT * difference)
                + p_error * difference
                + UNIT * ds;
            let ds_error = ds_error + parted(p) * (ds + ds_error);
            let by_key = scale * (ds_error + gamma_of(p.compute, per_key + 2) * (ds + ds_error));
            let by_query = scale * (ds_error + gamma_of(p.compute, keys.len() + 2) * (ds + ds_error));
            let p_error = p_error + parted(p) * (probability + p_error);
            let by_weight = p_error + gamma_of(p.compute, per_key) * (probability + p_error);
            for i in 0..d {
                let [k, q, dout] = [data.k[key + i], data.q[at + i], dout[i]].map(|x| f64::from(x.abs()));
                dq[at + i] += by_query * k + DENORMAL * (1.0 + scale * k);
                dk[key + i] += by_key * q + DENORMAL * (1.0 + scale * q);
                dv[key + i] += by_weight * dout + DENORMAL;
            }
        }
    }
    [dq, dk, dv]
}

/// out and lse: grouped heads, segments, a query offset, a window, and keys that no query sees.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge_forward(candidate, oracle, Compute::F32)
}

/// dq, dk and dv, from the oracle's own forward, rounded to f32 for both; the same bits whichever are asked for.
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge_backward(candidate, oracle, Compute::F32)
}

/// out and lse, with bf16 products.
pub fn forward_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    unserved(candidate).unwrap_or_else(|| judge_forward(candidate, oracle, Compute::Bf16))
}

/// dq, dk and dv, with bf16 products.
pub fn backward_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    unserved(candidate).unwrap_or_else(|| judge_backward(candidate, oracle, Compute::Bf16))
}

fn judge_forward(candidate: &dyn Backend, oracle: &dyn Backend, compute: Compute) -> Verdict {
    check(128, &cases(compute), |case| {
        let data = Data::draw(&case);
        let found = twice(|| forward_call::<f32>(candidate, &case, &data))?;
        let exact = forward_call::<f64>(oracle, &case, &data)?;
        let [out, lse] = forward_bounds(&case.p, &data.taken(&case.p));
        agree("out", &found[0], &exact[0], |i| out[i])?;
        agree("lse", &found[1], &exact[1], |i| lse[i])
    })
}

fn judge_backward(candidate: &dyn Backend, oracle: &dyn Backend, compute: Compute) -> Verdict {
    check(128, &cases(compute), |case| {
        let mut data = Data::draw(&case);
        let saved = forward_call::<f64>(oracle, &case, &data)?;
        let [out, lse] = [0, 1].map(|output: usize| saved[output].iter().map(|&x| x as f32).collect());
        (data.out, data.lse) = (out, lse);
        let found = twice(|| backward_call::<f32>(candidate, &case, &data, [true; 3]))?;
        let exact = backward_call::<f64>(oracle, &case, &data, [true; 3])?;
        let some = backward_call::<f32>(candidate, &case, &data, case.asked)?;
        let bounds = backward_bounds(&case.p, &data.taken(&case.p));
        let tensors = ["dq", "dk", "dv"];
        for (output, tensor) in tensors.into_iter().enumerate() {
            agree(tensor, &found[output], &exact[output], |i| bounds[output][i])?;
        }
        same_where_asked(tensors, case.asked, &some, &found)
    })
}

/// Why nothing is judged, where the candidate has no bf16 products.
fn unserved(candidate: &dyn Backend) -> Option<Verdict> {
    let p = Attention {
        batch: 1,
        queries: 1,
        keys: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        scale: 1.0,
        query_offset: 0,
        window: None,
        compute: Compute::Bf16,
    };
    let trial = || {
        let [q, k, v] = [candidate.upload(&[1f32])?, candidate.upload(&[1f32])?, candidate.upload(&[1f32])?];
        let [mut out, mut lse] = [candidate.upload(&[0f32])?, candidate.upload(&[0f32])?];
        candidate.attention(&p, q.view(), k.view(), v.view(), None, out.view_mut(), lse.view_mut())
    };
    unsupported(trial())
}
