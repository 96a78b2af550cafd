//! A block's shared memory: where its arrays lie.

use super::calls::SharedArray;
use super::memory::Pages;
use crate::Result;
use std::ffi::CStr;
use std::ptr;

/// The most that a block has on any device, static and dynamic: an H100's 227 KiB.
pub(super) const CAPACITY: usize = 227 << 10;

/// Of which arrays of a fixed size may take.
const STATIC: usize = 48 << 10;

/// Bytes of nobody's after each array.
const GAP: usize = 64;

/// An array and its place.
#[derive(Clone, Copy, Debug)]
struct Placed {
    array: *const SharedArray,
    offset: usize,
    bytes: usize,
}

/// The arena, and the arrays of the running block. The dynamic array comes first.
#[derive(Debug)]
pub(super) struct SharedMemory {
    pages: Pages,
    /// What the device has for static and dynamic arrays.
    most: usize,
    dynamic: usize,
    placed: Vec<Placed>,
    end: usize,
}

/// Addresses that the arena spans: its capacity and a gap for each of more arrays than a kernel has.
pub(super) const ARENA: usize = CAPACITY + 64 * 1024;

impl SharedMemory {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { pages: Pages::reserve(ARENA)?, most: CAPACITY, dynamic: 0, placed: Vec::new(), end: 0 })
    }

    /// Begins a block with `dynamic` bytes of its launch's choice, full of 0xff.
    pub(super) fn begin(&mut self, dynamic: usize, most: usize) {
        self.placed.clear();
        (self.dynamic, self.most) = (dynamic, most);
        self.end = dynamic.next_multiple_of(GAP) + GAP;
        // SAFETY: the launch was checked to ask for no more than the arena holds.
        unsafe { ptr::write_bytes(self.pages.start(), 0xff, dynamic) };
    }

    pub(super) fn start(&self) -> usize {
        self.pages.start() as usize
    }

    /// The array of a launch's choice.
    pub(super) fn dynamic(&self) -> *mut u8 {
        self.pages.start()
    }

    /// Where an array lies; where it is new, its offset and bytes too. None where the device has no room for it.
    pub(super) fn place(&mut self, array: *const SharedArray) -> Option<(*mut u8, Option<(usize, usize)>)> {
        if let Some(placed) = self.placed.iter().find(|placed| ptr::eq(placed.array, array)) {
            return Some((self.pages.start().wrapping_add(placed.offset), None));
        }
        // SAFETY: a constant of the kernel's unit.
        let bytes = unsafe { (*array).bytes };
        let taken: usize = self.placed.iter().map(|placed| placed.bytes).sum();
        if taken + bytes > STATIC || taken + bytes + self.dynamic > self.most {
            return None;
        }
        let offset = self.end;
        self.end = (offset + bytes).next_multiple_of(GAP) + GAP;
        self.placed.push(Placed { array, offset, bytes });
        let start = self.pages.start().wrapping_add(offset);
        // SAFETY: within the arena: a kernel has fewer arrays than the arena has gaps.
        unsafe { ptr::write_bytes(start, 0xff, bytes) };
        Some((start, Some((offset, bytes))))
    }

    /// The array that an offset lies in, by name, and the byte of it.
    pub(super) fn named(&self, offset: usize) -> Option<(String, usize)> {
        if offset < self.dynamic {
            return Some(("dynamic".into(), offset));
        }
        let placed =
            self.placed.iter().find(|placed| (placed.offset..placed.offset + placed.bytes).contains(&offset))?;
        // SAFETY: a constant of the kernel's unit, whose name is a literal.
        let name = unsafe { CStr::from_ptr((*placed.array).name) };
        Some((name.to_string_lossy().into_owned(), offset - placed.offset))
    }
}
