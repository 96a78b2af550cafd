//! The pager's books: every page's place, and which pages may leave.

use crate::Memory;
use crate::extents::{Extent, Extents};
use crate::forecast::{Forecast, PageId};
use crate::stats::Counters;
use crate::sync::Arc;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where a page's bytes are.
///
/// ```text
///   Empty ──hold──▶ Resident ──store──▶ Resident, kept ──leave──▶ Kept
///     ▲                │  ▲                                        │
///     └── leave, clean ┘  └──────────────── load ──────────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere: it was never written, or is no longer wanted, and reads as zero.
    Empty,
    /// In memory.
    Resident,
    /// In memory, and being copied to the tier below: to be read, not written.
    Storing,
    /// In the tier below alone.
    Kept,
    /// On its way from there; its frame is taken already.
    Loading,
}

/// A page in the books.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) place: Place,
    /// Holds on it: while there are any it does not leave.
    pub(crate) holds: u32,
    /// Written since it was stored or loaded.
    pub(crate) dirty: bool,
    /// The tier below has a copy; where the page is not dirty, a true one.
    pub(crate) kept: bool,
    /// Not needed for long, as its owner says: it leaves before others, or with its block.
    pub(crate) cold: bool,
    /// Its bytes are not wanted at all: it leaves before all others, or with its block, and at no cost.
    pub(crate) dead: bool,
    /// It was brought in before anybody asked.
    pub(crate) ahead: bool,
}

impl Page {
    const EMPTY: Self =
        Self { place: Place::Empty, holds: 0, dirty: false, kept: false, cold: false, dead: false, ahead: false };

    /// It is in memory, does not move, and nobody holds it.
    pub(crate) fn may_leave(&self) -> bool {
        self.place == Place::Resident && self.holds == 0
    }
}

/// Consecutive pages of one allocation.
pub(crate) struct Run<M: Memory> {
    pub(crate) region: Arc<M::Region>,
    /// In the allocation.
    pub(crate) within: Range<usize>,
    /// In the table.
    pub(crate) pages: Range<PageId>,
}

/// All pages of a pager.
pub(crate) struct Table<M: Memory> {
    pages: Vec<Page>,
    /// Regions by their first page.
    regions: BTreeMap<PageId, (Arc<M::Region>, Extent)>,
    /// Which page numbers are taken.
    numbers: Extents,
    pub(crate) forecast: Forecast,
    pub(crate) counters: Counters,
    /// Pages with a frame.
    pub(crate) resident: usize,
    /// Pages that are held.
    pub(crate) held: usize,
    /// Pages whose only copy is in the tier below.
    pub(crate) away: usize,
    /// Pages that were brought in and not asked for yet.
    pub(crate) ahead: usize,
}

impl<M: Memory> Default for Table<M> {
    fn default() -> Self {
        Self {
            pages: Vec::new(),
            regions: BTreeMap::new(),
            numbers: Extents::default(),
            forecast: Forecast::default(),
            counters: Counters::default(),
            resident: 0,
            held: 0,
            away: 0,
            ahead: 0,
        }
    }
}

impl<M: Memory> Table<M> {
    /// Enter a region of `pages` pages (1 or more), empty; the number of its first.
    pub(crate) fn enter(&mut self, region: Arc<M::Region>, pages: usize) -> PageId {
        let numbers = self.numbers.reserve(pages);
        let end = numbers.first as usize + pages;
        assert!(PageId::try_from(end).is_ok(), "fewer than 2³² pages");
        if self.pages.len() < end {
            self.pages.resize(end, Page::EMPTY);
        }
        let first = numbers.first as PageId;
        self.forecast.forget(first..end as PageId);
        self.regions.insert(first, (region, numbers));
        self.counters.allocated += pages;
        first
    }

    /// Take a region out: none of its pages is held or on its way.
    pub(crate) fn leave(&mut self, first: PageId) -> Option<Arc<M::Region>> {
        let (region, numbers) = self.regions.remove(&first)?;
        for page in &mut self.pages[first as usize..first as usize + numbers.pages] {
            self.resident -= usize::from(page.place == Place::Resident);
            self.away -= usize::from(page.place == Place::Kept);
            self.ahead -= usize::from(page.ahead);
            *page = Page::EMPTY;
        }
        self.counters.allocated -= numbers.pages;
        self.numbers.free(numbers);
        Some(region)
    }

    pub(crate) fn page(&self, id: PageId) -> &Page {
        &self.pages[id as usize]
    }

    pub(crate) fn page_mut(&mut self, id: PageId) -> &mut Page {
        &mut self.pages[id as usize]
    }

    /// Somebody asks for the pages of a range, and holds them from now on.
    pub(crate) fn hold(&mut self, pages: Range<PageId>) {
        for id in pages {
            let page = &mut self.pages[id as usize];
            self.held += usize::from(page.holds == 0);
            page.holds += 1;
            let ahead = page.ahead;
            (page.cold, page.dead, page.ahead) = (false, false, false);
            self.ahead -= usize::from(ahead);
            self.counters.prefetch_hits += u64::from(ahead);
            match page.place {
                // A page that was never written is there as soon as it has a frame.
                Place::Resident | Place::Storing | Place::Empty => self.counters.hits += 1,
                Place::Kept | Place::Loading => self.counters.faults += 1,
            }
            self.forecast.touch(id);
        }
    }

    /// And no longer does.
    pub(crate) fn unhold(&mut self, pages: Range<PageId>) {
        for id in pages {
            let page = &mut self.pages[id as usize];
            page.holds -= 1;
            self.held -= usize::from(page.holds == 0);
        }
    }

    /// A page's bytes are there, before anybody asked where nobody holds it.
    pub(crate) fn arrive(&mut self, id: PageId) {
        let page = &mut self.pages[id as usize];
        let ahead = page.holds == 0;
        (page.place, page.dirty, page.ahead) = (Place::Resident, false, ahead);
        self.ahead += usize::from(ahead);
        self.counters.prefetched += u64::from(ahead);
    }

    /// The longest run from `pages.start` within `pages`, of at most `most` pages, all of one allocation and in `place`.
    pub(crate) fn run(&self, pages: Range<PageId>, most: usize, place: Place) -> Option<Run<M>> {
        self.run_of(pages, most, |page| page.place == place)
    }

    /// The same of pages that `are` alike in another way.
    pub(crate) fn run_of(&self, pages: Range<PageId>, most: usize, are: impl Fn(&Page) -> bool) -> Option<Run<M>> {
        let (&first, (region, Extent { pages: len, .. })) = self.regions.range(..=pages.start).next_back()?;
        let end = pages.end.min(first + *len as PageId).min(pages.start.saturating_add(most as PageId));
        let same = (pages.start..end).take_while(|id| are(&self.pages[*id as usize])).count();
        let (start, end) = (pages.start, pages.start + same as PageId);
        let within = (start - first) as usize..(end - first) as usize;
        (same > 0).then(|| Run { region: region.clone(), within, pages: start..end })
    }

    /// The pages that lose least by leaving: the dead, then the cold, then those expected farthest ahead, none of which
    /// sooner than in `horizon` touches. As many as `count` where there are so many, and a few more where whole blocks of
    /// `block` pages leave. A block leaves as the one of its pages does that loses most, and not while one is held or
    /// moves: parts of one leave if nothing else can. Only those that need no store, if `clean`.
    pub(crate) fn leavers(&self, count: usize, horizon: u64, clean: bool, block: usize) -> Vec<PageId> {
        // What cannot be stored keeps its block from leaving as a whole.
        let block = if clean { 1 } else { block };
        if count == 0 {
            return Vec::new();
        }
        let mut found = Vec::new();
        for (first, (_, Extent { pages: len, .. })) in &self.regions {
            let pages = *first..*first + *len as PageId;
            for start in pages.clone().step_by(block) {
                let end = pages.end.min(start + block as PageId);
                let leaving = self.leaving(start..end, clean).filter(|(soonest, _)| *soonest > horizon);
                found.extend(leaving.map(|(_, order)| (order, start, end)));
            }
        }
        if found.is_empty() && block > 1 {
            return self.leavers(count, horizon, clean, 1);
        }
        let farthest = |a: &(u64, PageId, PageId), b: &(u64, PageId, PageId)| b.cmp(a);
        if found.len() > count {
            found.select_nth_unstable_by(count, farthest);
            found.truncate(count);
        }
        found.sort_unstable_by(farthest);
        let mut leavers: Vec<PageId> = Vec::new();
        for (_, start, end) in found {
            if leavers.len() >= count {
                break;
            }
            leavers.extend((start..end).filter(|id| self.page(*id).may_leave()));
        }
        // In the order of addresses, so that neighbours leave in one go.
        leavers.sort_unstable();
        leavers
    }

    /// Where all of the pages that are in memory may leave: in how many touches the first of them is expected (a dead
    /// one will then need a frame again), and the order in which they leave, the greatest first.
    fn leaving(&self, pages: Range<PageId>, clean: bool) -> Option<(u64, u64)> {
        let mut first: Option<(u64, u64)> = None;
        for id in pages {
            let page = self.page(id);
            if matches!(page.place, Place::Empty | Place::Kept) {
                continue;
            }
            if !page.may_leave() || (clean && page.dirty) {
                return None;
            }
            let distance = self.forecast.distance(id);
            let (soonest, order) = match (page.dead, page.cold) {
                (true, _) => (distance, u64::MAX),
                (_, true) => (u64::MAX, u64::MAX - 1),
                _ => (distance, distance.min(u64::MAX - 2)),
            };
            first = Some(first.map_or((soonest, order), |first| (first.0.min(soonest), first.1.min(order))));
        }
        first
    }

    /// The pages of the block of `block` pages of its allocation in which a page lies.
    pub(crate) fn block_of(&self, id: PageId, block: usize) -> Range<PageId> {
        let Some((&first, (_, Extent { pages: len, .. }))) = self.regions.range(..=id).next_back() else {
            return id..id;
        };
        let start = id - (id - first) % block as PageId;
        start..(first + *len as PageId).min(start + block as PageId)
    }

    /// All runs within a range of pages that `are` alike.
    pub(crate) fn runs(&self, pages: Range<PageId>, are: impl Fn(&Page) -> bool) -> Vec<Run<M>> {
        let (mut runs, mut at) = (Vec::new(), pages.start);
        while at < pages.end {
            let run = self.run_of(at..pages.end, usize::MAX, &are);
            at = run.as_ref().map_or(at + 1, |run| run.pages.end);
            runs.extend(run);
        }
        runs
    }

    /// The bytes of a page are no longer wanted, where nobody holds it.
    pub(crate) fn discard(&mut self, id: PageId) {
        let page = &mut self.pages[id as usize];
        if page.holds > 0 {
            return;
        }
        (page.dirty, page.kept, page.dead) = (false, false, page.place == Place::Resident);
        if page.place == Place::Kept {
            page.place = Place::Empty;
            self.away -= 1;
        }
    }

    /// A page that is in memory and clean gives its frame back.
    pub(crate) fn drop_frame(&mut self, id: PageId) {
        let page = &mut self.pages[id as usize];
        debug_assert!(page.may_leave() && !page.dirty);
        page.place = if page.kept { Place::Kept } else { Place::Empty };
        self.ahead -= usize::from(std::mem::take(&mut page.ahead));
        self.away += usize::from(page.kept);
        self.resident -= 1;
        self.counters.evictions += 1;
    }
}
