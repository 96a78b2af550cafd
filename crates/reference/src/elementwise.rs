//! Bytes in and out, and the kernels without a formula worth a file: fill, copy, cast, scale, add, Σ x².

use crate::operands::{Kernel, to_bf16, to_f16};
use crate::storage::{Cells, NAME};
use rankfold_backend::params::expect;
use rankfold_backend::{Error, Result, View, ViewMut};

/// The bytes that a view covers.
fn bytes_of<'a>(x: View<'a>) -> Result<&'a [u8]> {
    Ok(&x.buffer().storage::<Cells>(NAME)?.bytes()[x.bytes()])
}

/// The same, to write.
fn bytes_of_mut<'a>(x: &'a mut ViewMut<'_>) -> Result<&'a mut [u8]> {
    let part = x.as_view().bytes();
    Ok(&mut x.buffer_mut().storage_mut::<Cells>(NAME)?.bytes_mut()[part])
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

/// out = a / b, 0 where b is
pub(crate) fn divide(a: View, b: View, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("divide");
    expect(kernel.0, "b", b.len(), a.len())?;
    expect(kernel.0, "out", out.len(), a.len())?;
    let (a, b) = (kernel.floats("a", a)?, kernel.floats("b", b)?);
    let quotient = |(a, b): (f64, f64)| if b == 0.0 { 0.0 } else { a / b };
    kernel.floats_mut("out", &mut out)?.store(a.into_iter().zip(b).map(quotient));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, buffer, values};
    use half::bf16;
    use rankfold_backend::{Buffer, DType, Storage};
    use std::any::Any;

    #[test]
    fn bytes_go_in_and_come_out_of_a_slice_alone() {
        let mut x = BACKEND.upload(&[1u32, 2, 3, 4]).unwrap();
        BACKEND.write(bytemuck::bytes_of(&[8u32, 9]), x.slice_mut(1, 2).unwrap()).unwrap();
        assert_eq!(BACKEND.download::<u32>(x.view()).unwrap(), [1, 8, 9, 4]);
        assert_eq!(BACKEND.download::<u32>(x.slice(2, 2).unwrap()).unwrap(), [9, 4]);
        let error = BACKEND.write(&[0; 3], x.slice_mut(1, 1).unwrap()).unwrap_err();
        assert_eq!(error, Error::Length { kernel: "write", tensor: "bytes", expected: 4, found: 3 });
        assert!(BACKEND.read(x.view(), &mut [0; 3]).is_err());
        BACKEND.host_bytes_mut(&mut x).unwrap().unwrap()[4..8].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(BACKEND.download::<u32>(x.view()).unwrap(), [1, 7, 9, 4]);
    }

    #[test]
    fn a_fill_is_rounded_to_the_element_type() {
        let filled = |dtype, value| BACKEND.filled(dtype, 1, value).unwrap();
        assert_eq!(BACKEND.download::<f32>(filled(DType::F32, 0.1).view()).unwrap(), [0.1]);
        assert_eq!(BACKEND.download::<f64>(filled(DType::F64, 0.1).view()).unwrap(), [0.1]);
        assert_eq!(BACKEND.download::<bf16>(filled(DType::Bf16, 0.1).view()).unwrap(), [bf16::from_f32(0.1)]);
        assert_eq!(BACKEND.download::<i64>(filled(DType::I64, -100.0).view()).unwrap(), [-100]);
        assert_eq!(BACKEND.download::<u8>(filled(DType::U8, 1e9).view()).unwrap(), [255]);
        assert_eq!(BACKEND.download::<u32>(filled(DType::U32, 2.5).view()).unwrap(), [2]);
    }

    #[test]
    fn sums_in_place_are_rounded_once() {
        let mut x = buffer(&[1.0, -2.0]);
        BACKEND.scale_in_place(0.1, x.view_mut()).unwrap();
        assert_eq!(values(&x), [0.1, -0.2]);
        BACKEND.add_in_place(buffer(&[1.0, 1.0]).view(), x.view_mut()).unwrap();
        assert_eq!(values(&x), [1.1, 0.8]);
        assert_eq!(BACKEND.sum_squares(buffer(&[3.0, 4.0]).view()).unwrap(), 25.0);

        // 1 + 2⁻⁸ is a tie in bf16, which goes to 1; 2⁻³⁰ more is above it, though f32 cannot hold the sum.
        let mut y = BACKEND.upload(&[bf16::ONE]).unwrap();
        BACKEND.add_in_place(buffer(&[2f64.powi(-8) + 2f64.powi(-30)]).view(), y.view_mut()).unwrap();
        assert_eq!(BACKEND.download::<bf16>(y.view()).unwrap(), [bf16::from_f32(1.0 + 2f32.powi(-7))]);
    }

    #[test]
    fn a_copy_keeps_every_bit_and_the_type() {
        let nan = f32::from_bits(0x7fa0_0001);
        let x = BACKEND.upload(&[nan, -0.0]).unwrap();
        let mut out = BACKEND.upload(&[0.0f32; 2]).unwrap();
        BACKEND.copy(x.view(), out.view_mut()).unwrap();
        let bits: Vec<u32> = BACKEND.download::<f32>(out.view()).unwrap().into_iter().map(f32::to_bits).collect();
        assert_eq!(bits, [0x7fa0_0001, 0x8000_0000]);
        let error = BACKEND.copy(x.view(), buffer(&[0.0; 2]).view_mut()).unwrap_err();
        assert_eq!(error, Error::DType { kernel: "copy", tensor: "out", expected: "f32", found: DType::F64 });
    }

    #[test]
    fn a_buffer_of_another_backend_is_refused() {
        #[derive(Debug)]
        struct Elsewhere;
        impl Storage for Elsewhere {
            fn as_any(&self) -> &dyn Any {
                self
            }
            fn as_any_mut(&mut self) -> &mut dyn Any {
                self
            }
        }
        let mut foreign = Buffer::new(Elsewhere, DType::F32, 2);
        let refusal = Error::Foreign { backend: "reference" };
        assert_eq!(BACKEND.sum_squares(foreign.view()).unwrap_err(), refusal);
        assert_eq!(BACKEND.fill(0.0, foreign.view_mut()).unwrap_err(), refusal);
        assert_eq!(BACKEND.scale_in_place(1.0, foreign.view_mut()).unwrap_err(), refusal);
        assert_eq!(BACKEND.read(foreign.view(), &mut [0; 8]).unwrap_err(), refusal);
        assert_eq!(BACKEND.host_bytes_mut(&mut foreign).unwrap_err(), refusal);
    }
}
