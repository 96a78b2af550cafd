//! Bytes in and out, and the kernels without a formula worth a file: fill, copy, cast, scale, add, Σ x².

use crate::operands::{Kernel, to_bf16, to_f16};
use crate::storage::{Cells, NAME};
use rankfold_backend::params::expect;
use rankfold_backend::{Error, Result, View, ViewMut};

/// The bytes that a view covers.
fn bytes_of<'a>(x: View<'a>) -> Result<&'a [u8]> {
    let size = x.dtype().size();
    Ok(&x.buffer().storage::<Cells>(NAME)?.bytes()[x.offset() * size..][..x.len() * size])
}

/// The same, to write.
fn bytes_of_mut<'a>(x: &'a mut ViewMut<'_>) -> Result<&'a mut [u8]> {
    let (size, offset, len) = (x.dtype().size(), x.offset(), x.len());
    Ok(&mut x.buffer_mut().storage_mut::<Cells>(NAME)?.bytes_mut()[offset * size..][..len * size])
}

/// Host bytes into `out`.
pub(crate) fn write(bytes: &[u8], mut out: ViewMut) -> Result<()> {
    let out = bytes_of_mut(&mut out)?;
    expect("write", "bytes", bytes.len(), out.len())?;
    out.copy_from_slice(bytes);
    Ok(())
}

/// `x` into host bytes.
pub(crate) fn read(x: View, bytes: &mut [u8]) -> Result<()> {
    let x = bytes_of(x)?;
    expect("read", "bytes", bytes.len(), x.len())?;
    bytes.copy_from_slice(x);
    Ok(())
}

/// out_i = value, rounded to the element type: to nearest even, and for integers clamped to their range.
pub(crate) fn fill(value: f64, mut out: ViewMut) -> Result<()> {
    let range = out.offset()..out.offset() + out.len();
    let integer = value.round_ties_even();
    match out.buffer_mut().storage_mut::<Cells>(NAME)? {
        Cells::F32(cells) => cells[range].fill(value as f32),
        Cells::Bf16(cells) => cells[range].fill(to_bf16(value)),
        Cells::F16(cells) => cells[range].fill(to_f16(value)),
        Cells::F64(cells) => cells[range].fill(value),
        Cells::U8(cells) => cells[range].fill(integer as u8),
        Cells::U32(cells) => cells[range].fill(integer as u32),
        Cells::I64(cells) => cells[range].fill(integer as i64),
    }
    Ok(())
}

/// out = x, bit for bit; one element type.
pub(crate) fn copy(x: View, mut out: ViewMut) -> Result<()> {
    expect("copy", "out", out.len(), x.len())?;
    if x.dtype() != out.dtype() {
        let (expected, found) = (x.dtype().name(), out.dtype());
        return Err(Error::DType { kernel: "copy", tensor: "out", expected, found });
    }
    let x = bytes_of(x)?;
    bytes_of_mut(&mut out)?.copy_from_slice(x);
    Ok(())
}

/// out = x between float types.
pub(crate) fn cast(x: View, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("cast");
    expect(kernel.0, "out", out.len(), x.len())?;
    let x = kernel.floats("x", x)?;
    kernel.floats_mut("out", &mut out)?.store(x);
    Ok(())
}

/// x_i ← factor · x_i
pub(crate) fn scale_in_place(factor: f64, mut x: ViewMut) -> Result<()> {
    let mut x = Kernel("scale_in_place").floats_mut("x", &mut x)?;
    x.store(x.load().into_iter().map(|x| factor * x));
    Ok(())
}

/// out = a + b
pub(crate) fn add(a: View, b: View, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("add");
    expect(kernel.0, "b", b.len(), a.len())?;
    expect(kernel.0, "out", out.len(), a.len())?;
    let (a, b) = (kernel.floats("a", a)?, kernel.floats("b", b)?);
    kernel.floats_mut("out", &mut out)?.store(a.into_iter().zip(b).map(|(a, b)| a + b));
    Ok(())
}

/// out ← out + x
pub(crate) fn add_in_place(x: View, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("add_in_place");
    expect(kernel.0, "out", out.len(), x.len())?;
    let x = kernel.floats("x", x)?;
    kernel.floats_mut("out", &mut out)?.add(x);
    Ok(())
}

/// Σ x_i²
pub(crate) fn sum_squares(x: View) -> Result<f64> {
    Ok(Kernel("sum_squares").floats("x", x)?.into_iter().map(|x| x * x).sum())
}
