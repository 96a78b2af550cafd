//! Address space of the process, with frames or without.
//!
//! A [`Space`] is reserved at one go and never moves. The system puts a zeroed frame behind a part of it when that is
//! first touched, and takes it back when told ([`Space::release`]); the addresses stay. A hole of one page of the
//! system behind each space turns a stray access into a fault at once; in tests, so does every part without frames.
//!
//! Frames of 4 KiB are dear: each is a fault, and one of the pieces of a disk's request. So an aligned block of 2 MiB
//! that is brought in as a whole is marked for one huge frame, where the system has those (Linux's transparent huge
//! pages). Every other block is marked against it: a huge frame there would take more memory than the books say. For
//! 128 MiB an AMD EPYC Zen 4 takes 33 ms to put small frames behind addresses and 7 to take them back, 10 and 0.4 with
//! huge ones; direct I/O runs half as fast again in them, and beside two busy threads, on the virtual machine of an AMD
//! EPYC Zen 3 whose host handles a request's pieces, four times as fast (0.4 GB/s against 1.7).
//!
//! Where small frames were once, the system keeps their table, and puts no huge frame in its place: such a block is
//! mapped anew before it comes as a whole. Each that is becomes a mapping of its own in the system's books, so this
//! ends where there are many blocks ([`MAPPINGS`]).

use crate::{Error, Result};
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// Reserved addresses: readable and writable, and not mapped to any file.
#[derive(Debug)]
pub(crate) struct Space {
    /// What the system gave, and how much: up to a block more on either side.
    mapped: NonNull<libc::c_void>,
    all: usize,
    start: NonNull<u8>,
    bytes: usize,
    /// Of each block, which frames it was given: a [`Frame`].
    frames: Box<[AtomicU8]>,
}

/// What a block was given last.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    /// Nothing, and the system has no table of small frames for it.
    Bare,
    /// A huge frame, where the system had one, of which no part has left.
    Huge,
    /// Small frames, of which some may be there, and the system's table is.
    Small,
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

/// The most mappings in the system's books, which grant a process 65530, that pagers may make: what was moved or mapped
/// anew is one of its own, each block, and where parts of blocks are moved, each page.
pub(crate) const MAPPINGS: usize = 1 << 14;

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
        let frames = (0..bytes.div_ceil(BLOCK)).map(|_| AtomicU8::new(Frame::Bare as u8)).collect();
        let space = Self { mapped, all, start, bytes, frames };
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
    ///
    /// Errors: addresses that the system does not grant again.
    ///
    /// # Safety
    /// No part of the range has frames, and nobody has a reference into it.
    pub(crate) unsafe fn open(&self, range: Range<usize>) -> Result<()> {
        let (bytes, access) = (range.len(), libc::PROT_READ | libc::PROT_WRITE);
        let failed = |source| Error::Address { bytes, source };
        if cfg!(test) {
            self.protect(range.clone(), access).map_err(failed)?;
        }
        let whole = range.start.next_multiple_of(BLOCK)..range.end / BLOCK * BLOCK;
        if whole.is_empty() {
            // Of a block that once was whole, perhaps.
            self.mark(range.clone(), false);
            self.note(&range, Frame::Small);
            return Ok(());
        }
        let edges = [range.start..whole.start, whole.end..range.end];
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            self.mark(edge.clone(), false);
            self.note(&edge, Frame::Small);
        }
        for block in whole.clone().step_by(BLOCK).map(|start| start..start + BLOCK) {
            if self.are(&block, Frame::Small) {
                if Self::blocks() > MAPPINGS {
                    continue;
                }
                // SAFETY: the caller's condition.
                unsafe { self.map_anew(block.clone(), access) }.map_err(failed)?;
            }
            self.note(&block, Frame::Huge);
        }
        self.mark(whole, true);
        Ok(())
    }

    /// The blocks that a range touches.
    fn blocks_of(&self, range: &Range<usize>) -> Range<usize> {
        range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK).min(self.bytes)
    }

    /// Of the blocks that a range touches, what each was given.
    fn given(&self, range: &Range<usize>) -> impl Iterator<Item = &AtomicU8> {
        self.frames[range.start / BLOCK..range.end.div_ceil(BLOCK)].iter()
    }

    /// Note of all blocks that a range touches what they were given.
    fn note(&self, range: &Range<usize>, frame: Frame) {
        self.given(range).for_each(|block| block.store(frame as u8, Ordering::Relaxed));
    }

    /// Whether all blocks that a range touches were given that.
    fn are(&self, range: &Range<usize>, frame: Frame) -> bool {
        self.given(range).all(|block| block.load(Ordering::Relaxed) == frame as u8)
    }

    /// Whether a range is made of whole blocks, each in a huge frame as far as the system had those.
    pub(crate) fn is_huge(&self, range: &Range<usize>) -> bool {
        let is_whole = range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK);
        is_whole && self.are(range, Frame::Huge)
    }

    /// Addresses without frames, and without the system's tables for them.
    ///
    /// Errors: the system grants none. The addresses may then be nobody's.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    unsafe fn map_anew(&self, range: Range<usize>, access: libc::c_int) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: within the mapping.
        let at = unsafe { self.start.as_ptr().add(range.start) };
        // SAFETY: these addresses are the space's; the caller keeps references away.
        match unsafe { libc::mmap(at.cast(), range.len(), access, flags, -1, 0) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Put frames behind an opened range now, at one go: a fault for each costs several times as much. Where the
    /// system has no call for it (Linux before 5.14), they come as they are touched.
    pub(crate) fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        self.advise(range, libc::MADV_POPULATE_WRITE);
    }

    /// Say of a range whether it may have huge frames. Where the system has none, there is nothing to say.
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

    /// Move the frames of a range behind addresses of another space, `range.len()` from `at` on, that have none
    /// (multiples of the system's page): whether they are there now. If not, they are where they were. The range then
    /// has none.
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
            // SAFETY: within the other space's mapping, where nothing is referred to.
            let mapped = unsafe { to.map_anew(at..at + len, libc::PROT_READ | libc::PROT_WRITE) };
            mapped.expect("the addresses of a space are its own");
            to.mark(at..at + len, false);
            return false;
        }
        let is_huge = self.is_huge(&range);
        if !is_huge && !self.are(&range, Frame::Small) {
            self.mark(self.blocks_of(&range), false);
        }
        to.note(&(at..at + len), if is_huge { Frame::Huge } else { Frame::Small });
        self.note(&range, if is_huge { Frame::Bare } else { Frame::Small });
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

    /// Give back the frames of a range (multiples of the system's page): it reads as zero afterwards. The system takes
    /// a part of a huge frame back when the rest follows or when it runs short itself.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    pub(crate) unsafe fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range beyond its space");
        if cfg!(test) {
            self.protect(range.clone(), libc::PROT_NONE).expect("a part of a mapping");
        }
        // What stays of a block, or comes back alone, has small frames.
        self.note(&range, if self.is_huge(&range) { Frame::Bare } else { Frame::Small });
        self.mark(self.blocks_of(&range), false);
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
