//! Host memory behind buffers, recycled.
//!
//! Fresh memory costs a page fault every 4 KiB, more than most kernels cost; a training step frees and asks for the
//! same sizes over and over. So freed blocks go to a pool, by size class (eight classes a doubling, so at most an
//! eighth is wasted), and the steady state allocates nothing. Memory is zero when it is new and never uninitialised:
//! a recycled block holds whatever was written before.
//!
//! The pool may grow until live and pooled bytes reach 5/4 of the most that was ever live (and 16 MiB on top, for
//! small programs); an allocation that would pass this gives pooled blocks back to the system first, the largest
//! first.

use rankfold_backend::{Error, Result, Storage};
use std::alloc::Layout;
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every block starts at a multiple of it: a cache line, an AVX-512 vector.
pub(crate) const ALIGN: usize = 64;

/// What is kept beyond 5/4 of the peak.
const SLACK: usize = 16 << 20;

/// Bytes held by a backend: its buffers', in whole size classes, and its kernels'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// In buffers.
    pub live: usize,
    /// The most that was ever in buffers at once.
    pub peak: usize,
    /// Freed and kept for reuse.
    pub pooled: usize,
    /// The kernels' working memory, on all threads of the process.
    pub scratch: usize,
}

/// A block of the system's memory, zeroed by it.
struct Block {
    /// What the system gave, `ALIGN` bytes longer than the class.
    raw: NonNull<u8>,
    class: usize,
}

// SAFETY: a block is owned memory, not bound to a thread.
unsafe impl Send for Block {}
// SAFETY: a block is read and written through references to its owner alone.
unsafe impl Sync for Block {}

impl Block {
    /// The allocator's zeroed memory is untouched pages only at its natural alignment; hence the slack and the shift.
    fn layout(class: usize) -> Option<Layout> {
        Layout::from_size_align(class.checked_add(ALIGN)?, 16).ok()
    }

    fn new(class: usize) -> Option<Self> {
        // SAFETY: the layout's size is at least ALIGN.
        let raw = NonNull::new(unsafe { std::alloc::alloc_zeroed(Self::layout(class)?) })?;
        Some(Self { raw, class })
    }

    /// The first aligned byte.
    fn start(&self) -> *mut u8 {
        let shift = self.raw.as_ptr().align_offset(ALIGN);
        // SAFETY: the shift is below ALIGN, by which the allocation is longer than the class.
        unsafe { self.raw.as_ptr().add(shift) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let layout = Self::layout(self.class).expect("the layout it was allocated with");
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.raw.as_ptr(), layout) }
    }
}

/// The least class that holds `bytes`: (8 … 15)·2ⁿ, at least 64.
fn class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(ALIGN);
    let step = 1usize << (bytes.ilog2() - 3);
    bytes.checked_next_multiple_of(step)
}

#[derive(Default)]
struct State {
    free: BTreeMap<usize, Vec<Block>>,
    figures: MemoryFigures,
}

impl State {
    /// A free block of this class, or of one that wastes no more than a quarter of it.
    fn take(&mut self, class: usize) -> Option<Block> {
        let found = *self.free.range(class..=class + class / 4).next()?.0;
        self.remove(found)
    }

    fn remove(&mut self, class: usize) -> Option<Block> {
        let blocks = self.free.get_mut(&class)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&class);
        }
        self.figures.pooled -= block.as_ref().map_or(0, |b| b.class);
        block
    }

    /// Drop pooled blocks, the largest first, until at most `pooled` bytes of them are left.
    fn shrink(&mut self, pooled: usize) {
        while self.figures.pooled > pooled {
            let Some((&largest, _)) = self.free.last_key_value() else { break };
            self.remove(largest);
        }
    }
}

/// Freed blocks by size class, and the figures.
#[derive(Default)]
pub(crate) struct Pool(Mutex<State>);

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes that belong together: a poisoned state is a whole one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of at least `bytes`, its values unspecified.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<HostMemory> {
        let out_of_memory = || Error::OutOfMemory { bytes };
        let class = class(bytes).ok_or_else(out_of_memory)?;
        let mut state = self.state();
        let block = match state.take(class) {
            Some(block) => block,
            None => {
                let live = state.figures.live.saturating_add(class);
                let peak = live.max(state.figures.peak);
                state.shrink(peak.saturating_add(peak / 4 + SLACK).saturating_sub(live));
                match Block::new(class) {
                    Some(block) => block,
                    None => {
                        state.shrink(0);
                        Block::new(class).ok_or_else(out_of_memory)?
                    }
                }
            }
        };
        state.figures.live += block.class;
        state.figures.peak = state.figures.peak.max(state.figures.live);
        Ok(HostMemory { block: Some(block), bytes, pool: Arc::clone(self) })
    }

    /// Give all pooled memory back to the system.
    pub(crate) fn trim(&self) {
        self.state().shrink(0);
    }

    pub(crate) fn figures(&self) -> MemoryFigures {
        self.state().figures
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.figures()).finish()
    }
}

/// The storage of a [`rankfold_backend::Buffer`]: a block on loan from the pool.
pub(crate) struct HostMemory {
    /// `None` only while it is dropped.
    block: Option<Block>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl HostMemory {
    fn start(&self) -> *mut u8 {
        self.block.as_ref().map_or(NonNull::dangling().as_ptr(), Block::start)
    }

    /// The bytes asked for, aligned to [`ALIGN`].
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: initialised (zeroed) memory of at least `bytes` bytes, owned by self and borrowed with it.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }
    }

    /// The bytes asked for, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably with self.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let mut state = self.pool.state();
        state.figures.live -= block.class;
        state.figures.pooled += block.class;
        state.free.entry(block.class).or_default().push(block);
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Storage for HostMemory {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_its_bytes_and_wastes_at_most_an_eighth() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, (1 << 30) - 1]) {
            let class = class(bytes).unwrap();
            assert!(class >= bytes && class.saturating_sub(bytes) <= (bytes / 8).max(ALIGN), "{bytes} {class}");
            assert_eq!(super::class(class), Some(class));
        }
        assert_eq!(class(usize::MAX), None);
    }

    #[test]
    fn freed_memory_is_aligned_recycled_and_counted() {
        let pool = Arc::<Pool>::default();
        let mut first = pool.take(1000).unwrap();
        assert!(first.bytes().iter().all(|byte| *byte == 0));
        first.bytes_mut().fill(7);
        let start = first.bytes().as_ptr();
        assert_eq!((start as usize % ALIGN, first.bytes().len()), (0, 1000));
        drop(first);
        assert_eq!(pool.figures(), MemoryFigures { live: 0, peak: 1024, pooled: 1024, scratch: 0 });
        let second = pool.take(1010).unwrap();
        assert_eq!(second.bytes().as_ptr(), start);
        assert_eq!(pool.figures(), MemoryFigures { live: 1024, peak: 1024, pooled: 0, scratch: 0 });
        drop(second);
        pool.trim();
        assert_eq!(pool.figures().pooled, 0);
    }

    #[test]
    fn the_pool_stays_within_its_share_of_the_peak() {
        let pool = Arc::<Pool>::default();
        for i in 1..200 {
            drop(pool.take(i << 20).unwrap());
            let MemoryFigures { live, peak, pooled, .. } = pool.figures();
            assert!(live + pooled <= peak + peak / 4 + SLACK, "{i}: {live} + {pooled} of {peak}");
        }
    }

    #[test]
    fn impossible_sizes_are_an_error() {
        for bytes in [usize::MAX, usize::MAX / 2, 1 << 60] {
            assert_eq!(Arc::<Pool>::default().take(bytes).unwrap_err(), Error::OutOfMemory { bytes });
        }
    }
}
