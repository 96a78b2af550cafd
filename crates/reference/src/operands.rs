//! How kernels read and write: every float as f64, and one rounding at the end.
//!
//! A kernel reads its inputs with [`Kernel::floats`], computes in f64, and stores through [`FloatsMut`], which
//! rounds each result once, to nearest even, to the element type of the output. All operands are read and checked
//! before anything is stored, so a call that fails has written nothing.

use crate::storage::{Cells, NAME};
use half::{bf16, f16};
use rankfold_backend::{Element, Error, Result, View, ViewMut};
use std::ops::Range;

/// A kernel's name, for its errors.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(pub(crate) &'static str);

const A_FLOAT: &str = "f32, bf16, f16 or f64";

impl Kernel {
    /// The elements of a float view, exactly.
    pub(crate) fn floats(self, tensor: &'static str, x: View) -> Result<Vec<f64>> {
        let range = range(&x);
        Ok(match x.buffer().storage::<Cells>(NAME)? {
            Cells::F32(cells) => cells[range].iter().map(|&x| f64::from(x)).collect(),
            Cells::Bf16(cells) => cells[range].iter().map(|&x| f64::from(x)).collect(),
            Cells::F16(cells) => cells[range].iter().map(|&x| f64::from(x)).collect(),
            Cells::F64(cells) => cells[range].to_vec(),
            Cells::U8(_) | Cells::U32(_) | Cells::I64(_) => return Err(self.dtype_error(tensor, A_FLOAT, x)),
        })
    }

    /// The elements of a view that must be of type `T`.
    pub(crate) fn elements<'a, T: Element>(self, tensor: &'static str, x: View<'a>) -> Result<&'a [T]> {
        let cells = x.buffer().storage::<Cells>(NAME)?;
        if x.dtype() != T::DTYPE {
            return Err(self.dtype_error(tensor, T::DTYPE.name(), x));
        }
        Ok(&bytemuck::cast_slice(cells.bytes())[range(&x)])
    }

    /// The elements of an output that must be of type `T`.
    pub(crate) fn elements_mut<'a, T: Element>(
        self,
        tensor: &'static str,
        out: &'a mut ViewMut<'_>,
    ) -> Result<&'a mut [T]> {
        if out.dtype() != T::DTYPE {
            return Err(self.dtype_error(tensor, T::DTYPE.name(), out.as_view()));
        }
        let range = range(&out.as_view());
        let cells = out.buffer_mut().storage_mut::<Cells>(NAME)?;
        Ok(&mut bytemuck::cast_slice_mut(cells.bytes_mut())[range])
    }

    /// A float output, ready to be stored into.
    pub(crate) fn floats_mut<'a>(self, tensor: &'static str, out: &'a mut ViewMut<'_>) -> Result<FloatsMut<'a>> {
        let wrong = self.dtype_error(tensor, A_FLOAT, out.as_view());
        let range = range(&out.as_view());
        Ok(match out.buffer_mut().storage_mut::<Cells>(NAME)? {
            Cells::F32(cells) => FloatsMut::F32(&mut cells[range]),
            Cells::Bf16(cells) => FloatsMut::Bf16(&mut cells[range]),
            Cells::F16(cells) => FloatsMut::F16(&mut cells[range]),
            Cells::F64(cells) => FloatsMut::F64(&mut cells[range]),
            Cells::U8(_) | Cells::U32(_) | Cells::I64(_) => return Err(wrong),
        })
    }

    /// [`Kernel::floats_mut`] of an output that may not be asked for.
    pub(crate) fn some_mut<'a>(
        self,
        tensor: &'static str,
        out: &'a mut Option<ViewMut<'_>>,
    ) -> Result<Option<FloatsMut<'a>>> {
        out.as_mut().map(|out| self.floats_mut(tensor, out)).transpose()
    }

    /// That `x` is not of a type that the kernel serves.
    pub(crate) fn dtype_error(self, tensor: &'static str, expected: &'static str, x: View) -> Error {
        Error::DType { kernel: self.0, tensor, expected, found: x.dtype() }
    }
}

fn range(x: &View) -> Range<usize> {
    x.offset()..x.offset() + x.len()
}

/// A float output whose type and length are known to be right: storing cannot fail.
pub(crate) enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    F64(&'a mut [f64]),
}

impl FloatsMut<'_> {
    /// What it holds, for kernels that add to their output or work in place.
    pub(crate) fn load(&self) -> Vec<f64> {
        match self {
            Self::F32(cells) => cells.iter().map(|&x| f64::from(x)).collect(),
            Self::Bf16(cells) => cells.iter().map(|&x| f64::from(x)).collect(),
            Self::F16(cells) => cells.iter().map(|&x| f64::from(x)).collect(),
            Self::F64(cells) => cells.to_vec(),
        }
    }

    /// out_i = values_i, rounded once.
    pub(crate) fn store(&mut self, values: impl IntoIterator<Item = f64>) {
        fn fill<T>(out: &mut [T], values: impl IntoIterator<Item = f64>, round: impl Fn(f64) -> T) {
            for (out, value) in out.iter_mut().zip(values) {
                *out = round(value);
            }
        }
        match self {
            Self::F32(cells) => fill(cells, values, |x| x as f32),
            Self::Bf16(cells) => fill(cells, values, to_bf16),
            Self::F16(cells) => fill(cells, values, to_f16),
            Self::F64(cells) => fill(cells, values, |x| x),
        }
    }

    /// out_i ← out_i + values_i, the sum rounded once.
    pub(crate) fn add(&mut self, values: impl IntoIterator<Item = f64>) {
        let sums: Vec<f64> = self.load().into_iter().zip(values).map(|(old, value)| old + value).collect();
        self.store(sums);
    }
}

/// To bf16, nearest even.
///
/// `half` drops the lower 32 bits before it rounds, which turns a value just above a tie into the tie. Rounding to
/// odd first (Boldo & Melquiond 2008) keeps what was dropped in the last bit of an f32, whose 24 bits are more
/// than the 8 + 2 that make the second rounding exact.
pub(crate) fn to_bf16(x: f64) -> bf16 {
    bf16::from_f32(to_odd(x))
}

/// To f16, nearest even, as [`to_bf16`]: 24 bits are more than the 11 + 2 needed.
pub(crate) fn to_f16(x: f64) -> f16 {
    f16::from_f32(to_odd(x))
}

/// To f32: towards zero, and where that loses anything the last bit set.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || x.is_nan() {
        return nearest;
    }
    let bits = nearest.to_bits();
    let towards_zero = if f64::from(nearest).abs() > x.abs() { bits - 1 } else { bits };
    f32::from_bits(towards_zero | 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReferenceBackend;
    use rankfold_backend::{Backend, DType};

    #[test]
    fn a_value_just_above_a_tie_is_rounded_up_whatever_its_size() {
        // 1 + 2⁻⁸ is half way between bf16's 1 and 1 + 2⁻⁷; 1 + 2⁻¹¹ between f16's 1 and 1 + 2⁻¹⁰.
        let (tie, next) = (1.0 + 2f64.powi(-8), 1.0 + 2f64.powi(-7));
        for tiny in [2f64.powi(-30), 2f64.powi(-52)] {
            assert_eq!(f64::from(to_bf16(tie)), 1.0);
            assert_eq!(f64::from(to_bf16(tie + tiny)), next);
            assert_eq!(f64::from(to_bf16(-tie - tiny)), -next);
            assert_eq!(f64::from(to_f16(1.0 + 2f64.powi(-11) + tiny)), 1.0 + 2f64.powi(-10));
        }
    }

    #[test]
    fn every_bf16_and_f16_survives_and_midpoints_go_to_even() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            if !b.is_nan() {
                assert_eq!(to_bf16(f64::from(b)).to_bits(), bits);
            }
            if !h.is_nan() {
                assert_eq!(to_f16(f64::from(h)).to_bits(), bits);
            }
            let (next_b, next_h) = (bf16::from_bits(bits | 1), f16::from_bits(bits | 1));
            if bits & 1 == 0 && next_b.is_finite() {
                assert_eq!(to_bf16((f64::from(b) + f64::from(next_b)) / 2.0).to_bits(), bits);
            }
            if bits & 1 == 0 && next_h.is_finite() {
                assert_eq!(to_f16((f64::from(h) + f64::from(next_h)) / 2.0).to_bits(), bits);
            }
        }
        assert_eq!(to_bf16(1e300), bf16::INFINITY);
        assert_eq!(to_f16(65520.0), f16::INFINITY);
        assert_eq!(to_f16(65519.99), f16::MAX);
    }

    #[test]
    fn a_wrong_type_is_named_and_nothing_is_written() {
        let backend = &ReferenceBackend as &dyn Backend;
        let (a, b) = (backend.upload(&[1.0f32, 2.0]).unwrap(), backend.upload(&[1u8, 2]).unwrap());
        let mut out = backend.upload(&[7.0f32, 7.0]).unwrap();
        let error = backend.add(a.view(), b.view(), out.view_mut()).unwrap_err();
        assert_eq!(error, Error::DType { kernel: "add", tensor: "b", expected: A_FLOAT, found: DType::U8 });
        assert_eq!(backend.download::<f32>(out.view()).unwrap(), [7.0, 7.0]);
    }
}
