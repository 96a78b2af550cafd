//! What goes through the parameters once a step: the norm of their gradients, and AdamW, with moments in 32 bits and
//! in 8.

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::params::{AdamW, MOMENT_BLOCK, Moment};
use rankfold_backend::{Backend, DType, Result};

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let n = size.parameters;
    meter.measure("sum_squares", Cost::f32s(n, 0), || {
        let x = numbers.f32(b, n)?;
        Ok(move || b.sum_squares(x.view()).map(drop))
    });

    let p = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 9, grad_scale: 1.0 };
    meter.measure("adamw", Cost::f32s(4 * n, 3 * n), || {
        let (grad, mut param, mut m) = (numbers.f32(b, n)?, numbers.f32(b, n)?, numbers.f32(b, n)?);
        let mut v = b.filled(DType::F32, n, 1.0)?;
        Ok(move || b.adamw(&p, grad.view(), param.view_mut(), m.view_mut(), v.view_mut()))
    });
    let blocks = n.div_ceil(MOMENT_BLOCK);
    // Two codes of a byte an element, and two scales a block.
    let moments = 2 * n + 2 * size_of::<f32>() * blocks;
    let cost = Cost::f32s(2 * n, n);
    let cost = Cost { read: cost.read + moments, written: cost.written + moments, ..cost };
    meter.measure("adamw_8bit", cost, || {
        let (grad, mut param) = (numbers.f32(b, n)?, numbers.f32(b, n)?);
        let code = |code| b.filled(DType::U8, n, code);
        let (mut m, mut v) = (code(200.0)?, code(100.0)?);
        let (mut m_scale, mut v_scale) = (b.filled(DType::F32, blocks, 1.0)?, b.filled(DType::F32, blocks, 1.0)?);
        Ok(move || {
            let m = Moment { codes: m.view_mut(), absmax: m_scale.view_mut() };
            let v = Moment { codes: v.view_mut(), absmax: v_scale.view_mut() };
            b.adamw_8bit(&p, grad.view(), param.view_mut(), m, v)
        })
    });
    Ok(())
}
