//! What a pager did and holds.

use crate::FileFigures;
use std::time::Duration;

/// Figures of a pager since it was made. Sizes are bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// In allocations.
    pub allocated: usize,
    /// What may be resident at once.
    pub capacity: usize,
    /// In memory: a frame, or the right to one.
    pub resident: usize,
    /// The most that ever was.
    pub high_water: usize,
    /// Held now.
    pub held: usize,
    /// In the tier below alone.
    pub away: usize,
    /// Brought in before anybody asked, and not asked for yet.
    pub ahead: usize,
    /// Pages that were asked for and there.
    pub hits: u64,
    /// Pages that were asked for and had to be waited for.
    pub faults: u64,
    /// Pages that were brought in before they were asked for.
    pub prefetched: u64,
    /// Those of them that were then asked for.
    pub prefetch_hits: u64,
    /// Pages whose frame was given back.
    pub evictions: u64,
    /// Copied to the tier below.
    pub stored: u64,
    /// Brought back from there.
    pub loaded: u64,
    /// Time that callers waited for pages to come or to leave.
    pub stall: Duration,
    /// The file at the end of the tiers, where there is one: what is stored in it, its high water, its fragmentation.
    pub file: Option<FileFigures>,
}

/// The same in the books: pages where [`Stats`] has bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) allocated: usize,
    pub(crate) high_water: usize,
    pub(crate) hits: u64,
    pub(crate) faults: u64,
    pub(crate) prefetched: u64,
    pub(crate) prefetch_hits: u64,
    pub(crate) evictions: u64,
    pub(crate) stored: u64,
    pub(crate) loaded: u64,
    pub(crate) stall: Duration,
}
