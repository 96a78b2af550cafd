//! The kernels of `kernels/activate.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use rankfold_backend::params::Activation;
use rankfold_backend::{Result, View, ViewMut};

/// y = f(x)
pub(crate) fn activate(on: &CudaBackend, f: Activation, x: View, mut y: ViewMut) -> Result<()> {
    f.check(&x, &y)?;
    let (call, n) = (&on.call("activate"), x.len());
    let kernel = match f {
        Activation::Relu => "relu_f32",
        Activation::Silu => "silu_f32",
        Activation::Tanh => "tanh_f32",
    };
    call.launch(kernel, Grid::stride(n), &[call.f32("x", x)?, call.f32_mut("y", &mut y)?, (n as u64).into()])
}

/// dx = dy · f'(x)
pub(crate) fn activate_grad(on: &CudaBackend, f: Activation, x: View, dy: View, mut dx: ViewMut) -> Result<()> {
    f.check_grad(&x, &dy, &dx)?;
    let (call, n) = (&on.call("activate_grad"), x.len());
    let kernel = match f {
        Activation::Relu => "relu_grad_f32",
        Activation::Silu => "silu_grad_f32",
        Activation::Tanh => "tanh_grad_f32",
    };
    let arguments = [call.f32("x", x)?, call.f32("dy", dy)?, call.f32_mut("dx", &mut dx)?, (n as u64).into()];
    call.launch(kernel, Grid::stride(n), &arguments)
}
