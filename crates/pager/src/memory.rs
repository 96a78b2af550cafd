//! The seam between the pager's bookkeeping and the memory whose pages it keeps.

use crate::{FileFigures, Result};
use std::fmt::Debug;
use std::ops::Range;

/// Memory in which pages are used, over a slower tier in which they are kept meanwhile.
///
/// The pager calls `store` for pages for which no call that holds them for writing has returned, and lets none return before
/// it is done; `load` and `release` for pages for which no such call of any kind has; and never two of them at once for the
/// same page. They move bytes, and may take long: no lock is kept over them, but over `commit`, `release` and `forget`.
pub trait Memory: Debug + Send + Sync + 'static {
    /// The addresses of one allocation, and its place in the tier below: free when it is dropped, its frames being
    /// released by then.
    type Region: Debug + Send + Sync;

    /// Addresses for `pages` pages, without frames.
    fn reserve(&self, pages: usize) -> Result<Self::Region>;

    /// Frames for pages that have none and were never stored. What they hold is unspecified (in the host's memory, zero).
    fn commit(&self, region: &Self::Region, pages: Range<usize>) -> Result<()>;

    /// Copy pages to the tier below. Where it fails, the pages are what they were.
    fn store(&self, region: &Self::Region, pages: Range<usize>) -> Result<()>;

    /// Bring pages back that were stored, into frames that this takes. Where it fails, what the tier below holds is what it was.
    fn load(&self, region: &Self::Region, pages: Range<usize>) -> Result<()>;

    /// Give back the frames of pages, as far as they have any: a failed `commit` or `load` may have left some.
    fn release(&self, region: &Self::Region, pages: Range<usize>);

    /// Bytes of frames that were given back and are kept for pages to come. `commit` and `load` use them, or let go of as
    /// many as they take.
    fn aside(&self) -> usize {
        0
    }

    /// Keep no more than so many bytes of them.
    fn keep_aside(&self, _most: usize) {}

    /// What the tier below holds of these pages is no longer wanted.
    fn forget(&self, region: &Self::Region, pages: Range<usize>);

    /// Threads that move pages in the background: as many as it takes to keep the tier below busy.
    fn movers(&self) -> usize {
        1
    }

    /// Pages, from a multiple of it on, that had better come and leave together: a power of two.
    fn block(&self) -> usize {
        1
    }

    /// The figures of the file at the end of the tiers, where there is one.
    fn file(&self) -> Option<FileFigures> {
        None
    }
}
