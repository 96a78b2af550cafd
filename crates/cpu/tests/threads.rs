//! 1, 2 and 3 threads give the same bits, in every kernel that splits its work: the shapes are large enough for
//! several tasks each, and ragged.

use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Element, Format, Quantized, Result, philox,
};
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;

/// `n` numbers in (−1, 1), the same for the same seed.
fn draw(n: usize, seed: u64) -> Vec<f32> {
    (0..n).map(|i| 2.0 * philox::unit(philox::word(seed, 0, i as u64)) - 1.0).collect()
}

fn random(b: &dyn Backend, n: usize, seed: u64) -> Result<Buffer> {
    b.upload(&draw(n, seed))
}

fn zeros(b: &dyn Backend, n: usize) -> Result<Buffer> {
    b.filled(DType::F32, n, 0.0)
}

/// The bytes of buffers, one after the other.
fn bits(b: &dyn Backend, buffers: &[&Buffer]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for buffer in buffers {
        let start = all.len();
        all.resize(start + buffer.bytes(), 0);
        b.read(buffer.view(), &mut all[start..])?;
    }
    Ok(all)
}

fn same_at_any_number_of_threads(kernel: impl Fn(&dyn Backend) -> Result<Vec<u8>>) {
    for isa in Isa::available() {
        let [one, two, three] =
            [1, 2, 3].map(|threads| kernel(&CpuBackend::with_isa(isa, Some(threads))).expect("a right call"));
        assert!(!one.is_empty());
        assert!(one == two && one == three, "{isa}: other bits with more threads");
    }
}

/// The same of products, in either precision.
fn same_in_both_precisions(kernel: fn(&dyn Backend, Compute) -> Result<Vec<u8>>) {
    same_at_any_number_of_threads(|b| kernel(b, Compute::F32));
    same_at_any_number_of_threads(|b| kernel(b, Compute::Bf16));
}

const N: usize = 100_003;

#[test]
fn elementwise_kernels() {
    same_at_any_number_of_threads(|b| {
        let (x, y) = (random(b, N, 1)?, random(b, N, 2)?);
        let mut sum = zeros(b, N)?;
        b.add(x.view(), y.view(), sum.view_mut())?;
        b.add_in_place(y.view(), sum.view_mut())?;
        b.scale_in_place(1.0 / 3.0, sum.view_mut())?;
        let mut half = b.alloc(DType::Bf16, N)?;
        b.cast(sum.view(), half.view_mut())?;
        let mut copy = b.alloc(DType::Bf16, N)?;
        b.copy(half.view(), copy.view_mut())?;
        let mut dropped = zeros(b, N)?;
        b.dropout(&Dropout { probability: 0.3, seed: 5, stream: 6 }, x.view(), dropped.view_mut())?;
        let (mut gated, mut dgate, mut dup) = (zeros(b, N)?, zeros(b, N)?, zeros(b, N)?);
        b.silu_mul(x.view(), y.view(), gated.view_mut())?;
        b.silu_mul_grad(x.view(), y.view(), sum.view(), Some(dgate.view_mut()), Some(dup.view_mut()))?;
        let (mut param, mut m, mut v) = (random(b, N, 3)?, zeros(b, N)?, zeros(b, N)?);
        let step = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };
        b.adamw(&step, x.view(), param.view_mut(), m.view_mut(), v.view_mut())?;
        let mut all = bits(b, &[&sum, &copy, &dropped, &gated, &dgate, &dup, &param, &m, &v])?;
        all.extend(b.sum_squares(x.view())?.to_le_bytes());
        for f in [Activation::Relu, Activation::Silu, Activation::Tanh] {
            b.activate(f, x.view(), gated.view_mut())?;
            b.activate_grad(f, x.view(), y.view(), dgate.view_mut())?;
            all.extend(bits(b, &[&gated, &dgate])?);
        }
        let p = HardConcrete { temperature: 0.5, low: -0.1, high: 1.1, noise: Some((5, 6)) };
        all.extend(b.hard_concrete(&p, x.view(), gated.view_mut())?.to_le_bytes());
        b.hard_concrete_grad(&p, x.view(), y.view(), 0.1, dgate.view_mut())?;
        all.extend(bits(b, &[&gated, &dgate])?);
        Ok(all)
    });
}

#[test]
fn kernels_by_rows_and_columns() {
    same_at_any_number_of_threads(|b| {
        let p = Rows { rows: 1003, width: 97 };
        let (n, mut all) = (p.rows * p.width, Vec::new());
        let (x, factors, dy) = (random(b, n, 1)?, random(b, p.width, 2)?, random(b, n, 3)?);
        let (mut norms, mut y) = (zeros(b, p.rows)?, zeros(b, n)?);
        b.row_norms(&p, x.view(), norms.view_mut())?;
        b.scale_columns(&p, x.view(), factors.view(), y.view_mut())?;
        let (mut dx, mut dfactors) = (zeros(b, n)?, zeros(b, p.width)?);
        let (into, into_factors) = (Some(dx.view_mut()), Some(dfactors.view_mut()));
        b.scale_columns_grad(&p, x.view(), factors.view(), dy.view(), true, into, into_factors)?;
        all.extend(bits(b, &[&norms, &y, &dx, &dfactors])?);
        for triplets in [Triplets::Rows, Triplets::Columns] {
            let p = Importance { rows: p.rows, width: p.width, triplets, beta1: 0.85, beta2: 0.85, grad_scale: 0.5 };
            let (mut mean, mut deviation, mut scores) = (zeros(b, n)?, zeros(b, n)?, zeros(b, p.split().0)?);
            let (m, d) = (mean.view_mut(), deviation.view_mut());
            b.importance(&p, x.view(), dy.view(), m, d, scores.view_mut())?;
            all.extend(bits(b, &[&mean, &deviation, &scores])?);
        }
        Ok(all)
    });
}

#[test]
fn quantisation() {
    same_at_any_number_of_threads(|b| {
        let w = random(b, 301 * 333, 1)?;
        let mut all = Vec::new();
        for format in Format::ALL {
            let q = Quantized::quantize(b, w.view(), [301, 333], format, 64, true)?;
            let mut out = zeros(b, w.len())?;
            b.dequantize_4bit(&q, out.view_mut())?;
            all.extend(bits(b, &[&q.codes, &out])?);
        }
        let (mut codes, mut absmax) = (b.alloc(DType::U8, w.len())?, zeros(b, w.len().div_ceil(256))?);
        let mut out = zeros(b, w.len())?;
        b.quantize_8bit(DynamicMap::Signed, 256, w.view(), codes.view_mut(), absmax.view_mut())?;
        b.dequantize_8bit(DynamicMap::Signed, 256, codes.view(), absmax.view(), out.view_mut())?;
        all.extend(bits(b, &[&codes, &absmax, &out])?);
        Ok(all)
    });
}

#[test]
fn adamw_in_8_bits() {
    same_at_any_number_of_threads(|b| {
        let (mut param, blocks) = (random(b, N, 1)?, N.div_ceil(MOMENT_BLOCK));
        let [mut m_codes, mut v_codes] = [b.filled(DType::U8, N, 0.0)?, b.filled(DType::U8, N, 0.0)?];
        let [mut m_absmax, mut v_absmax] = [zeros(b, blocks)?, zeros(b, blocks)?];
        for step in 1..4 {
            let p = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
            let m = Moment { codes: m_codes.view_mut(), absmax: m_absmax.view_mut() };
            let v = Moment { codes: v_codes.view_mut(), absmax: v_absmax.view_mut() };
            b.adamw_8bit(&p, random(b, N, 1 + step)?.view(), param.view_mut(), m, v)?;
        }
        bits(b, &[&param, &m_codes, &m_absmax, &v_codes, &v_absmax])
    });
}

#[test]
fn products() {
    same_in_both_precisions(|b, compute| {
        let mut all = Vec::new();
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            let (m, n, k) = (173, 301, 333);
            let (x, y, mut c) = (random(b, m * k, 1)?, random(b, k * n, 2)?, random(b, m * n, 3)?);
            let p = MatMul { m, n, k, layout, accumulate: true, compute };
            b.matmul(&p, x.view(), y.view(), c.view_mut())?;
            all.extend(bits(b, &[&c])?);
        }
        let p = Linear { tokens: 173, inputs: 333, outputs: 301, compute };
        let (x, dy) = (random(b, p.tokens * p.inputs, 4)?, random(b, p.tokens * p.outputs, 5)?);
        let dense = random(b, p.outputs * p.inputs, 6)?;
        let quantized = Quantized::quantize(b, dense.view(), [p.outputs, p.inputs], Format::Nf4, 64, true)?;
        let (rank, scale) = (8, 2.0);
        let (a, lora_b) = (random(b, rank * p.inputs, 7)?, random(b, p.outputs * rank, 8)?);
        let (e, g) = (random(b, rank, 9)?, random(b, p.outputs, 10)?);
        let low_rank = LowRank {
            rank,
            a: a.view(),
            b: lora_b.view(),
            scale,
            per_rank: Some(e.view()),
            row_scale: Some(g.view()),
            dropout: Some(Dropout { probability: 0.2, seed: 1, stream: 2 }),
        };
        for w in [Weight::Dense(dense.view()), Weight::Quantized(&quantized)] {
            let (mut y, mut dx) = (zeros(b, dy.len())?, zeros(b, x.len())?);
            b.linear(&p, x.view(), &w, Some(&low_rank), Some(g.view()), y.view_mut())?;
            b.linear_grad_input(&p, dy.view(), &w, Some(&low_rank), false, dx.view_mut())?;
            let (mut da, mut db) = (zeros(b, a.len())?, zeros(b, lora_b.len())?);
            let (mut de, mut dg, mut d_bias) = (zeros(b, rank)?, zeros(b, p.outputs)?, zeros(b, p.outputs)?);
            let grads = LinearGrads {
                weight: None,
                bias: Some(d_bias.view_mut()),
                a: Some(da.view_mut()),
                b: Some(db.view_mut()),
                per_rank: Some(de.view_mut()),
                row_scale: Some(dg.view_mut()),
            };
            b.linear_grad_weight(&p, x.view(), dy.view(), &w, Some(&low_rank), grads)?;
            all.extend(bits(b, &[&y, &dx, &da, &db, &de, &dg, &d_bias])?);
        }
        let mut dw = zeros(b, dense.len())?;
        let grads = LinearGrads { weight: Some(dw.view_mut()), ..LinearGrads::default() };
        b.linear_grad_weight(&p, x.view(), dy.view(), &Weight::Dense(dense.view()), None, grads)?;
        all.extend(bits(b, &[&dw])?);
        Ok(all)
    });
}

/// Few tokens go another way than many: 1 to 8 and their neighbour, over weights large enough for several tasks, their
/// rows no multiple of a vector, a block or a task.
#[test]
fn products_of_few_tokens() {
    same_in_both_precisions(|b, compute| {
        let (outputs, inputs) = (701, 533);
        let dense = random(b, outputs * inputs, 1)?;
        let mut halves = b.alloc(DType::Bf16, dense.len())?;
        b.cast(dense.view(), halves.view_mut())?;
        let quantized = Quantized::quantize(b, dense.view(), [outputs, inputs], Format::Nf4, 64, true)?;
        let mut all = Vec::new();
        for tokens in [1, 2, 3, 5, 8, 9, 24, 25] {
            let p = Linear { tokens, inputs, outputs, compute };
            let (x, dy) = (random(b, tokens * inputs, 2)?, random(b, tokens * outputs, 3)?);
            for w in [Weight::Dense(dense.view()), Weight::Dense(halves.view()), Weight::Quantized(&quantized)] {
                let (mut y, mut dx) = (zeros(b, dy.len())?, random(b, x.len(), 4)?);
                b.linear(&p, x.view(), &w, None, None, y.view_mut())?;
                b.linear_grad_input(&p, dy.view(), &w, None, true, dx.view_mut())?;
                all.extend(bits(b, &[&y, &dx])?);
            }
        }
        Ok(all)
    });
}

/// Beyond one block of rows that are packed together, a token's row is what it is alone with its block's: cut anywhere
/// else, its bits are the same.
#[test]
fn many_tokens_with_an_update_are_those_of_their_parts() -> Result<()> {
    for (isa, compute) in Isa::available().into_iter().flat_map(|isa| [(isa, Compute::F32), (isa, Compute::Bf16)]) {
        let cpu = CpuBackend::with_isa(isa, Some(2));
        let b: &dyn Backend = &cpu;
        let (tokens, inputs, outputs, rank) = (1301, 70, 90, 5);
        let w = random(b, outputs * inputs, 1)?;
        let (w, a, lora_b) = (Weight::Dense(w.view()), random(b, rank * inputs, 2)?, random(b, outputs * rank, 3)?);
        let g = random(b, outputs, 4)?;
        let (a, lora_b, row_scale) = (a.view(), lora_b.view(), Some(g.view()));
        let update = LowRank { rank, a, b: lora_b, scale: 2.0, per_rank: None, row_scale, dropout: None };
        let (x, dy) = (draw(tokens * inputs, 5), draw(tokens * outputs, 6));
        let run = |rows: std::ops::Range<usize>| -> Result<[Vec<f32>; 2]> {
            let p = Linear { tokens: rows.len(), inputs, outputs, compute };
            let x = b.upload(&x[rows.start * inputs..rows.end * inputs])?;
            let dy = b.upload(&dy[rows.start * outputs..rows.end * outputs])?;
            let (mut y, mut dx) = (zeros(b, dy.len())?, b.filled(DType::F32, x.len(), 1.0)?);
            b.linear(&p, x.view(), &w, Some(&update), None, y.view_mut())?;
            b.linear_grad_input(&p, dy.view(), &w, Some(&update), true, dx.view_mut())?;
            Ok([b.download(y.view())?, b.download(dx.view())?])
        };
        let ([y, dx], parts) = (run(0..tokens)?, [run(0..400)?, run(400..tokens)?]);
        assert!(y == [&parts[0][0][..], &parts[1][0]].concat(), "{isa} {compute:?}: y");
        assert!(dx == [&parts[0][1][..], &parts[1][1]].concat(), "{isa} {compute:?}: dx");
    }
    Ok(())
}

#[test]
fn norms_and_rotations() {
    same_at_any_number_of_threads(|b| {
        let p = RmsNorm { rows: 257, width: 333, eps: 1e-5 };
        let n = p.rows * p.width;
        let (x, gain, dy) = (random(b, n, 1)?, random(b, p.width, 2)?, random(b, n, 3)?);
        let (mut y, mut inv_rms, mut dx, mut dgain) =
            (zeros(b, n)?, zeros(b, p.rows)?, random(b, n, 4)?, zeros(b, p.width)?);
        b.rms_norm(&p, x.view(), gain.view(), y.view_mut(), inv_rms.view_mut())?;
        let saved = [&x, &gain, &inv_rms, &dy].map(Buffer::view);
        let [x_view, gain_view, inv_view, dy_view] = saved;
        let (dx_view, dgain_view) = (Some(dx.view_mut()), Some(dgain.view_mut()));
        b.rms_norm_grad(&p, x_view, gain_view, inv_view, dy_view, true, dx_view, dgain_view)?;

        let r = Rope { tokens: 257, heads: 9, head_dim: 34, inverse: false };
        let angles = rankfold_backend::rope::frequencies(1e4, r.head_dim, rankfold_backend::rope::Scaling::None);
        let (cos, sin) = rankfold_backend::rope::tables(&angles, r.tokens);
        let (cos, sin) = (b.upload(&cos)?, b.upload(&sin)?);
        let positions = b.upload(&(0..r.tokens as u32).collect::<Vec<_>>())?;
        let turned_in = random(b, r.tokens * r.heads * r.head_dim, 5)?;
        let mut turned = zeros(b, turned_in.len())?;
        b.rope(&r, turned_in.view(), positions.view(), cos.view(), sin.view(), turned.view_mut())?;
        bits(b, &[&y, &inv_rms, &dx, &dgain, &turned])
    });
}

#[test]
fn attention() {
    same_in_both_precisions(|b, compute| {
        let p = Attention {
            batch: 2,
            queries: 150,
            keys: 170,
            heads: 6,
            kv_heads: 2,
            head_dim: 20,
            scale: 0.22,
            query_offset: 20,
            window: Some(130),
            compute,
        };
        let q = random(b, p.query_elements(), 1)?;
        let (k, v) = (random(b, p.key_elements(), 2)?, random(b, p.key_elements(), 3)?);
        let starts: Vec<u32> = (0..p.batch * p.queries).map(|row| if row % p.queries < 70 { 0 } else { 90 }).collect();
        let starts = b.upload(&starts)?;
        let (mut out, mut lse) = (zeros(b, q.len())?, zeros(b, p.lse_elements())?);
        b.attention(&p, q.view(), k.view(), v.view(), Some(starts.view()), out.view_mut(), lse.view_mut())?;
        let dout = random(b, q.len(), 4)?;
        let (mut dq, mut dk, mut dv) = (zeros(b, q.len())?, zeros(b, k.len())?, zeros(b, v.len())?);
        let saved = AttentionSaved {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            starts: Some(starts.view()),
            out: out.view(),
            lse: lse.view(),
        };
        let grads = AttentionGrads { dq: Some(dq.view_mut()), dk: Some(dk.view_mut()), dv: Some(dv.view_mut()) };
        b.attention_grad(&p, saved, dout.view(), grads)?;
        bits(b, &[&out, &lse, &dq, &dk, &dv])
    });
}

#[test]
fn embedding_and_cross_entropy() {
    same_at_any_number_of_threads(|b| {
        let p = Embedding { tokens: 301, vocab: 50, width: 333 };
        let ids: Vec<u32> = (0..p.tokens as u64).map(|t| philox::word(1, 1, t) % p.vocab as u32).collect();
        let (ids, table, mut rows) = (b.upload(&ids)?, random(b, 50 * 333, 1)?, zeros(b, 301 * 333)?);
        b.embedding(&p, ids.view(), table.view(), rows.view_mut())?;
        let (drows, mut dtable) = (random(b, rows.len(), 2)?, zeros(b, table.len())?);
        b.embedding_grad(&p, ids.view(), drows.view(), dtable.view_mut())?;

        let c = CrossEntropy { rows: 301, vocab: 333 };
        let labels: Vec<i64> = (0..c.rows as i64).map(|r| if r % 7 == 0 { IGNORED } else { r % 333 }).collect();
        let (labels, mut logits, mut losses) = (b.upload(&labels)?, random(b, 301 * 333, 3)?, zeros(b, c.rows)?);
        let mut again = zeros(b, c.rows)?;
        b.cross_entropy(&c, logits.view(), labels.view(), losses.view_mut())?;
        b.cross_entropy_grad_in_place(&c, 0.1, logits.view_mut(), labels.view(), again.view_mut())?;
        assert_eq!(f32::DTYPE, losses.dtype());
        bits(b, &[&rows, &dtable, &losses, &logits, &again])
    });
}
