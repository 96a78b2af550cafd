//! Kernels that go through their elements once: bound by memory, whatever they compute. And attention, which is not.

use crate::meter::{Case, Meter};
use crate::sizes::{Numbers, Sizes, count};
use rankfold_backend::params::{AdamW, Attention, Compute, CrossEntropy, Dropout, RmsNorm, Rope};
use rankfold_backend::{AttentionGrads, AttentionSaved, Backend, DType, Result, rope};
use rankfold_cuda::CudaBackend;

/// Additions, casts, dropout, the optimiser, and what stands between the products of a layer.
pub fn measure(backend: &CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    let (b, driver, n): (&dyn Backend, _, _) = (backend, backend.driver(), sizes.stream);
    let case = |kernel: &str, bytes| Case::new(kernel, count(n)).elements(n, bytes);
    let (x, y, z) = (numbers.f32(b, n, 0)?, numbers.f32(b, n, 1)?, numbers.f32(b, n, 2)?);
    let (x, y, z) = (x.view(), y.view(), z.view());
    let (mut out, mut more) = (b.alloc(DType::F32, n)?, b.alloc(DType::F32, n)?);

    meter.measure(driver, case("add", 12.0), |_| b.add(x, y, out.view_mut()));
    let mut half = b.alloc(DType::Bf16, n)?;
    meter.measure(driver, case("cast f32 to bf16", 6.0), |_| b.cast(x, half.view_mut()));
    meter.measure(driver, case("cast bf16 to f32", 6.0), |_| b.cast(half.view(), out.view_mut()));
    let dropout = Dropout { probability: 0.1, seed: 1, stream: 1 };
    meter.measure(driver, case("dropout", 8.0), |_| b.dropout(&dropout, x, out.view_mut()));
    meter.measure(driver, case("silu_mul", 12.0), |_| b.silu_mul(x, y, out.view_mut()));
    meter.measure(driver, case("silu_mul_grad", 20.0), |_| {
        b.silu_mul_grad(x, y, z, Some(out.view_mut()), Some(more.view_mut()))
    });

    let p = RmsNorm { rows: n / sizes.width, width: sizes.width, eps: 1e-5 };
    let (gain, mut inv_rms) = (numbers.f32(b, p.width, 3)?, b.alloc(DType::F32, p.rows)?);
    let mut gain_grad = b.filled(DType::F32, p.width, 0.0)?;
    let a_row = 4.0 / p.width as f64;
    meter.measure(driver, case("rms_norm", 8.0 + a_row), |_| {
        b.rms_norm(&p, x, gain.view(), out.view_mut(), inv_rms.view_mut())
    });
    meter.measure(driver, case("rms_norm_grad dx", 12.0 + a_row), |_| {
        b.rms_norm_grad(&p, x, gain.view(), inv_rms.view(), y, false, Some(out.view_mut()), None)
    });
    meter.measure(driver, case("rms_norm_grad dgain", 8.0 + a_row), |_| {
        b.rms_norm_grad(&p, x, gain.view(), inv_rms.view(), y, false, None, Some(gain_grad.view_mut()))
    });

    let head_dim = sizes.width / sizes.heads;
    let p = Rope { tokens: n / sizes.width, heads: sizes.heads, head_dim, inverse: false };
    let (cos, sin) = rope::tables(&rope::frequencies(1e4, head_dim, rope::Scaling::None), sizes.positions);
    let (cos, sin) = (b.upload(&cos)?, b.upload(&sin)?);
    let positions = b.upload(&(0..p.tokens).map(|t| (t % sizes.positions) as u32).collect::<Vec<_>>())?;
    meter.measure(driver, case("rope", 8.0), |_| {
        b.rope(&p, x, positions.view(), cos.view(), sin.view(), out.view_mut())
    });

    let p = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 9, grad_scale: 1.0 };
    let mut v = b.filled(DType::F32, n, 1.0)?;
    meter.measure(driver, case("adamw", 28.0), |_| b.adamw(&p, x, out.view_mut(), more.view_mut(), v.view_mut()));
    cross_entropy(backend, meter, sizes, numbers)
}

fn cross_entropy(backend: &CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    let (b, driver, [rows, vocab]): (&dyn Backend, _, _) = (backend, backend.driver(), sizes.logits);
    let p = CrossEntropy { rows, vocab };
    let mut logits = numbers.f32(b, rows * vocab, 0)?;
    let labels = b.upload(&(0..rows).map(|row| (row * 7919 % vocab) as i64).collect::<Vec<_>>())?;
    let mut losses = b.alloc(DType::F32, rows)?;
    let case = |kernel: &str, bytes| Case::new(kernel, format!("{rows}x{vocab}")).elements(rows * vocab, bytes);
    meter.measure(driver, case("cross_entropy", 4.0), |_| {
        b.cross_entropy(&p, logits.view(), labels.view(), losses.view_mut())
    });
    // Each call takes the gradient that the last one left for logits: numbers like others.
    meter.measure(driver, case("cross_entropy_grad_in_place", 8.0), |_| {
        b.cross_entropy_grad_in_place(&p, 1.0, logits.view_mut(), labels.view(), losses.view_mut())
    });
    Ok(())
}

/// Causal attention of one sequence. Operations are those of the pairs that see each other, about half of all: two
/// products forward, five backward (FlashAttention-2's count, whatever is formed twice).
pub fn attention(backend: &CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    let (b, driver): (&dyn Backend, _) = (backend, backend.driver());
    let (positions, heads) = (sizes.positions, sizes.heads);
    for &head_dim in sizes.head_dims {
        let mut p = Attention {
            batch: 1,
            queries: positions,
            keys: positions,
            heads,
            kv_heads: heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            query_offset: 0,
            window: None,
            compute: Compute::F32,
        };
        let n = p.query_elements();
        let [q, k, v, dout] = [0, 1, 2, 3].map(|i| numbers.f32(b, n, 7919 * i));
        let (q, k, v, dout) = (q?, k?, v?, dout?);
        let (mut out, mut lse) = (b.alloc(DType::F32, n)?, b.alloc(DType::F32, p.lse_elements())?);
        let [dq, dk, dv] = [n; 3].map(|n| b.alloc(DType::F32, n));
        let (mut dq, mut dk, mut dv) = (dq?, dk?, dv?);
        let product = positions * (positions + 1) * head_dim * heads;
        for (compute, dtype) in [(Compute::F32, DType::F32), (Compute::Bf16, DType::Bf16)] {
            p.compute = compute;
            let case = |kernel: &str, tensors: usize, products: usize| {
                let case = Case::new(kernel, format!("{heads} heads of {head_dim}")).with("tokens", positions);
                let case = case.with("compute", dtype.name());
                case.bytes(4 * (tensors * n + p.lse_elements())).flops(products * product, dtype)
            };
            meter.measure(driver, case("attention", 4, 2), |_| {
                b.attention(&p, q.view(), k.view(), v.view(), None, out.view_mut(), lse.view_mut())
            });
            let (q, k, v, starts) = (q.view(), k.view(), v.view(), None);
            let saved = AttentionSaved { q, k, v, starts, out: out.view(), lse: lse.view() };
            meter.measure(driver, case("attention_grad", 8, 5), |_| {
                let (dq, dk, dv) = (Some(dq.view_mut()), Some(dk.view_mut()), Some(dv.view_mut()));
                b.attention_grad(&p, saved, dout.view(), AttentionGrads { dq, dk, dv })
            });
        }
    }
    Ok(())
}
