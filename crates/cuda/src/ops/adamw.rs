//! The kernel of `kernels/adamw.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use rankfold_backend::params::AdamW;
use rankfold_backend::{Result, View, ViewMut};

/// One step, in place. What depends on the step alone is formed in f64 and rounded once.
pub(crate) fn adamw(
    on: &CudaBackend,
    p: &AdamW,
    grad: View,
    mut param: ViewMut,
    mut m: ViewMut,
    mut v: ViewMut,
) -> Result<()> {
    p.check(&grad, &param, &m, &v)?;
    let (call, n) = (on.call("adamw"), grad.len());
    let correction = |beta: f64| 1.0 - beta.powf(p.step as f64);
    let constant = |value: f64| (value as f32).into();
    let arguments = [
        call.f32("grad", grad)?,
        call.f32_mut("param", &mut param)?,
        call.f32_mut("m", &mut m)?,
        call.f32_mut("v", &mut v)?,
        (n as u64).into(),
        constant(p.grad_scale),
        constant(p.beta1),
        constant(1.0 - p.beta1),
        constant(p.beta2),
        constant(1.0 - p.beta2),
        constant(1.0 - p.lr * p.weight_decay),
        constant(p.lr / correction(p.beta1)),
        constant(1.0 / correction(p.beta2)),
        constant(p.eps),
    ];
    call.launch("adamw_f32", Grid::stride(n), &arguments)
}
