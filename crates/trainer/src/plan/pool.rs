//! The pool of the CPU backend, without its memory: which freed block serves which allocation, and when blocks go back
//! to the system. `rankfold_cpu`'s storage says why it is so; `tests/suite/plan.rs` holds this to it.
//!
//! A block that was never written to its end is not in memory to its end: of each, the most bytes that were ever asked
//! of it are counted.

use std::collections::BTreeMap;

/// The least block.
const ALIGN: u64 = 64;
/// What is kept beyond 5/4 of the most that was ever live.
pub(super) const SLACK: u64 = 16 << 20;

/// A block, live or free.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    class: u64,
    touched: u64,
}

/// Free blocks by class, and bytes of all blocks.
#[derive(Debug)]
pub(super) struct Pool {
    /// What is kept beyond 5/4 of the peak.
    slack: u64,
    free: BTreeMap<u64, Vec<Block>>,
    /// In whole classes: live now, the most that ever were, and free.
    live: u64,
    peak: u64,
    pooled: u64,
    /// Bytes of all blocks that were ever written.
    pub resident: u64,
}

/// The least of (8 … 15)·2ⁿ that holds `bytes`.
fn class(bytes: u64) -> u64 {
    let bytes = bytes.max(ALIGN);
    bytes.next_multiple_of(1 << (bytes.ilog2() - 3))
}

impl Default for Pool {
    fn default() -> Self {
        Self { slack: SLACK, free: BTreeMap::new(), live: 0, peak: 0, pooled: 0, resident: 0 }
    }
}

impl Pool {
    /// The small blocks of a pool whose large ones are paged: these are given back first, and so the small ones never.
    pub(super) fn of_small_blocks() -> Self {
        Self { slack: u64::MAX, ..Self::default() }
    }

    pub(super) fn take(&mut self, bytes: u64) -> Block {
        let class = class(bytes);
        let found = self.free.range(class..=class + class / 4).next().map(|(class, _)| *class);
        let mut block = match found.and_then(|found| self.remove(found)) {
            Some(block) => block,
            None => {
                let live = self.live + class;
                let peak = live.max(self.peak);
                self.shrink((peak + peak / 4).saturating_add(self.slack).saturating_sub(live));
                Block { class, touched: 0 }
            }
        };
        self.live += block.class;
        self.peak = self.peak.max(self.live);
        self.resident += bytes.saturating_sub(block.touched);
        block.touched = block.touched.max(bytes);
        block
    }

    pub(super) fn give(&mut self, block: Block) {
        self.live -= block.class;
        self.pooled += block.class;
        self.free.entry(block.class).or_default().push(block);
    }

    /// Bytes in whole classes: live, the most that ever were, and free.
    #[cfg(test)]
    pub(super) fn classes(&self) -> [u64; 3] {
        [self.live, self.peak, self.pooled]
    }

    fn remove(&mut self, class: u64) -> Option<Block> {
        let blocks = self.free.get_mut(&class)?;
        let block = blocks.pop()?;
        if blocks.is_empty() {
            self.free.remove(&class);
        }
        self.pooled -= block.class;
        Some(block)
    }

    fn shrink(&mut self, pooled: u64) {
        while self.pooled > pooled {
            let largest = self.free.last_key_value().map(|(class, _)| *class);
            let Some(block) = largest.and_then(|class| self.remove(class)) else { break };
            self.resident -= block.touched;
        }
    }
}
