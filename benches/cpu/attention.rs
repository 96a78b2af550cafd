//! Causal attention. Operations are those of the pairs that see each other, about half of all: two products forward,
//! five backward (FlashAttention-2's count, whatever is formed twice).

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::params::{Attention, Compute};
use rankfold_backend::{AttentionGrads, AttentionSaved, Backend, DType, Result};

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let [batch, positions, heads, kv_heads, head_dim] = size.attention;
    for (name, compute) in [("f32", Compute::F32), ("bf16", Compute::Bf16)] {
        let p = Attention {
            batch,
            queries: positions,
            keys: positions,
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            query_offset: 0,
            window: None,
            compute,
        };
        let (queries, keys, lse) = (p.query_elements(), p.key_elements(), p.lse_elements());
        let product = batch * heads * positions * (positions + 1) * head_dim;
        let cost = Cost { products: Some((2 * product, compute)), ..Cost::f32s(queries + 2 * keys, queries + lse) };
        meter.measure(&format!("attention in {name}"), cost, || {
            let (q, k, v) = (numbers.f32(b, queries)?, numbers.f32(b, keys)?, numbers.f32(b, keys)?);
            let (mut out, mut log_sums) = (b.alloc(DType::F32, queries)?, b.alloc(DType::F32, lse)?);
            Ok(move || b.attention(&p, q.view(), k.view(), v.view(), None, out.view_mut(), log_sums.view_mut()))
        });
        let cost = Cost::f32s(3 * queries + 2 * keys + lse, queries + 2 * keys);
        let cost = Cost { products: Some((5 * product, compute)), ..cost };
        meter.measure(&format!("attention_grad in {name}"), cost, || {
            let (q, k, v) = (numbers.f32(b, queries)?, numbers.f32(b, keys)?, numbers.f32(b, keys)?);
            let (mut out, mut log_sums) = (b.alloc(DType::F32, queries)?, b.alloc(DType::F32, lse)?);
            b.attention(&p, q.view(), k.view(), v.view(), None, out.view_mut(), log_sums.view_mut())?;
            let dout = numbers.f32(b, queries)?;
            let (mut dq, mut dk, mut dv) =
                (b.alloc(DType::F32, queries)?, b.alloc(DType::F32, keys)?, b.alloc(DType::F32, keys)?);
            Ok(move || {
                let (q, k, v, out, lse) = (q.view(), k.view(), v.view(), out.view(), log_sums.view());
                let saved = AttentionSaved { q, k, v, starts: None, out, lse };
                let (dq, dk, dv) = (Some(dq.view_mut()), Some(dk.view_mut()), Some(dv.view_mut()));
                b.attention_grad(&p, saved, dout.view(), AttentionGrads { dq, dk, dv })
            })
        });
    }
    Ok(())
}
