//! The host's stand-in for device memory: one reserved range of addresses, of which pages come when they are touched.
//!
//! Allocations lie 256 bytes apart, so that an access beside one meets nobody else's; each is filled with 0xff when
//! it is handed out, NaN in every float type, so that what was never written is seen in a result. A reservation takes
//! addresses alone, and gets and loses memory by frames.

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every allocation starts at a multiple of it, and is followed by at least as much of nobody's.
const ALIGN: usize = 256;

/// Bytes of a frame, at multiples of which a reservation starts.
pub(super) const FRAME: usize = 64 << 10;

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
    /// Addresses from the start that were ever handed out.
    top: usize,
    /// Live allocations and reservations: offset to bytes asked for.
    live: BTreeMap<usize, usize>,
    /// Of reservations, which frames have memory.
    mapped: BTreeMap<usize, Vec<bool>>,
    /// Freed places by size class, and by the bytes of a reservation.
    free: BTreeMap<usize, Vec<usize>>,
    unreserved: BTreeMap<usize, Vec<usize>>,
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

impl State {
    /// The reservation that an offset lies in, and the frame of it.
    fn frame_of(&mut self, offset: usize) -> Option<(&mut Vec<bool>, usize)> {
        let (start, mapped) = self.mapped.range_mut(..=offset).next_back()?;
        let frame = (offset - start) / FRAME;
        (frame < mapped.len()).then_some((mapped, frame))
    }
}

impl Memory {
    /// A device of `capacity` bytes, with `addresses` for more than them.
    pub(super) fn new(addresses: usize, capacity: usize) -> Result<Self> {
        Ok(Self { pages: Pages::reserve(addresses)?, capacity, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of the whole device.
    pub(super) fn addresses(&self) -> usize {
        self.pages.bytes
    }

    /// Bytes that nobody has.
    pub(super) fn free_bytes(&self) -> usize {
        self.capacity.saturating_sub(self.state().used)
    }

    /// Addresses for `bytes` bytes, whole frames, and the gap behind them.
    pub(super) fn reserve(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        let offset = match state.unreserved.get_mut(&bytes).and_then(Vec::pop) {
            Some(offset) => offset,
            None => {
                let offset = state.top.next_multiple_of(FRAME);
                let end = offset.checked_add(bytes).and_then(|end| end.checked_add(ALIGN));
                let free = self.addresses().saturating_sub(offset);
                state.top = end
                    .filter(|end| *end <= self.addresses())
                    .ok_or_else(|| Error::Device { call: "reserve", what: format!("{bytes} addresses of {free}") })?;
                offset
            }
        };
        state.live.insert(offset, bytes);
        state.mapped.insert(offset, vec![false; bytes / FRAME]);
        Ok(self.pages.start().wrapping_add(offset) as u64)
    }

    /// Takes a reservation back.
    pub(super) fn unreserve(&self, address: u64) {
        let mut state = self.state();
        let Some(offset) = self.offset(address) else { return };
        if state.mapped.remove(&offset).is_some()
            && let Some(bytes) = state.live.remove(&offset)
        {
            state.unreserved.entry(bytes).or_default().push(offset);
        }
    }

    /// Puts memory, full of 0xff, behind frames of a reservation.
    pub(super) fn map(&self, address: u64, bytes: usize) -> Result<()> {
        let mut state = self.state();
        let free = self.capacity.saturating_sub(state.used);
        if bytes > free {
            return Err(Error::OutOfMemory { asked: bytes, free });
        }
        self.set_mapped(&mut state, address, bytes, true)?;
        state.used += bytes;
        // SAFETY: addresses of the mapping that are one reservation's, which nobody touches before this returns.
        unsafe { ptr::write_bytes(address as *mut u8, 0xff, bytes) };
        Ok(())
    }

    /// Takes it back; there, zeros are read again.
    pub(super) fn unmap(&self, address: u64, bytes: usize) {
        let mut state = self.state();
        if let (Some(offset), Ok(())) = (self.offset(address), self.set_mapped(&mut state, address, bytes, false)) {
            state.used -= bytes;
            self.pages.forget(offset, bytes);
        }
    }

    /// That frames which are all mapped, or none of them, are so no more.
    fn set_mapped(&self, state: &mut State, address: u64, bytes: usize, mapped: bool) -> Result<()> {
        let refuse =
            |what: &str| Err(Error::Device { call: "map", what: format!("{bytes} bytes at {address:#x} are {what}") });
        let Some((frames, first)) = self.offset(address).and_then(|offset| state.frame_of(offset)) else {
            return refuse("not reserved");
        };
        match frames.get_mut(first..first + bytes / FRAME) {
            None => refuse("beyond their reservation"),
            Some(frames) if frames.contains(&mapped) => refuse(if mapped { "mapped" } else { "not mapped" }),
            Some(frames) => {
                frames.fill(mapped);
                Ok(())
            }
        }
    }

    /// The address of new memory, full of 0xff.
    pub(super) fn alloc(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        let free = self.capacity.saturating_sub(state.used);
        let refused = Error::OutOfMemory { asked: bytes, free };
        let class = match class(bytes) {
            Some(class) if class <= free => class,
            _ => return Err(refused),
        };
        let offset = match state.free.get_mut(&class).and_then(Vec::pop) {
            Some(offset) => offset,
            None if class > self.addresses() - state.top => return Err(refused),
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
        (offset < self.addresses()).then_some(offset)
    }

    /// The allocation nearest below an offset: its own offset and its bytes.
    pub(super) fn allocation(&self, offset: usize) -> Option<(usize, usize)> {
        self.state().live.range(..=offset).next_back().map(|(start, bytes)| (*start, *bytes))
    }

    /// Where `bytes` bytes of one allocation lie, for the host to copy.
    pub(super) fn range(&self, address: u64, bytes: usize) -> Result<*mut u8> {
        if bytes == 0 {
            return Ok(ptr::NonNull::dangling().as_ptr());
        }
        let inside = self.offset(address).and_then(|offset| {
            let (start, len) = self.allocation(offset)?;
            let state = self.state();
            let is_there = state.mapped.get(&start).is_none_or(|frames| {
                let within = offset - start;
                frames
                    .get(within / FRAME..(within + bytes).div_ceil(FRAME))
                    .is_some_and(|frames| !frames.contains(&false))
            });
            let fits = bytes <= len && offset - start <= len - bytes;
            (fits && is_there).then(|| self.pages.start().wrapping_add(offset))
        });
        inside.ok_or_else(|| Error::Device {
            call: "copy",
            what: format!("{bytes} bytes at {address:#x} are not one allocation's, all of them mapped"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_apart_poisoned_and_come_again() {
        let memory = Memory::new(1 << 20, 1 << 20).unwrap();
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
        let memory = Memory::new(1 << 20, 1 << 20).unwrap();
        let first = memory.alloc(1 << 19).unwrap();
        let error = memory.alloc(1 << 19).unwrap_err();
        let Error::OutOfMemory { asked, free } = error else { panic!("{error}") };
        assert!(asked == 1 << 19 && free < 1 << 19);
        memory.free(first);
        assert!(memory.alloc(1 << 19).is_ok());
        assert!(memory.alloc(usize::MAX).is_err());
    }

    #[test]
    fn a_reservation_has_memory_where_it_is_mapped_alone() {
        let memory = Memory::new(1 << 30, 2 * FRAME).unwrap();
        let at = memory.reserve(4 * FRAME).unwrap();
        let frame = |n: u64| at + n * FRAME as u64;
        assert!(memory.range(at, 1).is_err());
        memory.map(frame(1), 2 * FRAME).unwrap();
        assert!(memory.range(frame(1), 2 * FRAME).is_ok() && memory.range(frame(2) - 1, 2).is_ok());
        assert!(memory.range(frame(1) - 1, 2).is_err() && memory.range(frame(3) - 1, 2).is_err());
        assert!(matches!(memory.map(frame(3), FRAME), Err(Error::OutOfMemory { free: 0, .. })));
        memory.unmap(frame(1), FRAME);
        assert!(memory.map(frame(2), FRAME).is_err() && memory.map(frame(3), 2 * FRAME).is_err());
        assert!(memory.map(frame(3), FRAME).is_ok());
        memory.unmap(frame(2), 2 * FRAME);
        memory.unreserve(at);
        assert_eq!((memory.free_bytes(), memory.reserve(4 * FRAME).unwrap()), (2 * FRAME, at));
    }
}
