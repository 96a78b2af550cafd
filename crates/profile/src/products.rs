//! The work of the kernels that are products of matrices.
//!
//! A product of [m, k] and [k, n] is 2·m·n·k operations. What is linear in the operands (a bias, a scale, a mask, the
//! decoding of 4 bits, a softmax's exponentials) is left out beside it.

use crate::work::{Work, count};
use rankfold_backend::params::{Attention, Linear, MatMul};
use rankfold_backend::{AttentionGrads, AttentionSaved, LinearGrads, LowRank, View, ViewMut, Weight};

/// c = a·b, or c += a·b.
pub(crate) fn matmul(p: &MatMul, a: View, b: View, c: &ViewMut) -> Work {
    let before = p.accumulate.then_some(c);
    Work::new(2.0 * count(p.m) * count(p.n) * count(p.k), &[&a, &b, &before], &[c]).of(p.compute)
}

/// Operations of x Wᵀ, as of dy W and of dyᵀ x.
fn with_base(p: &Linear) -> f64 {
    2.0 * count(p.tokens) * count(p.inputs) * count(p.outputs)
}

/// Operations of x Aᵀ, as of a product with A's gradient; and of the same with B.
fn with_update(p: &Linear, low_rank: Option<&LowRank>) -> [f64; 2] {
    let rank = low_rank.map_or(0, |l| l.rank);
    [p.inputs, p.outputs].map(|side| 2.0 * count(p.tokens) * count(rank) * count(side))
}

/// How often the base is multiplied: twice where a scale of its rows and dropout are both there.
fn times(low_rank: Option<&LowRank>) -> f64 {
    let is_split = low_rank.is_some_and(|l| l.row_scale.is_some() && l.dropout.is_some());
    if is_split { 2.0 } else { 1.0 }
}

/// x Wᵀ, x Aᵀ, (x Aᵀ) Bᵀ.
pub(crate) fn linear(
    p: &Linear,
    x: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    bias: Option<View>,
    y: &ViewMut,
) -> Work {
    let [with_a, with_b] = with_update(p, low_rank);
    let flops = times(low_rank) * with_base(p) + with_a + with_b;
    Work::new(flops, &[&x, w, &low_rank, &bias], &[y]).of(p.compute)
}

/// dy W, dy B, (dy B) A.
pub(crate) fn linear_grad_input(
    p: &Linear,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    accumulate: bool,
    dx: &ViewMut,
) -> Work {
    let [with_a, with_b] = with_update(p, low_rank);
    let flops = times(low_rank) * with_base(p) + with_a + with_b;
    let before = accumulate.then_some(dx);
    Work::new(flops, &[&dy, w, &low_rank, &before], &[dx]).of(p.compute)
}

/// dW: dyᵀ x. dA: dy B and its product with x. dB: x Aᵀ and its product with dy. de: dy B and x Aᵀ. dg: what g
/// multiplied, which is all of forward.
pub(crate) fn linear_grad_weight(
    p: &Linear,
    x: View,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    grads: &LinearGrads,
) -> Work {
    let LinearGrads { weight, bias, a, b, per_rank, row_scale } = grads;
    let [with_a, with_b] = with_update(p, low_rank);
    let if_any = |asked: &[bool], flops: f64| if asked.contains(&true) { flops } else { 0.0 };
    let [is_w, is_a, is_b, is_e, is_g] = [weight, a, b, per_rank, row_scale].map(Option::is_some);
    let of_update = [is_a, is_b, is_e, is_g];
    let flops = if_any(&[is_w], with_base(p))
        + if_any(&[is_a, is_e], with_b)
        + if_any(&[is_a], with_a)
        + if_any(&[is_b, is_e, is_g], with_a)
        + if_any(&[is_b], with_b)
        + if_any(&[is_g], with_base(p) + with_b);
    let x = (is_w || of_update.contains(&true)).then_some(x);
    let base = is_g.then_some(w);
    let low_rank = low_rank.filter(|_| of_update.contains(&true));
    Work::new(
        flops,
        &[&x, &dy, &base, &low_rank, weight, bias, a, b, per_rank, row_scale],
        &[weight, bias, a, b, per_rank, row_scale],
    )
    .of(p.compute)
}

/// The work of attention before it is known which keys its queries see.
pub(crate) struct OfPairs {
    flops_a_pair: f64,
    moved: Work,
}

impl OfPairs {
    fn new(p: &Attention, products: usize, moved: Work) -> Self {
        let flops_a_pair = 2.0 * count(products) * count(p.head_dim) * count(p.heads);
        Self { flops_a_pair, moved: moved.of(p.compute) }
    }

    /// With so many pairs of a query and a key that it sees.
    pub fn of(self, pairs: f64) -> Work {
        Work { flops: self.flops_a_pair * pairs, ..self.moved }
    }
}

/// Pairs of a query and a key that it sees, over the batch. `starts` is empty where every query's is 0.
pub(crate) fn visible_pairs(p: &Attention, starts: &[u32]) -> f64 {
    let start = |query: usize| starts.get(query).map_or(0, |start| *start as usize);
    let of = |query: usize| count(p.visible(query % p.queries, start(query)).count());
    (0..p.batch * p.queries).map(of).sum()
}

/// q kᵀ and P v.
pub(crate) fn attention(
    p: &Attention,
    [q, k, v]: [View; 3],
    starts: Option<View>,
    out: &ViewMut,
    lse: &ViewMut,
) -> OfPairs {
    OfPairs::new(p, 2, Work::new(0.0, &[&q, &k, &v, &starts], &[out, lse]))
}

/// q kᵀ again; dout vᵀ where dq or dk is asked for; and one product for each of dq, dk, dv.
pub(crate) fn attention_grad(p: &Attention, saved: &AttentionSaved, dout: View, grads: &AttentionGrads) -> OfPairs {
    let AttentionSaved { q, k, v, starts, out, lse } = saved;
    let AttentionGrads { dq, dk, dv } = grads;
    let products = [true, dq.is_some() || dk.is_some(), dq.is_some(), dk.is_some(), dv.is_some()];
    let products = products.into_iter().filter(|asked| *asked).count();
    OfPairs::new(p, products, Work::new(0.0, &[q, k, v, starts, out, lse, &dout], &[dq, dk, dv]))
}
