//! Device memory that only its backend can read.

use crate::{DType, Error, Result};
use std::any::Any;
use std::fmt;
use std::ops::Range;

/// What a backend keeps behind a [`Buffer`].
pub trait Storage: Any + Send + Sync + fmt::Debug {
    /// For the owning backend to find its own type again.
    fn as_any(&self) -> &dyn Any;
    /// The same, mutably.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// Opaque memory of one backend: an element type and a number of elements.
///
/// A buffer has one owner; kernels read it through [`View`] and write it through [`ViewMut`], so that the borrow
/// checker rules out aliasing between a kernel's inputs and outputs.
#[derive(Debug)]
pub struct Buffer {
    storage: Box<dyn Storage>,
    dtype: DType,
    len: usize,
}

impl Buffer {
    /// Wrap a backend's storage. For backends.
    pub fn new(storage: impl Storage, dtype: DType, len: usize) -> Self {
        Self { storage: Box::new(storage), dtype, len }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// The backend's storage, or [`Error::Foreign`] where the buffer belongs to another backend.
    pub fn storage<S: Storage>(&self, backend: &'static str) -> Result<&S> {
        self.storage.as_any().downcast_ref().ok_or(Error::Foreign { backend })
    }

    /// The backend's storage, mutably.
    pub fn storage_mut<S: Storage>(&mut self, backend: &'static str) -> Result<&mut S> {
        self.storage.as_any_mut().downcast_mut().ok_or(Error::Foreign { backend })
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_> {
        View { buffer: self, offset: 0, len: self.len }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let len = self.len;
        ViewMut { buffer: self, offset: 0, len }
    }

    /// `len` elements from `offset`, to read.
    pub fn slice(&self, offset: usize, len: usize) -> Result<View<'_>> {
        self.view().slice(offset, len)
    }

    /// `len` elements from `offset`, to write.
    pub fn slice_mut(&mut self, offset: usize, len: usize) -> Result<ViewMut<'_>> {
        check_range(offset, len, self.len)?;
        Ok(ViewMut { buffer: self, offset, len })
    }
}

/// Consecutive elements of a buffer, to read.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    buffer: &'a Buffer,
    offset: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// The buffer it lies in.
    pub fn buffer(&self) -> &'a Buffer {
        self.buffer
    }

    /// The first element's index in the buffer.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype
    }

    /// Where its elements lie in the buffer, in bytes.
    pub fn bytes(&self) -> Range<usize> {
        let size = self.dtype().size();
        self.offset * size..(self.offset + self.len) * size
    }

    /// `len` elements from `offset` of this view.
    pub fn slice(&self, offset: usize, len: usize) -> Result<View<'a>> {
        check_range(offset, len, self.len)?;
        Ok(View { buffer: self.buffer, offset: self.offset + offset, len })
    }
}

/// Consecutive elements of a buffer, to write.
#[derive(Debug)]
pub struct ViewMut<'a> {
    buffer: &'a mut Buffer,
    offset: usize,
    len: usize,
}

impl ViewMut<'_> {
    /// The buffer it lies in.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        self.buffer
    }

    /// The first element's index in the buffer.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype
    }

    /// The same elements, to read.
    pub fn as_view(&self) -> View<'_> {
        View { buffer: self.buffer, offset: self.offset, len: self.len }
    }

    /// The same elements for a shorter time: to hand a view on and keep it.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { buffer: self.buffer, offset: self.offset, len: self.len }
    }

    /// `len` elements from `offset` of this view.
    pub fn slice_mut(&mut self, offset: usize, len: usize) -> Result<ViewMut<'_>> {
        check_range(offset, len, self.len)?;
        Ok(ViewMut { offset: self.offset + offset, buffer: self.buffer, len })
    }
}

fn check_range(offset: usize, len: usize, available: usize) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= available => Ok(()),
        _ => Err(Error::Range { offset, len, available }),
    }
}
