//! Address space of the process, with frames or without.
//!
//! A [`Space`] is reserved at one go and never moves. The system puts a zeroed frame behind a part of it when that is
//! first touched, and takes it back when told ([`Space::release`]); the addresses stay. A hole of one page of the
//! system behind each space turns a stray access into a fault at once; in tests, so does every part without frames.

use crate::{Error, Result};
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};

/// Reserved addresses: readable and writable, and not mapped to any file.
#[derive(Debug)]
pub(crate) struct Space {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a space is owned addresses, not bound to a thread; who touches which bytes is the pager's business, which
// hands them out under its pins.
unsafe impl Send for Space {}
// SAFETY: as above.
unsafe impl Sync for Space {}

/// The hole behind each space; at least a page of the system, whichever size that has.
const HOLE: usize = 64 << 10;

impl Space {
    /// Reserve `bytes`, a multiple of 64 KiB and not 0.
    pub(crate) fn reserve(bytes: usize) -> Result<Self> {
        let failed = |source| Error::Address { bytes, source };
        let all = bytes.checked_add(HOLE).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice touches nothing that exists.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let start = NonNull::new(mapped.cast()).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let space = Self { start, bytes };
        if !cfg!(test) {
            space.protect(0..bytes, libc::PROT_READ | libc::PROT_WRITE).map_err(failed)?;
        }
        Ok(space)
    }

    fn protect(&self, range: Range<usize>, access: libc::c_int) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        // SAFETY: within the mapping; who may touch it is what this says.
        match unsafe { libc::mprotect(self.start.as_ptr().add(range.start).cast(), range.len(), access) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A range is about to get frames.
    pub(crate) fn open(&self, range: Range<usize>) -> Result<()> {
        let (bytes, access) = (range.len(), libc::PROT_READ | libc::PROT_WRITE);
        if cfg!(test) { self.protect(range, access).map_err(|source| Error::Address { bytes, source }) } else { Ok(()) }
    }

    /// Put frames behind an opened range now, at one go: a fault for every 4 KiB costs several times as much. Where the
    /// system has no call for it (Linux before 5.14), they come as they are touched.
    pub(crate) fn populate(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        #[cfg(target_os = "linux")]
        // SAFETY: within the mapping; it changes no byte.
        unsafe {
            libc::madvise(self.start.as_ptr().add(range.start).cast(), range.len(), libc::MADV_POPULATE_WRITE)
        };
    }

    /// The first byte's address.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes from the first that may be touched.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Give back the frames of a range (multiples of the system's page): it reads as zero afterwards.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    pub(crate) unsafe fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        if cfg!(test) {
            self.protect(range.clone(), libc::PROT_NONE).expect("a part of a mapping");
        }
        // SAFETY: within the mapping; the caller keeps references away.
        let start = unsafe { self.start.as_ptr().add(range.start) };
        // SAFETY: as above. It cannot fail for a private mapping that is there and not locked.
        unsafe { libc::madvise(start.cast(), range.len(), libc::MADV_DONTNEED) };
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // SAFETY: mapped in `reserve` with this length, unmapped once; no reference outlives its owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes + HOLE) };
    }
}
