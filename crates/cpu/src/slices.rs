//! Views as slices, with errors that name the kernel and the tensor.

use crate::storage::{Holds, HostMemory};
use half::{bf16, f16};
use rankfold_backend::{DType, Element, Error, Result, View, ViewMut};
use std::ops::Range;

/// This backend's name in errors.
pub(crate) const BACKEND: &str = "cpu";

/// Turns the views of one kernel into slices, and keeps the memory behind them in place while that kernel runs: a slice
/// cannot outlive it.
#[derive(Debug)]
pub(crate) struct Slices {
    /// The kernel's name.
    pub(crate) kernel: &'static str,
    holds: Holds,
}

impl Slices {
    /// Of a kernel of this name.
    pub(crate) fn new(kernel: &'static str) -> Self {
        Self { kernel, holds: Holds::default() }
    }

    /// The view's bytes.
    pub(crate) fn bytes<'s>(&'s self, tensor: &'static str, view: View<'s>) -> Result<&'s [u8]> {
        let memory: &HostMemory = view.buffer().storage(BACKEND)?;
        memory.bytes(view.bytes(), &self.holds).map_err(Error::paging(self.kernel, tensor))
    }

    /// The view's bytes, to write.
    pub(crate) fn bytes_mut<'s>(&'s self, tensor: &'static str, view: &'s mut ViewMut<'_>) -> Result<&'s mut [u8]> {
        let part = view.as_view().bytes();
        let memory: &mut HostMemory = view.buffer_mut().storage_mut(BACKEND)?;
        memory.bytes_mut(part, &self.holds).map_err(Error::paging(self.kernel, tensor))
    }

    fn wrong(&self, tensor: &'static str, expected: &'static str, found: DType) -> Error {
        Error::DType { kernel: self.kernel, tensor, expected, found }
    }

    fn check<T: Element>(&self, tensor: &'static str, found: DType) -> Result<()> {
        if found == T::DTYPE { Ok(()) } else { Err(self.wrong(tensor, T::DTYPE.name(), found)) }
    }

    /// Elements of type `T`.
    pub(crate) fn get<'s, T: Element>(&'s self, tensor: &'static str, view: View<'s>) -> Result<&'s [T]> {
        self.check::<T>(tensor, view.dtype())?;
        // Blocks are aligned to 64 bytes and offsets count whole elements: the cast finds them aligned.
        Ok(bytemuck::cast_slice(self.bytes(tensor, view)?))
    }

    /// Elements of type `T`, to write.
    pub(crate) fn get_mut<'s, T: Element>(
        &'s self,
        tensor: &'static str,
        view: &'s mut ViewMut<'_>,
    ) -> Result<&'s mut [T]> {
        self.check::<T>(tensor, view.dtype())?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut(tensor, view)?))
    }

    /// [`Slices::get_mut`] of an output that may not be asked for.
    pub(crate) fn some_mut<'s, T: Element>(
        &'s self,
        tensor: &'static str,
        view: &'s mut Option<ViewMut<'_>>,
    ) -> Result<Option<&'s mut [T]>> {
        view.as_mut().map(|view| self.get_mut(tensor, view)).transpose()
    }

    /// f32, bf16 or f16 elements.
    pub(crate) fn floats<'s>(&'s self, tensor: &'static str, view: View<'s>) -> Result<Floats<'s>> {
        match view.dtype() {
            DType::F32 => self.get(tensor, view).map(Floats::F32),
            DType::Bf16 => self.get(tensor, view).map(Floats::Bf16),
            DType::F16 => self.get(tensor, view).map(Floats::F16),
            found => Err(self.wrong(tensor, "f32, bf16 or f16", found)),
        }
    }

    /// f32, bf16 or f16 elements, to write.
    pub(crate) fn floats_mut<'s>(&'s self, tensor: &'static str, view: &'s mut ViewMut<'_>) -> Result<FloatsMut<'s>> {
        match view.dtype() {
            DType::F32 => self.get_mut(tensor, view).map(FloatsMut::F32),
            DType::Bf16 => self.get_mut(tensor, view).map(FloatsMut::Bf16),
            DType::F16 => self.get_mut(tensor, view).map(FloatsMut::F16),
            found => Err(self.wrong(tensor, "f32, bf16 or f16", found)),
        }
    }
}

/// Elements of one of the float types.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Floats<'a> {
    /// binary32
    F32(&'a [f32]),
    /// bfloat16
    Bf16(&'a [bf16]),
    /// binary16
    F16(&'a [f16]),
}

/// Elements of one of the float types, to write.
#[derive(Debug)]
pub(crate) enum FloatsMut<'a> {
    /// binary32
    F32(&'a mut [f32]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// binary16
    F16(&'a mut [f16]),
}

impl<'a> Floats<'a> {
    /// Some of the elements.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(x) => Self::F32(&x[range]),
            Self::Bf16(x) => Self::Bf16(&x[range]),
            Self::F16(x) => Self::F16(&x[range]),
        }
    }
}

impl FloatsMut<'_> {
    /// Some of the elements.
    pub(crate) fn part(&mut self, range: Range<usize>) -> FloatsMut<'_> {
        match self {
            Self::F32(x) => FloatsMut::F32(&mut x[range]),
            Self::Bf16(x) => FloatsMut::Bf16(&mut x[range]),
            Self::F16(x) => FloatsMut::F16(&mut x[range]),
        }
    }
}
