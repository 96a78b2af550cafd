//! Kernels that go through activations once, between the products of a layer.

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::params::{Dropout, RmsNorm, Rope};
use rankfold_backend::{Backend, DType, Result, rope};

const HEAD_DIM: usize = 64;

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let (n, rows, width) = (size.elements(), size.tokens, size.width);

    let p = RmsNorm { rows, width, eps: 1e-5 };
    meter.measure("rms_norm", Cost::f32s(n + width, n + rows), || {
        let (x, gain) = (numbers.f32(b, n)?, numbers.f32(b, width)?);
        let (mut y, mut inv_rms) = (b.alloc(DType::F32, n)?, b.alloc(DType::F32, rows)?);
        Ok(move || b.rms_norm(&p, x.view(), gain.view(), y.view_mut(), inv_rms.view_mut()))
    });
    meter.measure("rms_norm_grad", Cost::f32s(2 * n + 2 * width + rows, n + width), || {
        let (x, dy, gain) = (numbers.f32(b, n)?, numbers.f32(b, n)?, numbers.f32(b, width)?);
        let inv_rms = b.filled(DType::F32, rows, 1.0)?;
        let (mut dx, mut dgain) = (b.alloc(DType::F32, n)?, b.filled(DType::F32, width, 0.0)?);
        Ok(move || {
            let (dx, dgain) = (Some(dx.view_mut()), Some(dgain.view_mut()));
            b.rms_norm_grad(&p, x.view(), gain.view(), inv_rms.view(), dy.view(), false, dx, dgain)
        })
    });

    let p = Rope { tokens: rows, heads: width / HEAD_DIM, head_dim: HEAD_DIM, inverse: false };
    let known = size.attention[1];
    meter.measure("rope", Cost::f32s(n + known * HEAD_DIM + rows, n), || {
        let (cos, sin) = rope::tables(&rope::frequencies(1e4, HEAD_DIM, rope::Scaling::None), known);
        let (cos, sin) = (b.upload(&cos)?, b.upload(&sin)?);
        let positions = b.upload(&(0..rows).map(|t| (t % known) as u32).collect::<Vec<_>>())?;
        let (x, mut y) = (numbers.f32(b, n)?, b.alloc(DType::F32, n)?);
        Ok(move || b.rope(&p, x.view(), positions.view(), cos.view(), sin.view(), y.view_mut()))
    });

    meter.measure("silu_mul", Cost::f32s(2 * n, n), || {
        let (gate, up, mut out) = (numbers.f32(b, n)?, numbers.f32(b, n)?, b.alloc(DType::F32, n)?);
        Ok(move || b.silu_mul(gate.view(), up.view(), out.view_mut()))
    });
    meter.measure("silu_mul_grad", Cost::f32s(3 * n, 2 * n), || {
        let (gate, up, dout) = (numbers.f32(b, n)?, numbers.f32(b, n)?, numbers.f32(b, n)?);
        let (mut dgate, mut dup) = (b.alloc(DType::F32, n)?, b.alloc(DType::F32, n)?);
        Ok(move || {
            let (dgate, dup) = (Some(dgate.view_mut()), Some(dup.view_mut()));
            b.silu_mul_grad(gate.view(), up.view(), dout.view(), dgate, dup)
        })
    });

    let p = Dropout { probability: 0.1, seed: 1, stream: 1 };
    meter.measure("dropout", Cost::f32s(n, n), || {
        let (x, mut y) = (numbers.f32(b, n)?, b.alloc(DType::F32, n)?);
        Ok(move || b.dropout(&p, x.view(), y.view_mut()))
    });
    meter.measure("add_in_place", Cost::f32s(2 * n, n), || {
        let (x, mut out) = (numbers.f32(b, n)?, b.filled(DType::F32, n, 0.0)?);
        Ok(move || b.add_in_place(x.view(), out.view_mut()))
    });
    Ok(())
}
