//! The kernel of `kernels/rope.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use rankfold_backend::params::{Rope, elements};
use rankfold_backend::{DType, Error, Result, View, ViewMut};

/// y = x turned by its positions, or back.
pub(crate) fn rope(
    on: &CudaBackend,
    p: &Rope,
    x: View,
    positions: View,
    cos: View,
    sin: View,
    mut y: ViewMut,
) -> Result<()> {
    const THREADS: u32 = 256;
    let known = p.check(&x, &positions, &cos, &sin, &y)?;
    let call = &on.call("rope");
    let (x, at) = (call.f32("x", x)?, call.input("positions", DType::U32, positions)?);
    let (cos, sin, y) = (call.f32("cos", cos)?, call.f32("sin", sin)?, call.f32_mut("y", &mut y)?);
    // The kernel's indices within a token have 32 bits.
    if elements(&[p.heads, p.head_dim]) > u32::MAX as usize {
        let why = format!("{} heads of {}: expected fewer than 2³² elements a token", p.heads, p.head_dim);
        return Err(Error::Invalid { kernel: call.kernel, why });
    }
    let positions = call.on_the_host::<u32>("positions", positions)?;
    if let Some(&position) = positions.iter().find(|&&position| position as usize >= known) {
        return Err(Error::Position { position: position as usize, positions: known });
    }
    let [heads, half] = [p.heads, p.head_dim / 2].map(|n| (n as u32).into());
    let sign = if p.inverse { -1.0f32 } else { 1.0 };
    let arguments = [x, at, cos, sin, y, heads, half, sign.into()];
    call.launch("rope_f32", Grid::blocks(p.tokens, THREADS), &arguments)
}
