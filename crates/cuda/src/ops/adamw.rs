//! The kernels of `kernels/adamw.cu`.

use crate::call::Grid;
use crate::{Argument, CudaBackend};
use rankfold_backend::params::{AdamW, MOMENT_BLOCK, Moment};
use rankfold_backend::{DType, DynamicMap, Result, View, ViewMut};

/// The kernels' last arguments. What depends on the step alone is formed in f64 and rounded once.
fn constants(p: &AdamW) -> [Argument; 9] {
    let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
    let constants = [
        p.grad_scale,
        p.beta1,
        1.0 - p.beta1,
        p.beta2,
        1.0 - p.beta2,
        1.0 - p.lr * p.weight_decay,
        p.lr / correction(p.beta1),
        1.0 / correction(p.beta2),
        p.eps,
    ];
    constants.map(|value| (value as f32).into())
}

/// One step, in place.
pub(crate) fn adamw(
    on: &CudaBackend,
    p: &AdamW,
    grad: View,
    mut param: ViewMut,
    mut m: ViewMut,
    mut v: ViewMut,
) -> Result<()> {
    p.check(&grad, &param, &m, &v)?;
    let (call, n) = (&on.call("adamw"), grad.len());
    let tensors = [
        call.f32("grad", grad)?,
        call.f32_mut("param", &mut param)?,
        call.f32_mut("m", &mut m)?,
        call.f32_mut("v", &mut v)?,
        (n as u64).into(),
    ];
    call.launch("adamw_f32", Grid::stride(n), &[&tensors[..], &constants(p)].concat())
}

/// The same with moments in 8 bits: a block of threads a block of elements.
pub(crate) fn adamw_8bit(
    on: &CudaBackend,
    p: &AdamW,
    grad: View,
    mut param: ViewMut,
    mut m: Moment,
    mut v: Moment,
) -> Result<()> {
    p.check_8bit(&grad, &param, &m, &v)?;
    let (call, n) = (&on.call("adamw_8bit"), grad.len());
    let tensors = [
        call.f32("grad", grad)?,
        call.f32_mut("param", &mut param)?,
        call.output("m codes", DType::U8, &mut m.codes)?,
        call.f32_mut("m absmax", &mut m.absmax)?,
        call.output("v codes", DType::U8, &mut v.codes)?,
        call.f32_mut("v absmax", &mut v.absmax)?,
        (n as u64).into(),
        on.tables.map(DynamicMap::Signed),
        on.tables.midpoints(DynamicMap::Signed),
        on.tables.map(DynamicMap::Unsigned),
        on.tables.midpoints(DynamicMap::Unsigned),
    ];
    let grid = Grid::blocks(n.div_ceil(MOMENT_BLOCK), MOMENT_BLOCK as u32);
    call.launch("adamw_8bit_f32", grid, &[&tensors[..], &constants(p)].concat())
}
