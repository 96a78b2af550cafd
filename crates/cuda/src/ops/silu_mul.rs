//! The kernels of `kernels/silu_mul.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use rankfold_backend::params::{expect, expect_some};
use rankfold_backend::{DType, Result, View, ViewMut};

/// out = gate · σ(gate) · up
pub(crate) fn silu_mul(on: &CudaBackend, gate: View, up: View, mut out: ViewMut) -> Result<()> {
    let (call, n) = (&on.call("silu_mul"), gate.len());
    expect(call.kernel, "up", up.len(), n)?;
    expect(call.kernel, "out", out.len(), n)?;
    let arguments = [call.f32("gate", gate)?, call.f32("up", up)?, call.f32_mut("out", &mut out)?, (n as u64).into()];
    call.launch("silu_mul_f32", Grid::stride(n), &arguments)
}

/// dgate and dup, each where asked for.
pub(crate) fn silu_mul_grad(
    on: &CudaBackend,
    gate: View,
    up: View,
    dout: View,
    mut dgate: Option<ViewMut>,
    mut dup: Option<ViewMut>,
) -> Result<()> {
    let (call, n) = (&on.call("silu_mul_grad"), gate.len());
    expect(call.kernel, "up", up.len(), n)?;
    expect(call.kernel, "dout", dout.len(), n)?;
    expect_some(call.kernel, "dgate", dgate.as_ref().map(ViewMut::len), n)?;
    expect_some(call.kernel, "dup", dup.as_ref().map(ViewMut::len), n)?;
    let arguments = [
        call.f32("gate", gate)?,
        call.f32("up", up)?,
        call.f32("dout", dout)?,
        call.some_output("dgate", DType::F32, &mut dgate)?,
        call.some_output("dup", DType::F32, &mut dup)?,
        (n as u64).into(),
    ];
    call.launch("silu_mul_grad_f32", Grid::stride(n), &arguments)
}
