//! The kernels of `kernels/rms_norm.cu`.

use crate::call::{Call, Grid};
use crate::{Argument, CudaBackend};
use rankfold_backend::params::RmsNorm;
use rankfold_backend::{DType, Result, View, ViewMut};

/// A warp: in the sums over rows the columns of a block.
const WARP: usize = 32;

/// y and 1/ρ.
pub(crate) fn rms_norm(
    on: &CudaBackend,
    p: &RmsNorm,
    x: View,
    gain: View,
    mut y: ViewMut,
    mut inv_rms: ViewMut,
) -> Result<()> {
    p.check(&x, &gain, &y, &inv_rms)?;
    let call = &on.call("rms_norm");
    let arguments = [
        call.f32("x", x)?,
        call.f32("gain", gain)?,
        call.f32_mut("y", &mut y)?,
        call.f32_mut("inv_rms", &mut inv_rms)?,
        (p.width as u64).into(),
        (p.eps as f32).into(),
    ];
    call.launch("rms_norm_f32", Grid::a_block_a_row(p.rows, p.width), &arguments)
}

/// dx, written or added, and what is added to dgain; each where asked for.
pub(crate) fn rms_norm_grad(
    on: &CudaBackend,
    p: &RmsNorm,
    x: View,
    gain: View,
    inv_rms: View,
    dy: View,
    accumulate: bool,
    mut dx: Option<ViewMut>,
    mut dgain: Option<ViewMut>,
) -> Result<()> {
    p.check_grad(&x, &gain, &inv_rms, &dy, dx.as_ref(), dgain.as_ref())?;
    let (call, width) = (&on.call("rms_norm_grad"), Argument::from(p.width as u64));
    let (x, gain) = (call.f32("x", x)?, call.f32("gain", gain)?);
    let (inv_rms, dy) = (call.f32("inv_rms", inv_rms)?, call.f32("dy", dy)?);
    let into_x = call.some_output("dx", DType::F32, &mut dx)?;
    let into_gain = call.some_output("dgain", DType::F32, &mut dgain)?;
    if dx.is_some() {
        let arguments = [x, gain, inv_rms, dy, into_x, width, u32::from(accumulate).into()];
        call.launch("rms_norm_grad_x_f32", Grid::a_block_a_row(p.rows, p.width), &arguments)?;
    }
    if dgain.is_some() {
        grad_gain(call, p, [x, inv_rms, dy], into_gain)?;
    }
    Ok(())
}

/// dgain_i += Σ_rows dy_i x_i / ρ, from x, 1/ρ and dy.
fn grad_gain(call: &Call, p: &RmsNorm, [x, inv_rms, dy]: [Argument; 3], dgain: Argument) -> Result<()> {
    /// Below it a chunk's own sum is worth less than the launch that adds it.
    const LEAST_ROWS: usize = 64;
    /// Enough with the columns to fill a device, and few enough to be added in no time.
    const MOST_CHUNKS: usize = 256;
    const THREADS: u32 = 256;
    let chunk = p.rows.div_ceil(MOST_CHUNKS).max(LEAST_ROWS);
    let (chunks, columns) = (p.rows.div_ceil(chunk), p.width.div_ceil(WARP));
    if chunks == 0 {
        return Ok(());
    }
    let [rows, width, chunk] = [p.rows, p.width, chunk].map(|n| Argument::from(n as u64));
    let partials = call.scratch(DType::F32, chunks * p.width)?;
    let arguments = [x, inv_rms, dy, partials.output(), rows, width, chunk];
    call.launch("rms_norm_grad_gain_f32", Grid::cube([columns, chunks, 1], THREADS), &arguments)?;
    let arguments = [partials.input(), dgain, (chunks as u64).into(), width];
    call.launch("rms_norm_add_gain_f32", Grid::blocks(columns, THREADS), &arguments)
}

#[cfg(all(test, host_kernels))]
mod tests {
    use super::*;
    use rankfold_backend::Backend;

    /// Terms of 1 add up without rounding: a row that is left out, or taken twice, is seen. The last of the chunks is
    /// a short one.
    #[test]
    fn a_gains_gradient_has_every_row_once() {
        let on = CudaBackend::on_host(None).unwrap();
        let on: &dyn Backend = &on;
        let p = RmsNorm { rows: 20_001, width: 33, eps: 0.0 };
        let ones = |n| on.filled(DType::F32, n, 1.0).unwrap();
        let (x, gain, inv_rms, mut dgain) = (ones(p.rows * p.width), ones(p.width), ones(p.rows), ones(p.width));
        let (x, gain, inv_rms) = (x.view(), gain.view(), inv_rms.view());
        on.rms_norm_grad(&p, x, gain, inv_rms, x, false, None, Some(dgain.view_mut())).unwrap();
        assert_eq!(on.download::<f32>(dgain.view()).unwrap(), [20_002.0; 33]);
    }
}
