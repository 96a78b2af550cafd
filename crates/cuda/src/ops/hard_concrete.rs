//! The kernels of `kernels/hard_concrete.cu`.

use crate::call::Grid;
use crate::{Argument, CudaBackend};
use rankfold_backend::params::HardConcrete;
use rankfold_backend::{DType, Result, View, ViewMut};

/// Gates that a thread has at a time, from one draw of four words.
const GROUP: usize = 4;

/// The kernels' last arguments. What depends on the parameters alone is formed in f64 and rounded once.
fn constants(p: &HardConcrete) -> [Argument; 7] {
    let (seed, stream) = p.noise.unwrap_or_default();
    let inner = if p.noise.is_some() { 1.0 / p.temperature } else { 1.0 };
    let shift = p.temperature * (-p.low / p.high).ln();
    let [inner, span, low, shift] = [inner, p.high - p.low, p.low, shift].map(|x| (x as f32).into());
    [u32::from(p.noise.is_some()).into(), seed.into(), stream.into(), inner, span, low, shift]
}

/// z, and Σ P(z ≠ 0), by chunks of a fixed size.
pub(crate) fn hard_concrete(on: &CudaBackend, p: &HardConcrete, log_alpha: View, mut z: ViewMut) -> Result<f64> {
    const CHUNK: usize = 4096;
    const THREADS: u32 = 256;
    p.check(&log_alpha, &z)?;
    let (call, n) = (&on.call("hard_concrete"), log_alpha.len());
    let (log_alpha, z, chunks) = (call.f32("log_alpha", log_alpha)?, call.f32_mut("z", &mut z)?, n.div_ceil(CHUNK));
    // The partials, and the sum behind them.
    let sums = call.scratch(DType::F64, chunks + 1)?;
    let tensors = [log_alpha, z, sums.output(), (n as u64).into(), (CHUNK as u64).into()];
    let arguments = [&tensors[..], &constants(p)].concat();
    call.launch("hard_concrete_f32", Grid::blocks(chunks, THREADS), &arguments)?;
    let total = [sums.input(), (chunks as u64).into(), Argument::output(DType::F64, sums.at(chunks))];
    call.launch("sum_f64", Grid::blocks(1, THREADS), &total)?;
    let mut open = 0f64;
    call.driver().download(sums.at(chunks), bytemuck::bytes_of_mut(&mut open))?;
    Ok(open)
}

/// What is added to dlogα.
pub(crate) fn hard_concrete_grad(
    on: &CudaBackend,
    p: &HardConcrete,
    log_alpha: View,
    dz: View,
    penalty: f64,
    mut dlog_alpha: ViewMut,
) -> Result<()> {
    p.check_grad(&log_alpha, &dz, &dlog_alpha)?;
    let (call, n) = (&on.call("hard_concrete_grad"), dz.len());
    let tensors = [
        call.f32("log_alpha", log_alpha)?,
        call.f32("dz", dz)?,
        call.f32_mut("dlog_alpha", &mut dlog_alpha)?,
        (n as u64).into(),
        (penalty as f32).into(),
    ];
    let arguments = [&tensors[..], &constants(p)].concat();
    call.launch("hard_concrete_grad_f32", Grid::stride(n.div_ceil(GROUP)), &arguments)
}
