//! Bytes in and out, and the kernels of `kernels/elementwise.cu`.

use crate::call::{Call, Grid};
use crate::memory::BufferMemory;
use crate::{Argument, CudaBackend, NAME};
use half::{bf16, f16};
use rankfold_backend::params::expect;
use rankfold_backend::{DType, Error, Result, View, ViewMut};

/// Host bytes into `out`.
pub(crate) fn write(on: &CudaBackend, bytes: &[u8], mut out: ViewMut) -> Result<()> {
    let call = &on.call("write");
    expect(call.kernel, "bytes", bytes.len(), out.len() * out.dtype().size())?;
    let to = call.at_mut("out", &mut out)?;
    call.driver().upload(bytes, to)?;
    let whole = out.len() == out.buffer_mut().len();
    if whole && matches!(out.dtype(), DType::U32 | DType::I64) {
        out.buffer_mut().storage_mut::<BufferMemory>(NAME)?.remember(bytes);
    }
    Ok(())
}

/// `x` into host bytes.
pub(crate) fn read(on: &CudaBackend, x: View, bytes: &mut [u8]) -> Result<()> {
    let call = &on.call("read");
    expect(call.kernel, "bytes", bytes.len(), x.len() * x.dtype().size())?;
    let from = call.at("x", x)?;
    Ok(call.driver().download(from, bytes)?)
}

/// A value's bits once it is rounded to a type: to nearest even, and for integers clamped to their range.
fn bits(value: f64, dtype: DType) -> u64 {
    let integer = value.round_ties_even();
    // `half` cuts an f64 to 32 bits before it rounds; by way of an f32 that is rounded to odd, it rounds once.
    let odd = |value: f64| {
        let near = value as f32;
        let exact = f64::from(near) == value || value.is_nan();
        let toward_zero = if f64::from(near).abs() > value.abs() { f32::from_bits(near.to_bits() - 1) } else { near };
        if exact { near } else { f32::from_bits(toward_zero.to_bits() | 1) }
    };
    match dtype {
        DType::F32 => (value as f32).to_bits().into(),
        DType::F64 => value.to_bits(),
        DType::Bf16 => bf16::from_f32(odd(value)).to_bits().into(),
        DType::F16 => f16::from_f32(odd(value)).to_bits().into(),
        DType::U8 => u64::from(integer as u8),
        DType::U32 => u64::from(integer as u32),
        DType::I64 => integer as i64 as u64,
    }
}

/// out_i = value.
pub(crate) fn fill(on: &CudaBackend, value: f64, mut out: ViewMut) -> Result<()> {
    let call = &on.call("fill");
    let (n, size) = (out.len(), out.dtype().size());
    let (bits, to) = (Argument::bits(size, bits(value, out.dtype())), call.at_mut("out", &mut out)?);
    let kernel = match size {
        1 => "fill_u8",
        2 => "fill_u16",
        4 => "fill_u32",
        _ => "fill_u64",
    };
    call.launch(kernel, Grid::stride(n), &[bits, Argument::output_bits(size, to), (n as u64).into()])
}

/// out = x, bit for bit; one element type.
pub(crate) fn copy(on: &CudaBackend, x: View, mut out: ViewMut) -> Result<()> {
    expect("copy", "out", out.len(), x.len())?;
    if out.dtype() != x.dtype() {
        let (expected, found) = (x.dtype().name(), out.dtype());
        return Err(Error::DType { kernel: "copy", tensor: "out", expected, found });
    }
    let call = &on.call("copy");
    let (from, to) = (call.at("x", x)?, call.at_mut("out", &mut out)?);
    Ok(call.driver().copy(from, to, x.len() * x.dtype().size())?)
}

/// The entry point that casts from one type to another; none where they are one.
fn cast_kernel(from: DType, to: DType) -> Option<&'static str> {
    match (from, to) {
        (DType::F32, DType::Bf16) => Some("cast_f32_bf16"),
        (DType::F32, DType::F16) => Some("cast_f32_f16"),
        (DType::Bf16, DType::F32) => Some("cast_bf16_f32"),
        (DType::Bf16, DType::F16) => Some("cast_bf16_f16"),
        (DType::F16, DType::F32) => Some("cast_f16_f32"),
        (DType::F16, DType::Bf16) => Some("cast_f16_bf16"),
        _ => None,
    }
}

/// Casts `n` elements from address to address, between float types.
pub(crate) fn cast_at(call: &Call, from: (DType, u64), to: (DType, u64), n: usize) -> Result<()> {
    match cast_kernel(from.0, to.0) {
        None => Ok(call.driver().copy(from.1, to.1, n * from.0.size())?),
        Some(kernel) => {
            let arguments = [Argument::input(from.0, from.1), Argument::output(to.0, to.1), (n as u64).into()];
            call.launch(kernel, Grid::stride(n), &arguments)
        }
    }
}

/// out = x between float types.
pub(crate) fn cast(on: &CudaBackend, x: View, mut out: ViewMut) -> Result<()> {
    let call = &on.call("cast");
    expect("cast", "out", out.len(), x.len())?;
    call.float("x", x.dtype())?;
    call.float("out", out.dtype())?;
    let (from, to) = ((x.dtype(), call.at("x", x)?), (out.dtype(), call.at_mut("out", &mut out)?));
    cast_at(call, from, to, x.len())
}

/// x_i ← factor · x_i
pub(crate) fn scale_in_place(on: &CudaBackend, factor: f64, mut x: ViewMut) -> Result<()> {
    let (call, n) = (&on.call("scale_in_place"), x.len());
    let arguments = [(factor as f32).into(), call.f32_mut("x", &mut x)?, (n as u64).into()];
    call.launch("scale_f32", Grid::stride(n), &arguments)
}

/// out = a + b
pub(crate) fn add(on: &CudaBackend, a: View, b: View, mut out: ViewMut) -> Result<()> {
    let (call, n) = (&on.call("add"), a.len());
    expect("add", "b", b.len(), n)?;
    expect("add", "out", out.len(), n)?;
    let arguments = [call.f32("a", a)?, call.f32("b", b)?, call.f32_mut("out", &mut out)?, (n as u64).into()];
    call.launch("add_f32", Grid::stride(n), &arguments)
}

/// out = a / b, 0 where b is
pub(crate) fn divide(on: &CudaBackend, a: View, b: View, mut out: ViewMut) -> Result<()> {
    let (call, n) = (&on.call("divide"), a.len());
    expect("divide", "b", b.len(), n)?;
    expect("divide", "out", out.len(), n)?;
    let arguments = [call.f32("a", a)?, call.f32("b", b)?, call.f32_mut("out", &mut out)?, (n as u64).into()];
    call.launch("divide_f32", Grid::stride(n), &arguments)
}

/// out ← out + x
pub(crate) fn add_in_place(on: &CudaBackend, x: View, mut out: ViewMut) -> Result<()> {
    let (call, n) = (&on.call("add_in_place"), x.len());
    expect("add_in_place", "out", out.len(), n)?;
    let arguments = [call.f32("x", x)?, call.f32_mut("out", &mut out)?, (n as u64).into()];
    call.launch("add_in_place_f32", Grid::stride(n), &arguments)
}

/// Σ x_i², by chunks of a fixed size.
pub(crate) fn sum_squares(on: &CudaBackend, x: View) -> Result<f64> {
    const CHUNK: usize = 4096;
    const THREADS: u32 = 256;
    let (call, n) = (&on.call("sum_squares"), x.len());
    let (x, chunks) = (call.f32("x", x)?, n.div_ceil(CHUNK));
    // The partials, and the sum behind them.
    let sums = call.scratch(DType::F64, chunks + 1)?;
    let partials = [x, (n as u64).into(), (CHUNK as u64).into(), sums.output()];
    call.launch("sum_squares_f32", Grid::blocks(chunks, THREADS), &partials)?;
    let total = [sums.input(), (chunks as u64).into(), Argument::output(DType::F64, sums.at(chunks))];
    call.launch("sum_f64", Grid::blocks(1, THREADS), &total)?;
    let mut sum = 0f64;
    call.driver().download(sums.at(chunks), bytemuck::bytes_of_mut(&mut sum))?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 + 2⁻⁸ is a tie of bf16 and goes to 1; a step of f64 above it does not.
    #[test]
    fn a_value_is_rounded_once() {
        let tie = 1.0 + 2f64.powi(-8);
        assert_eq!(bits(tie, DType::Bf16), u64::from(bf16::ONE.to_bits()));
        assert_eq!(bits(tie + f64::EPSILON, DType::Bf16), u64::from(bf16::ONE.to_bits()) + 1);
        assert_eq!(bits(tie - f64::EPSILON, DType::Bf16), u64::from(bf16::ONE.to_bits()));
        assert_eq!(bits(-1e39, DType::F16), u64::from(f16::NEG_INFINITY.to_bits()));
        assert_eq!(bits(1e9, DType::U8), 255);
    }
}
