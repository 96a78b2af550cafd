//! Address space of the process, with frames or without.
//!
//! A [`Space`] is reserved at one go and never moves. The system puts a zeroed frame behind a part of it when that is
//! first touched, and takes it back when told ([`Space::release`]); the addresses stay. A hole of one page of the
//! system behind each space turns a stray access into a fault at once; in tests, so does every part without frames.
//!
//! Frames of 4 KiB are dear: each is a fault, and one of the pieces of a disk's request. So an aligned block of 2 MiB that
//! is brought in as a whole is marked for one huge frame, where the system has those (Linux's transparent huge pages). Every
//! other block is marked against it: a huge frame there would take more memory than the books say. For 128 MiB an AMD EPYC
//! Zen 4 takes 33 ms to put small frames behind addresses and 7 to take them back, 10 and 0.4 with huge ones; direct I/O
//! runs half as fast again in them, and beside two busy threads, on the virtual machine of an AMD EPYC Zen 3 whose host
//! handles a request's pieces, four times as fast (0.4 GB/s against 1.7).
//!
//! Where small frames were once, the system keeps their table, and puts no huge frame in its place: such a block is mapped
//! anew before it comes as a whole. Which blocks are huge, as far as the system had huge frames, is noted.

use crate::{Error, Result};
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Reserved addresses: readable and writable, and not mapped to any file.
#[derive(Debug)]
pub(crate) struct Space {
    /// What the system gave, and how much: up to a block more on either side.
    mapped: NonNull<libc::c_void>,
    all: usize,
    start: NonNull<u8>,
    bytes: usize,
    /// Of each block, whether its frame came as a huge one and is whole.
    huge: Box<[AtomicBool]>,
}

// SAFETY: a space is owned addresses, not bound to a thread; who touches which bytes is the pager's business, which
// hands them out under its pins.
unsafe impl Send for Space {}
// SAFETY: as above.
unsafe impl Sync for Space {}

/// The hole behind each space; at least a page of the system, whichever size that has.
const HOLE: usize = 64 << 10;

/// What may have a huge frame; each space begins with one.
pub(crate) const BLOCK: usize = 2 << 20;

/// Blocks of all spaces of the process.
static BLOCKS: AtomicUsize = AtomicUsize::new(0);

impl Space {
    /// Blocks of all spaces of the process, at least.
    pub(crate) fn blocks() -> usize {
        BLOCKS.load(Ordering::Relaxed)
    }

    /// Reserve `bytes`, a multiple of 64 KiB and not 0.
    pub(crate) fn reserve(bytes: usize) -> Result<Self> {
        let failed = |source| Error::Address { bytes, source };
        let all = bytes.checked_add(BLOCK + HOLE).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice touches nothing that exists.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let mapped = NonNull::new(mapped).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let start = mapped.cast::<u8>();
        // SAFETY: less than a block from the start, and the mapping is longer than a block.
        let start = unsafe { start.add(start.align_offset(BLOCK)) };
        let huge = (0..bytes.div_ceil(BLOCK)).map(|_| AtomicBool::new(false)).collect();
        let space = Self { mapped, all, start, bytes, huge };
        BLOCKS.fetch_add(bytes.div_ceil(BLOCK), Ordering::Relaxed);
        space.mark(0..bytes, false);
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
        if cfg!(test) {
            self.protect(range.clone(), access).map_err(|source| Error::Address { bytes, source })?;
        }
        let whole = range.start.next_multiple_of(BLOCK)..range.end / BLOCK * BLOCK;
        self.note(&range, false);
        if whole.start < whole.end {
            self.map_anew(whole.clone(), access);
            self.mark(range.start..whole.start, false);
            self.mark(whole.end..range.end, false);
            self.mark(whole.clone(), true);
            self.note(&whole, true);
        } else {
            // Of a block that once was whole, perhaps.
            self.mark(range, false);
        }
        Ok(())
    }

    /// Note of all blocks that a range touches whether they are huge.
    fn note(&self, range: &Range<usize>, huge: bool) {
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        self.huge[blocks].iter().for_each(|block| block.store(huge, Ordering::Relaxed));
    }

    /// Whether a range is made of whole blocks, each in a huge frame as far as the system had those.
    pub(crate) fn is_huge(&self, range: &Range<usize>) -> bool {
        let mut blocks = self.huge[range.start / BLOCK..range.end / BLOCK].iter();
        let is_whole = range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK);
        is_whole && blocks.all(|block| block.load(Ordering::Relaxed))
    }

    /// Addresses without frames, and without the system's tables for them.
    ///
    /// # Panics
    /// Where the system takes the addresses away and gives none back: it cannot keep its books any more.
    fn map_anew(&self, range: Range<usize>, access: libc::c_int) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: within the mapping; the caller is about to give these addresses frames, and they have none.
        let at = unsafe { self.start.as_ptr().add(range.start) };
        // SAFETY: as above.
        let mapped = unsafe { libc::mmap(at.cast(), range.len(), access, flags, -1, 0) };
        // What could not be mapped may be as it was.
        // SAFETY: as above.
        let is_there = || unsafe { libc::madvise(at.cast(), range.len(), libc::MADV_DONTNEED) } == 0;
        assert!(mapped != libc::MAP_FAILED || is_there(), "the addresses of a space are its own");
    }

    /// Put frames behind an opened range now, at one go: a fault for each costs several times as much. Where the
    /// system has no call for it (Linux before 5.14), they come as they are touched.
    pub(crate) fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        self.advise(range, libc::MADV_POPULATE_WRITE);
    }

    /// Say of whole blocks whether they may have huge frames. Where the system has none, there is nothing to say.
    fn mark(&self, range: Range<usize>, huge: bool) {
        #[cfg(target_os = "linux")]
        if !range.is_empty() {
            self.advise(range, if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
        }
    }

    /// Tell the system something of a range that changes no byte.
    #[cfg(target_os = "linux")]
    fn advise(&self, range: Range<usize>, advice: libc::c_int) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        // SAFETY: within the mapping; it changes no byte.
        unsafe { libc::madvise(self.start.as_ptr().add(range.start).cast(), range.len(), advice) };
    }

    /// The first byte's address.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes from the first that may be touched.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Move the frames of a range behind addresses of another space, `range.len()` from `at` on, that have none (multiples
    /// of the system's page): whether they are there now. If not, they are where they were. The range then has none.
    ///
    /// # Panics
    /// Where the system takes the other addresses away and gives none back: it cannot keep its books any more.
    ///
    /// # Safety
    /// Nobody has a reference into either range.
    #[cfg(target_os = "linux")]
    pub(crate) unsafe fn move_frames(&self, range: Range<usize>, to: &Self, at: usize) -> bool {
        let len = range.len();
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        assert!(at <= to.bytes && len <= to.bytes - at, "a range beyond its space");
        // SAFETY: within the mappings; the caller keeps references away. The addresses that are left stay this space's.
        let (from, target) = unsafe { (self.start.as_ptr().add(range.start), to.start.as_ptr().add(at)) };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: as above.
        if unsafe { libc::mremap(from.cast(), len, len, flags, target) } == libc::MAP_FAILED {
            // What was mapped there may be gone.
            to.map_anew(at..at + len, libc::PROT_READ | libc::PROT_WRITE);
            to.mark(at..at + len, false);
            return false;
        }
        to.note(&(at..at + len), self.is_huge(&range));
        self.note(&range, false);
        if cfg!(test) {
            self.protect(range, libc::PROT_NONE).expect("a part of a mapping");
        }
        true
    }

    /// The same where no system call moves frames.
    ///
    /// # Safety
    /// Any call is safe.
    #[cfg(not(target_os = "linux"))]
    pub(crate) unsafe fn move_frames(&self, _: Range<usize>, _: &Self, _: usize) -> bool {
        false
    }

    /// Give back the frames of a range (multiples of the system's page): it reads as zero afterwards. The system takes a
    /// part of a huge frame back when the rest follows or when it runs short itself.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    pub(crate) unsafe fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        if cfg!(test) {
            self.protect(range.clone(), libc::PROT_NONE).expect("a part of a mapping");
        }
        // What stays of a block, or comes back alone, has small frames.
        self.note(&range, false);
        self.mark(range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK).min(self.bytes), false);
        // SAFETY: within the mapping; the caller keeps references away.
        let start = unsafe { self.start.as_ptr().add(range.start) };
        // SAFETY: as above. It cannot fail for a private mapping that is there and not locked.
        unsafe { libc::madvise(start.cast(), range.len(), libc::MADV_DONTNEED) };
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // SAFETY: mapped in `reserve` with this length, unmapped once; no reference outlives its owner.
        unsafe { libc::munmap(self.mapped.as_ptr(), self.all) };
        BLOCKS.fetch_sub(self.bytes.div_ceil(BLOCK), Ordering::Relaxed);
    }
}
