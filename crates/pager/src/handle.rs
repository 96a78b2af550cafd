//! What a program holds of a pager: the pager, its allocations, and pins on them.

use crate::core::Core;
use crate::forecast::PageId;
use crate::limit::Limit;
use crate::sync::{Arc, thread};
use crate::worker::work;
use crate::{Error, FileOptions, Host, Memory, Result, Stats};
use std::fmt::{Debug, Formatter};
use std::ops::{Deref, DerefMut, Range, RangeInclusive};

/// Bytes of a page of the host's memory: a power of two within this.
pub const PAGES: RangeInclusive<usize> = 64 << 10..=4 << 20;

/// How a pager of the host's memory is made.
#[derive(Debug)]
pub struct Options {
    /// Bytes of a page: a power of two within [`PAGES`].
    pub page: usize,
    /// What may be in memory at once.
    pub limit: Limit,
    /// Where pages go that are not; nowhere, if there is no file: what does not fit is then an error.
    pub file: Option<FileOptions>,
    /// Bytes that are brought in ahead of their use; never more than three eighths of the limit, but for what completes a
    /// block of the memory's.
    pub look_ahead: usize,
}

impl Options {
    /// Pages of 256 KiB, 32 MiB looked ahead.
    pub fn new(limit: Limit, file: Option<FileOptions>) -> Self {
        Self { page: 256 << 10, limit, file, look_ahead: 32 << 20 }
    }
}

/// A pager. Clones are one pager.
pub struct Pager<M: Memory = Host>(Arc<Shared<M>>);

/// A core and its workers, which end with it.
struct Shared<M: Memory> {
    core: Arc<Core<M>>,
    workers: Vec<thread::JoinHandle<()>>,
}

impl<M: Memory> Drop for Shared<M> {
    fn drop(&mut self) {
        self.core.close();
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing more to say.
            let _ = worker.join();
        }
    }
}

impl<M: Memory> Clone for Pager<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: Memory> Debug for Pager<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pager").field(&self.0.core).finish()
    }
}

impl Pager<Host> {
    /// A pager of the host's memory, its file opened and tried.
    ///
    /// Errors: a page size that it does not have; a capacity below a page; a file that cannot be made, written or read.
    pub fn new(options: Options) -> Result<Self> {
        let Options { page, limit, file, look_ahead } = options;
        check_page(page)?;
        Self::over(Host::new(page, file.as_ref())?, page, limit, look_ahead)
    }
}

/// That a page has one of the sizes.
pub(crate) fn check_page(page: usize) -> Result<()> {
    match page.is_power_of_two() && PAGES.contains(&page) {
        true => Ok(()),
        false => Err(Error::PageSize { found: page }),
    }
}

impl<M: Memory> Pager<M> {
    /// A pager of any memory whose pages are of `page` bytes.
    ///
    /// Errors: a capacity below a page.
    pub fn over(memory: M, page: usize, limit: Limit, look_ahead: usize) -> Result<Self> {
        let found = limit.bytes();
        if found < page {
            return Err(Error::Capacity { found, page });
        }
        let core = Arc::new(Core::new(memory, page, limit, look_ahead / page));
        let worker = |_| {
            let core = core.clone();
            #[cfg(not(feature = "shuttle"))]
            return thread::Builder::new().name("rankfold-pager".into()).spawn(move || work(&*core)).ok();
            #[cfg(feature = "shuttle")]
            return Some(thread::spawn(move || work(&*core)));
        };
        let workers = (0..core.memory.movers()).filter_map(worker).collect();
        Ok(Self(Arc::new(Shared { core, workers })))
    }

    /// Bytes of a page.
    pub fn page(&self) -> usize {
        self.0.core.page
    }

    /// The memory behind it.
    pub fn memory(&self) -> &M {
        &self.0.core.memory
    }

    /// `bytes` of memory, in whole pages, that in the host's memory reads as zero until it is written. It takes addresses
    /// now and frames when it is pinned.
    pub fn alloc(&self, bytes: usize) -> Result<Allocation<M>> {
        let pages = bytes.div_ceil(self.page()).max(1);
        let (region, first) = self.0.core.enter(pages)?;
        let entered = Entered { pager: self.clone(), region, pages: first..first + pages as PageId };
        Ok(Allocation { entered: Arc::new(entered), bytes })
    }

    /// Change what may be in memory at once; what is too much leaves before this returns.
    ///
    /// Errors: too much of it is held. The new limit then holds from now on all the same.
    pub fn set_limit(&self, mut limit: Limit) -> Result<()> {
        limit.measure(self.stats().resident + self.memory().aside());
        let found = limit.bytes();
        if found < self.page() {
            return Err(Error::Capacity { found, page: self.page() });
        }
        self.0.core.set_limit(limit)
    }

    /// Let every page leave that nobody holds and that is not on its way.
    ///
    /// Errors: a tier below that cannot take one; that one and others may then stay.
    pub fn vacate(&self) -> Result<()> {
        self.0.core.vacate()
    }

    /// What it did and holds.
    pub fn stats(&self) -> Stats {
        self.0.core.stats()
    }
}

/// An allocation's pages in the books, until the allocation and all holds on it are gone.
struct Entered<M: Memory> {
    pager: Pager<M>,
    region: Arc<M::Region>,
    pages: Range<PageId>,
}

impl<M: Memory> Drop for Entered<M> {
    fn drop(&mut self) {
        self.pager.0.core.leave(self.pages.clone());
    }
}

/// What a pin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Many at once.
    Read,
    /// Alone.
    Write,
}

/// Contiguous memory that never moves. Freed when it is dropped.
pub struct Allocation<M: Memory = Host> {
    entered: Arc<Entered<M>>,
    bytes: usize,
}

impl<M: Memory> Debug for Allocation<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Allocation").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl<M: Memory> Allocation<M> {
    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its addresses.
    pub fn region(&self) -> &M::Region {
        &self.entered.region
    }

    fn core(&self) -> &Core<M> {
        &self.entered.pager.0.core
    }

    /// The pages that a range of bytes touches.
    fn pages(&self, range: &Range<usize>) -> Result<Range<PageId>> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Range { start: range.start, end: range.end, available: self.bytes });
        }
        let (page, first) = (self.core().page, self.entered.pages.start);
        let end = if range.is_empty() { range.start / page } else { range.end.div_ceil(page) };
        Ok(first + (range.start / page) as PageId..first + end as PageId)
    }

    /// The same, as far as the range exists.
    fn pages_within(&self, range: Range<usize>) -> Range<PageId> {
        let range = range.start.min(self.bytes)..range.end.min(self.bytes);
        self.pages(&range).unwrap_or_default()
    }

    /// Bring the pages of a range of bytes into memory and keep them there while the [`Hold`] lives. `Write` also says
    /// that their bytes will change.
    ///
    /// It borrows nothing, and so promises less than [`Allocation::pin`]: that nobody writes what another reads is the
    /// caller's to see to.
    ///
    /// Errors: a range beyond the allocation; no room, and nothing that may leave; a tier that fails. Nothing is then
    /// held, and no byte is lost that another tier still has.
    pub fn hold(&self, range: Range<usize>, access: Access) -> Result<Hold<M>> {
        let pages = self.pages(&range)?;
        self.core().hold(pages.clone(), access)?;
        Ok(Hold { entered: self.entered.clone(), pages })
    }

    /// Bring a range in soon, in the background, as far as it exists and fits; nothing is promised.
    pub fn prefetch(&self, range: Range<usize>) {
        self.core().want(self.pages_within(range));
    }

    /// Say that a range will not be needed for long, as far as it exists: its pages leave before others,
    /// where no others of their blocks are wanted sooner.
    pub fn cool(&self, range: Range<usize>) {
        self.core().cool(self.pages_within(range));
    }

    /// Say that the bytes of a range are no longer wanted: what lies in whole pages of it may read as anything from now
    /// on, and leaves at no cost, but not before its block does. Pages that a [`Hold`] keeps stay what they are.
    pub fn discard(&mut self, range: Range<usize>) {
        let (page, first) = (self.core().page, self.entered.pages.start);
        // The last page is whole where the allocation ends in it.
        let end = if range.end >= self.bytes { self.bytes.div_ceil(page) } else { range.end / page };
        let start = range.start.div_ceil(page);
        if start < end {
            self.core().discard(first + start as PageId..first + end as PageId);
        }
    }
}

/// Keeps the pages of a range where they are until it is dropped.
pub struct Hold<M: Memory = Host> {
    entered: Arc<Entered<M>>,
    pages: Range<PageId>,
}

impl<M: Memory> Debug for Hold<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl<M: Memory> Drop for Hold<M> {
    fn drop(&mut self) {
        self.entered.pager.0.core.unhold(self.pages.clone());
    }
}

impl Allocation<Host> {
    /// The first byte's address, at a multiple of a page of the system. What lies there may be touched under a [`Hold`]
    /// alone.
    pub fn start(&self) -> *mut u8 {
        self.region().start()
    }

    /// A range of bytes, to read.
    pub fn pin(&self, range: Range<usize>) -> Result<Pin<'_>> {
        let hold = self.hold(range.clone(), Access::Read)?;
        // SAFETY: within the region, in pages that the hold keeps in memory; nobody writes while self is borrowed.
        let bytes = unsafe { std::slice::from_raw_parts(self.start().add(range.start), range.len()) };
        Ok(Pin { bytes, _hold: hold })
    }

    /// A range of bytes, to write.
    pub fn pin_mut(&mut self, range: Range<usize>) -> Result<PinMut<'_>> {
        let hold = self.hold(range.clone(), Access::Write)?;
        // SAFETY: as above; self is borrowed mutably.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start().add(range.start), range.len()) };
        Ok(PinMut { bytes, _hold: hold })
    }
}

/// Bytes that stay where they are while it lives.
#[derive(Debug)]
pub struct Pin<'a> {
    bytes: &'a [u8],
    _hold: Hold,
}

impl Deref for Pin<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

/// The same, to write.
#[derive(Debug)]
pub struct PinMut<'a> {
    bytes: &'a mut [u8],
    _hold: Hold,
}

impl Deref for PinMut<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl DerefMut for PinMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}
