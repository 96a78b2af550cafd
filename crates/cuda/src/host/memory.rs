//! The host's stand-in for device memory: one reserved range of addresses, of which pages come when they are touched.
//!
//! Allocations lie 256 bytes apart, so that an access beside one meets nobody else's; each is filled with 0xff when
//! it is handed out, NaN in every float type, so that what was never written is seen in a result.

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every allocation starts at a multiple of it, and is followed by at least as much of nobody's.
const ALIGN: usize = 256;

/// Pages of the system that are zero when first read and take no memory before.
#[derive(Debug)]
pub(super) struct Pages {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: a range of memory, not bound to a thread; who writes where is its users' to keep.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Reserves a range.
    pub(super) fn reserve(bytes: usize) -> Result<Self> {
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping, at an address of the system's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            let why = std::io::Error::last_os_error();
            return Err(Error::Missing(format!("the system reserves no {bytes} bytes of addresses: {why}")));
        }
        Ok(Self { start: start.cast(), bytes })
    }

    /// The first address.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Gives a range's pages back; they are zero when they come again.
    pub(super) fn forget(&self, offset: usize, bytes: usize) {
        let page = 4096;
        let (from, to) = (offset.next_multiple_of(page), (offset + bytes) / page * page);
        if from < to && to <= self.bytes {
            // SAFETY: whole pages of this mapping, which no reference points into.
            unsafe { libc::madvise(self.start.add(from).cast(), to - from, libc::MADV_DONTNEED) };
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `reserve` with this length.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

#[derive(Debug, Default)]
struct State {
    /// Bytes from the start that were ever handed out.
    top: usize,
    /// Live allocations: offset to bytes asked for.
    live: BTreeMap<usize, usize>,
    /// Freed places by size class.
    free: BTreeMap<usize, Vec<usize>>,
    used: usize,
}

/// Allocations in a range of addresses.
#[derive(Debug)]
pub(super) struct Memory {
    pages: Pages,
    capacity: usize,
    state: Mutex<State>,
}

/// The bytes that an allocation takes: a multiple of an eighth of its power of two, and the gap behind it.
fn class(bytes: usize) -> Option<usize> {
    let step = (bytes.max(1).checked_next_power_of_two()? / 16).max(ALIGN);
    bytes.max(1).checked_next_multiple_of(step)?.checked_add(ALIGN)
}

impl Memory {
    /// A device of `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Result<Self> {
        Ok(Self { pages: Pages::reserve(capacity)?, capacity, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of the whole device.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// The address of new memory, full of 0xff.
    pub(super) fn alloc(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        let refuse = |state: &State| Error::OutOfMemory { asked: bytes, free: self.capacity - state.used };
        let class = class(bytes).ok_or_else(|| refuse(&state))?;
        let offset = match state.free.get_mut(&class).and_then(Vec::pop) {
            Some(offset) => offset,
            None if class > self.capacity - state.top => return Err(refuse(&state)),
            None => {
                state.top += class;
                state.top - class
            }
        };
        state.used += class;
        state.live.insert(offset, bytes);
        let address = self.pages.start().wrapping_add(offset);
        // SAFETY: `bytes` bytes of the mapping that belong to this allocation alone.
        unsafe { ptr::write_bytes(address, 0xff, bytes) };
        Ok(address as u64)
    }

    /// Takes an allocation back; its bytes, or nothing where there was none at this address.
    pub(super) fn free(&self, address: u64) -> Option<usize> {
        let mut state = self.state();
        let offset = self.offset(address)?;
        let bytes = state.live.remove(&offset)?;
        let class = class(bytes)?;
        state.used -= class;
        state.free.entry(class).or_default().push(offset);
        self.pages.forget(offset, bytes);
        Some(bytes)
    }

    /// An address as an offset from the device's first, where it is one of the device's.
    pub(super) fn offset(&self, address: u64) -> Option<usize> {
        let offset = (address as usize).wrapping_sub(self.pages.start() as usize);
        (offset < self.capacity).then_some(offset)
    }

    /// The allocation nearest below an offset: its own offset and its bytes.
    pub(super) fn allocation(&self, offset: usize) -> Option<(usize, usize)> {
        self.state().live.range(..=offset).next_back().map(|(start, bytes)| (*start, *bytes))
    }

    /// Where `bytes` bytes of one allocation lie, for the host to copy.
    pub(super) fn range(&self, address: u64, bytes: usize) -> Result<*mut u8> {
        let inside = self.offset(address).and_then(|offset| {
            let (start, len) = self.allocation(offset)?;
            (bytes <= len && offset - start <= len - bytes).then(|| self.pages.start().wrapping_add(offset))
        });
        if bytes == 0 {
            return Ok(ptr::NonNull::dangling().as_ptr());
        }
        inside.ok_or_else(|| Error::Device {
            call: "copy",
            what: format!("{bytes} bytes at {address:#x} are not one allocation's"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_apart_poisoned_and_come_again() {
        let memory = Memory::new(1 << 20).unwrap();
        let (a, b) = (memory.alloc(1000).unwrap(), memory.alloc(0).unwrap());
        assert!(a % 256 == 0 && b % 256 == 0 && a.abs_diff(b) >= 1000 + 256);
        // SAFETY: a live allocation.
        let bytes = unsafe { std::slice::from_raw_parts(memory.range(a, 1000).unwrap(), 1000) };
        assert!(bytes.iter().all(|byte| *byte == 0xff));
        assert!(memory.range(a, 1001).is_err() && memory.range(a + 1, 1000).is_err());
        assert_eq!(memory.free(a), Some(1000));
        assert_eq!(memory.free(a), None);
        assert_eq!(memory.alloc(1000).unwrap(), a);
    }

    #[test]
    fn what_is_not_there_is_an_error_that_says_what_is() {
        let memory = Memory::new(1 << 20).unwrap();
        let first = memory.alloc(1 << 19).unwrap();
        let error = memory.alloc(1 << 19).unwrap_err();
        let Error::OutOfMemory { asked, free } = error else { panic!("{error}") };
        assert!(asked == 1 << 19 && free < 1 << 19);
        memory.free(first);
        assert!(memory.alloc(1 << 19).is_ok());
        assert!(memory.alloc(usize::MAX).is_err());
    }
}
