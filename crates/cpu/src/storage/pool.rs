//! Blocks of memory, recycled.
//!
//! Fresh memory costs a page fault every 4 KiB, more than most kernels cost; a training step frees and asks for the
//! same sizes over and over. So freed blocks go to a pool, by size class (eight classes a doubling, so at most an
//! eighth is wasted), and the steady state allocates nothing. Memory is zero when it is new and never uninitialised:
//! a recycled block holds whatever was written before.
//!
//! On a pager, a block is whole pages, which wastes less than one. A freed one is discarded: it keeps its addresses,
//! and its frames until somebody needs them.
//!
//! The pool may grow until live and pooled bytes reach 5/4 of the most that was ever live (and 16 MiB on top, for
//! small programs); an allocation that would pass this gives pooled blocks back first, those on a pager before
//! others, the largest first.

use super::block::{Block, Paging, System};
use super::{ALIGN, HostMemory};
use rankfold_backend::{Error, Result};
use rankfold_pager::{self as pager, Pager};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// Of `live` and `pooled`, what lies on a pager: addresses, whose frames are the pager's to give and take.
    pub paged: usize,
    /// The kernels' working memory, on all threads of the process.
    pub scratch: usize,
}

/// The least class that holds `bytes`: (8 … 15)·2ⁿ, at least 64.
fn class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(ALIGN);
    let step = 1usize << (bytes.ilog2() - 3);
    bytes.checked_next_multiple_of(step)
}

/// A new block of `class` bytes, for `bytes` that were asked for.
fn fresh(class: usize, bytes: usize, pager: Option<&Pager>) -> Result<Block> {
    let out_of_memory = Error::OutOfMemory { bytes };
    match pager {
        None => System::new(class).map(Block::System).ok_or(out_of_memory),
        Some(pager) => pager.alloc(class).map(Block::Paged).map_err(|error| match error {
            pager::Error::Address { .. } => out_of_memory,
            other => Error::paging("alloc", "buffer")(other),
        }),
    }
}

#[derive(Default)]
struct State {
    /// By whether they lie on a pager, and class.
    free: BTreeMap<(bool, usize), Vec<Block>>,
    figures: MemoryFigures,
}

impl State {
    /// A free block of this class, or of one that wastes no more than a quarter of it.
    fn take(&mut self, class: usize, paged: bool) -> Option<Block> {
        let found = *self.free.range((paged, class)..=(paged, class.saturating_add(class / 4))).next()?.0;
        self.remove(found)
    }

    fn remove(&mut self, found: (bool, usize)) -> Option<Block> {
        let blocks = self.free.get_mut(&found)?;
        // The system's memory: the last one used, which caches may still hold. A pager's: the lowest, so that a step that
        // begins with the same free blocks as the one before it takes the same ones, and its pages are foreseen.
        let lowest = if found.0 { (0..blocks.len()).min_by_key(|i| blocks[*i].start()) } else { None };
        let block = match lowest {
            Some(lowest) => Some(blocks.swap_remove(lowest)),
            None => blocks.pop(),
        };
        if blocks.is_empty() {
            self.free.remove(&found);
        }
        self.figures.pooled -= block.as_ref().map_or(0, Block::len);
        block
    }

    /// Drop pooled blocks, the largest first, until at most `pooled` bytes of them are left.
    fn shrink(&mut self, pooled: usize) {
        while self.figures.pooled > pooled {
            let Some((&largest, _)) = self.free.last_key_value() else { break };
            if let Some(block) = self.remove(largest).filter(Block::is_paged) {
                self.figures.paged -= block.len();
            }
        }
    }
}

/// Freed blocks by size class, and the figures.
#[derive(Default)]
pub(crate) struct Pool {
    paging: Option<Paging>,
    state: Mutex<State>,
}

impl Pool {
    /// With buffers on a pager.
    pub(crate) fn paged(paging: Paging) -> Self {
        Self { paging: Some(paging), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes that belong together: a poisoned state is a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of at least `bytes`, its values unspecified.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<HostMemory> {
        let pager = self.paging.as_ref().filter(|paging| bytes >= paging.from).map(|paging| &paging.pager);
        let class = pager.map_or_else(|| class(bytes), |pager| bytes.max(1).checked_next_multiple_of(pager.page()));
        let class = class.ok_or(Error::OutOfMemory { bytes })?;
        let mut state = self.state();
        let block = match state.take(class, pager.is_some()) {
            Some(block) => block,
            None => {
                let live = state.figures.live.saturating_add(class);
                let peak = live.max(state.figures.peak);
                state.shrink(peak.saturating_add(peak / 4 + SLACK).saturating_sub(live));
                let block = fresh(class, bytes, pager).or_else(|_| {
                    state.shrink(0);
                    fresh(class, bytes, pager)
                })?;
                if block.is_paged() {
                    state.figures.paged += block.len();
                }
                block
            }
        };
        state.figures.live += block.len();
        state.figures.peak = state.figures.peak.max(state.figures.live);
        Ok(HostMemory { block: Some(block), bytes, pool: Arc::clone(self) })
    }

    /// Take a block back.
    pub(super) fn put(&self, mut block: Block) {
        block.discard();
        let mut state = self.state();
        state.figures.live -= block.len();
        state.figures.pooled += block.len();
        state.free.entry((block.is_paged(), block.len())).or_default().push(block);
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
        f.debug_struct("Pool").field("paging", &self.paging).field("figures", &self.figures()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Holds;
    use crate::storage::tests::unlimited;

    const PAGE: usize = 64 << 10;

    /// A pool in the system's memory, and one with every buffer on a pager.
    fn pools() -> [Arc<Pool>; 2] {
        [Pool::default(), Pool::paged(Paging { pager: unlimited(), from: 1 })].map(Arc::new)
    }

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
    fn freed_memory_is_recycled_and_counted() {
        for (pool, class) in pools().into_iter().zip([1024, PAGE]) {
            let paged = if class == PAGE { PAGE } else { 0 };
            let start = |memory: &HostMemory| memory.bytes(0..1, &Holds::default()).unwrap().as_ptr();
            let first = pool.take(1000).unwrap();
            assert_eq!(pool.figures(), MemoryFigures { live: class, peak: class, pooled: 0, paged, scratch: 0 });
            let place = start(&first);
            drop(first);
            assert_eq!(pool.figures(), MemoryFigures { live: 0, peak: class, pooled: class, paged, scratch: 0 });
            let second = pool.take(1010).unwrap();
            assert_eq!(start(&second), place);
            assert_eq!(pool.figures(), MemoryFigures { live: class, peak: class, pooled: 0, paged, scratch: 0 });
            drop(second);
            pool.trim();
            assert_eq!(pool.figures(), MemoryFigures { peak: class, ..MemoryFigures::default() });
        }
    }

    #[test]
    fn a_buffer_is_paged_from_its_size_on_whatever_the_pool_holds() {
        let pool = Arc::new(Pool::paged(Paging { pager: unlimited(), from: 2 * PAGE }));
        let sizes = [PAGE, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE];
        let taken = |bytes| {
            let before = pool.figures().paged;
            (pool.take(bytes).unwrap(), pool.figures().paged - before)
        };
        let (buffers, paged): (Vec<_>, Vec<_>) = sizes.map(taken).into_iter().unzip();
        assert_eq!(paged, [0, 0, 2 * PAGE, 3 * PAGE, 3 * PAGE]);
        drop(buffers);
        for bytes in sizes.into_iter().rev() {
            assert_eq!(pool.take(bytes).unwrap().block().is_paged(), bytes >= 2 * PAGE, "{bytes}");
        }
    }

    #[test]
    fn the_pool_stays_within_its_share_of_the_peak() {
        for pool in pools() {
            for i in 1..200 {
                drop(pool.take(i << 20).unwrap());
                let MemoryFigures { live, peak, pooled, .. } = pool.figures();
                assert!(live + pooled <= peak + peak / 4 + SLACK, "{i}: {live} + {pooled} of {peak}");
            }
        }
    }

    #[test]
    fn impossible_sizes_are_an_error() {
        for pool in pools() {
            for bytes in [usize::MAX, usize::MAX / 2, 1 << 60] {
                assert_eq!(pool.take(bytes).unwrap_err(), Error::OutOfMemory { bytes });
            }
        }
    }
}
