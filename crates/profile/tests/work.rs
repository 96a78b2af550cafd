//! Operations and bytes of kernels, against formulas derived by hand, whatever the shapes.

mod common;

use common::{profile, row, step, work};
use proptest::prelude::*;
use rankfold_backend::params::{self, Attention, Embedding, IGNORED, Linear, MatMul};
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, Compute, DType, Format, LinearGrads, LowRank, Quantized, Weight,
};
use rankfold_profile::{Bound, Report};
use std::sync::Arc;

fn zeros(backend: &Arc<dyn Backend>, len: usize) -> Buffer {
    backend.filled(DType::F32, len, 0.0).unwrap()
}

/// What a weight of so many elements is stored in.
#[derive(Clone, Copy, Debug)]
enum Stored {
    F32,
    Bf16,
    Nf4,
    Nf4Double,
}

impl Stored {
    /// Its bytes: 4 or 2 an element; or a code of half a byte, and for each block of 64 a scale of 4 bytes or, of
    /// double quantisation, 1, another 4 for each 256 of these, and 4 for their mean.
    fn bytes(self, elements: usize) -> usize {
        let blocks = elements.div_ceil(64);
        match self {
            Self::F32 => 4 * elements,
            Self::Bf16 => 2 * elements,
            Self::Nf4 => elements.div_ceil(2) + 4 * blocks,
            Self::Nf4Double => elements.div_ceil(2) + blocks + 4 * blocks.div_ceil(256) + 4,
        }
    }
}

/// A weight of zeros to work with.
fn with_weight(backend: &Arc<dyn Backend>, stored: Stored, shape: [usize; 2], run: impl FnOnce(&Weight)) {
    let elements = shape[0] * shape[1];
    let quantized = |double| {
        let w = zeros(backend, elements);
        Quantized::quantize(backend.as_ref(), w.view(), shape, Format::Nf4, 64, double).unwrap()
    };
    match stored {
        Stored::F32 => run(&Weight::Dense(zeros(backend, elements).view())),
        Stored::Bf16 => run(&Weight::Dense(backend.filled(DType::Bf16, elements, 0.0).unwrap().view())),
        Stored::Nf4 => run(&Weight::Quantized(&quantized(false))),
        Stored::Nf4Double => run(&Weight::Quantized(&quantized(true))),
    }
}

fn float(n: usize) -> f64 {
    n as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// x Wᵀ is t·i·o products and as many sums, x Aᵀ t·i·r, times Bᵀ t·r·o; dx and dA, dB are the same products in
    /// other orders, dA and dB two each.
    #[test]
    fn linear_does_what_its_products_do_and_moves_each_operand_once(
        (t, i, o, r) in (1usize..9, 1usize..80, 1usize..80, 1usize..6),
        stored in prop::sample::select(vec![Stored::F32, Stored::Bf16, Stored::Nf4, Stored::Nf4Double]),
        bf16 in any::<bool>(),
        accumulate in any::<bool>(),
    ) {
        let compute = if bf16 { Compute::Bf16 } else { Compute::F32 };
        let report = profile(|backend| with_weight(backend, stored, [o, i], |w| step(1, || {
            let [a, b, x, bias] = [r * i, o * r, t * i, o].map(|len| zeros(backend, len));
            let (mut y, mut dx) = (zeros(backend, t * o), zeros(backend, t * i));
            let low_rank = LowRank {
                rank: r, a: a.view(), b: b.view(), scale: 1.0, per_rank: None, row_scale: None, dropout: None,
            };
            let p = Linear { tokens: t, inputs: i, outputs: o, compute };
            backend.linear(&p, x.view(), w, Some(&low_rank), Some(bias.view()), y.view_mut()).unwrap();
            backend.linear_grad_input(&p, y.view(), w, Some(&low_rank), accumulate, dx.view_mut()).unwrap();
            let (mut da, mut db) = (zeros(backend, r * i), zeros(backend, o * r));
            let grads =
                LinearGrads { a: Some(da.view_mut()), b: Some(db.view_mut()), ..LinearGrads::default() };
            backend.linear_grad_weight(&p, x.view(), y.view(), w, Some(&low_rank), grads).unwrap();
        }))).report(common::ROOF);
        let (base, update) = (t * i * o, t * i * r + t * r * o);
        let (ends, factors) = (4 * (t * i + t * o), 4 * (r * i + o * r));
        let again = if accumulate { 4 * t * i } else { 0 };
        let is = |kernel: &str, flops: usize, bytes: usize| {
            let row = row(&report, kernel);
            prop_assert_eq!([row.flops, row.bytes], [float(flops), float(bytes)], "{}", kernel);
            Ok(())
        };
        is("linear", 2 * (base + update), ends + stored.bytes(o * i) + factors + 4 * o)?;
        is("linear_grad_input", 2 * (base + update), ends + stored.bytes(o * i) + factors + again)?;
        is("linear_grad_weight", 2 * 2 * update, ends + 3 * factors)?;
    }

    /// Each pair of a query and a key that it sees is a sum of head_dim products for q kᵀ and head_dim more for P v;
    /// backward forms q kᵀ again, dout vᵀ, dq, dk and dv. The pairs are counted one by one.
    #[test]
    fn attention_does_what_its_visible_pairs_take(
        (batch, queries, offset) in (1usize..4, 1usize..12, 0usize..5),
        (group, kv_heads, half) in (1usize..4, 1usize..3, 1usize..5),
        window in prop::option::of(1usize..9),
        packed in any::<bool>(),
    ) {
        let (keys, heads, head_dim) = (offset + queries, group * kv_heads, 2 * half);
        let p = Attention {
            batch, queries, keys, heads, kv_heads, head_dim, scale: 1.0, query_offset: offset, window,
            compute: Compute::F32,
        };
        // Documents of three tokens.
        let starts: Vec<u32> = (0..batch * queries).map(|n| (offset + n % queries) as u32 / 3 * 3).collect();
        let mut pairs = 0;
        for (n, start) in starts.iter().enumerate() {
            let position = offset + n % queries;
            for key in 0..keys {
                let is_in_document = !packed || key >= *start as usize;
                let is_near = window.is_none_or(|window| position < key + window);
                pairs += usize::from(key <= position && is_in_document && is_near);
            }
        }
        let report = profile(|backend| step(1, || {
            let starts = packed.then(|| backend.upload(&starts).unwrap());
            let starts = starts.as_ref().map(Buffer::view);
            let (q_len, k_len, lse_len) = (p.query_elements(), p.key_elements(), p.lse_elements());
            let [q, k, v, dout] = [q_len, k_len, k_len, q_len].map(|len| zeros(backend, len));
            let (mut out, mut lse) = (zeros(backend, q_len), zeros(backend, lse_len));
            let (q, k, v) = (q.view(), k.view(), v.view());
            backend.attention(&p, q, k, v, starts, out.view_mut(), lse.view_mut()).unwrap();
            let saved = AttentionSaved { q, k, v, starts, out: out.view(), lse: lse.view() };
            let [mut dq, mut dk, mut dv] = [q_len, k_len, k_len].map(|len| zeros(backend, len));
            let (dq, dk, dv) = (Some(dq.view_mut()), Some(dk.view_mut()), Some(dv.view_mut()));
            backend.attention_grad(&p, saved, dout.view(), AttentionGrads { dq, dk, dv }).unwrap();
        })).report(common::ROOF);
        let starts_len = if packed { batch * queries } else { 0 };
        let (q_len, k_len, lse_len) = (p.query_elements(), p.key_elements(), p.lse_elements());
        let forward = row(&report, "attention");
        prop_assert_eq!(forward.flops, float(2 * 2 * pairs * heads * head_dim));
        prop_assert_eq!(forward.bytes, float(4 * (2 * q_len + 2 * k_len + lse_len + starts_len)));
        let backward = row(&report, "attention_grad");
        prop_assert_eq!(backward.flops, float(5 * 2 * pairs * heads * head_dim));
        prop_assert_eq!(backward.bytes, float(4 * (4 * q_len + 4 * k_len + lse_len + starts_len)));
    }

    /// add reads two numbers, adds them and writes one; AdamW reads four and writes three.
    #[test]
    fn elementwise_kernels_move_each_element_of_each_operand_once(n in 0usize..300) {
        let of = |operations: usize, bytes: usize| [float(operations * n), float(bytes * n)];
        prop_assert_eq!(
            work("add", |backend| {
                let (a, b, mut c) = (zeros(backend, n), zeros(backend, n), zeros(backend, n));
                backend.add(a.view(), b.view(), c.view_mut()).unwrap();
            }),
            of(1, 12)
        );
        prop_assert_eq!(
            work("cast", |backend| {
                let (a, mut b) = (zeros(backend, n), backend.alloc(DType::Bf16, n).unwrap());
                backend.cast(a.view(), b.view_mut()).unwrap();
            }),
            of(0, 6)
        );
        prop_assert_eq!(
            work("adamw", |backend| {
                let (grad, mut param) = (zeros(backend, n), zeros(backend, n));
                let (mut m, mut v) = (zeros(backend, n), zeros(backend, n));
                let p = params::AdamW {
                    lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0,
                };
                backend.adamw(&p, grad.view(), param.view_mut(), m.view_mut(), v.view_mut()).unwrap();
            }),
            of(16, 28)
        );
    }

    /// Of the table a row for each token.
    #[test]
    fn an_embedding_moves_the_rows_that_it_picks(
        (tokens, vocab, width) in (0usize..9, 1usize..50, 1usize..9),
    ) {
        let found = work("embedding", |backend| {
            let ids: Vec<u32> = (0..tokens).map(|t| (t % vocab) as u32).collect();
            let (ids, table) = (backend.upload(&ids).unwrap(), zeros(backend, vocab * width));
            let mut rows = zeros(backend, tokens * width);
            let p = Embedding { tokens, vocab, width };
            backend.embedding(&p, ids.view(), table.view(), rows.view_mut()).unwrap();
        });
        prop_assert_eq!(found, [0.0, float(4 * tokens + 2 * 4 * tokens * width)]);
    }
}

fn products(compute: Compute, edge: usize) -> Report {
    let run = |backend: &Arc<dyn Backend>| {
        let (a, b, mut c) = (zeros(backend, edge * edge), zeros(backend, edge * edge), zeros(backend, edge * edge));
        let layout = params::Layout::Nn;
        let p = MatMul { m: edge, n: edge, k: edge, layout, accumulate: false, compute };
        backend.matmul(&p, a.view(), b.view(), c.view_mut()).unwrap();
    };
    profile(|backend| step(1, || run(backend))).report(common::ROOF)
}

/// A square product is 2·edge³ operations on 12·edge² bytes: on a machine of 1 GB/s and 10 GFLOP/s in f32 arithmetic
/// binds it from an edge of 60 on, on one of 40 GFLOP/s in bf16 from 240.
#[test]
fn a_kernel_is_bound_by_the_roof_that_takes_longer() {
    for (compute, edge, bound, seconds) in [
        (Compute::F32, 59, Bound::Memory, 12.0 * 59.0 * 59.0 / 1e9),
        (Compute::F32, 61, Bound::F32, 2.0 * 61.0f64.powi(3) / 10e9),
        (Compute::Bf16, 239, Bound::Memory, 12.0 * 239.0 * 239.0 / 1e9),
        (Compute::Bf16, 241, Bound::Bf16, 2.0 * 241.0f64.powi(3) / 40e9),
    ] {
        let row = row(&products(compute, edge), "matmul");
        assert_eq!(row.bound, Some(bound), "{edge} in {compute:?}");
        // Two roundings of the quotient that the fraction is.
        let found = row.fraction.unwrap() * row.seconds;
        assert!((found / seconds - 1.0).abs() < 4.0 * f64::EPSILON, "{found} and {seconds}");
    }
}

#[test]
fn a_call_that_is_refused_is_not_noted() {
    let profile = profile(|backend| {
        step(1, || {
            let (mut logits, labels, mut losses) =
                (zeros(backend, 6), backend.upload(&[IGNORED; 2]).unwrap(), zeros(backend, 3));
            let p = params::CrossEntropy { rows: 2, vocab: 3 };
            let (logits, losses) = (logits.view_mut(), losses.view_mut());
            backend.cross_entropy_grad_in_place(&p, 1.0, logits, labels.view(), losses).unwrap_err();
        });
    });
    let rows = profile.report(common::ROOF).rows;
    assert!(!rows.is_empty() && rows.iter().all(|row| row.kernel != "cross_entropy_grad_in_place"), "{rows:?}");
}
