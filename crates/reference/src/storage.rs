//! Where the reference backend keeps a buffer: a plain vector of the element type.

use half::{bf16, f16};
use rankfold_backend::{Buffer, DType, Error, Result, Storage};
use std::any::Any;

/// The backend's name in messages.
pub(crate) const NAME: &str = "reference";

/// The elements of a buffer.
#[derive(Debug)]
pub(crate) enum Cells {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F64(Vec<f64>),
    U8(Vec<u8>),
    U32(Vec<u32>),
    I64(Vec<i64>),
}

/// `$body` with `$cells` bound to the vector, whatever its type.
macro_rules! any {
    ($storage:expr, $cells:ident => $body:expr) => {
        match $storage {
            Cells::F32($cells) => $body,
            Cells::Bf16($cells) => $body,
            Cells::F16($cells) => $body,
            Cells::F64($cells) => $body,
            Cells::U8($cells) => $body,
            Cells::U32($cells) => $body,
            Cells::I64($cells) => $body,
        }
    };
}

impl Storage for Cells {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Cells {
    /// The elements' bytes, native endian.
    pub(crate) fn bytes(&self) -> &[u8] {
        any!(self, cells => bytemuck::cast_slice(cells))
    }

    /// The same, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        any!(self, cells => bytemuck::cast_slice_mut(cells))
    }
}

/// A buffer of `len` zeros.
///
/// Errors: [`Error::OutOfMemory`] where the allocator has no room, or the size does not fit in an address.
pub(crate) fn alloc(dtype: DType, len: usize) -> Result<Buffer> {
    fn zeros<T: bytemuck::Zeroable + Clone>(len: usize) -> Result<Vec<T>> {
        let mut cells = Vec::new();
        let out_of_memory = |_| Error::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) };
        cells.try_reserve_exact(len).map_err(out_of_memory)?;
        cells.resize(len, T::zeroed());
        Ok(cells)
    }
    let cells = match dtype {
        DType::F32 => Cells::F32(zeros(len)?),
        DType::Bf16 => Cells::Bf16(zeros(len)?),
        DType::F16 => Cells::F16(zeros(len)?),
        DType::F64 => Cells::F64(zeros(len)?),
        DType::U8 => Cells::U8(zeros(len)?),
        DType::U32 => Cells::U32(zeros(len)?),
        DType::I64 => Cells::I64(zeros(len)?),
    };
    Ok(Buffer::new(cells, dtype, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let error = alloc(DType::F64, usize::MAX / 8).unwrap_err();
        assert_eq!(error, Error::OutOfMemory { bytes: usize::MAX / 8 * 8 });
        let error = alloc(DType::F64, usize::MAX).unwrap_err();
        assert_eq!(error, Error::OutOfMemory { bytes: usize::MAX });
    }
}
