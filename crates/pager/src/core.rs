//! Holding pages, and moving them.
//!
//! One lock guards the books ([`Table`]); it is never kept while bytes move. A page that moves is marked (`Loading`,
//! `Storing`), and whoever needs it waits for the mark to go. A caller first takes its holds on all its pages, then
//! brings in what is missing, run by run, making room for it (`room`).

use crate::forecast::PageId;
use crate::limit::Limit;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};
use crate::table::{Place, Run, Table};
use crate::worker::Scout;
use crate::{Access, Error, Memory, Result, Stats};
use std::ops::Range;
use std::time::Instant;

/// Pages that move at once.
pub(crate) const BATCH: usize = 32;

/// Bytes of a page in the books, at the most: where it is, when it was used last, its checksum in the file.
pub const BOOKS: usize = 32;

/// Blocks of which memory must hold as many, so that they come and leave whole.
const FEW: usize = 4;

/// The books, with what only their lock's owner may do.
pub(crate) struct State<M: Memory> {
    pub(crate) table: Table<M>,
    pub(crate) limit: Limit,
    /// Moves under way.
    pub(crate) moving: usize,
    /// Pages on their way into memory.
    pub(crate) loading: usize,
    /// Pages that somebody asked to bring in soon.
    pub(crate) wanted: Vec<PageId>,
    /// What the workers saw ahead.
    pub(crate) scout: Scout,
    /// Pages that workers are about to bring in, or bring in.
    pub(crate) coming: usize,
    /// Pages that workers store so that they may leave.
    pub(crate) leaving: usize,
    /// The last move failed.
    failing: bool,
    /// The pager is gone.
    pub(crate) closing: bool,
}

/// A pager without its handles.
pub(crate) struct Core<M: Memory> {
    pub(crate) memory: M,
    pub(crate) page: usize,
    /// The most pages that are brought in ahead of their use.
    look_ahead: usize,
    state: Mutex<State<M>>,
    /// A move ended, or a hold.
    moved: Condvar,
    /// There may be something for a worker.
    work: Condvar,
}

impl<M: Memory> std::fmt::Debug for Core<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("memory", &self.memory).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl<M: Memory> State<M> {
    /// Pages that may be resident at once.
    pub(crate) fn capacity(&self, page: usize) -> usize {
        self.limit.bytes() / page
    }

    /// Pages that leave together: those of a block of the memory's, unless only a few blocks fit.
    pub(crate) fn block(&self, core: &Core<M>) -> usize {
        let block = core.memory.block();
        if self.capacity(core.page) < FEW * block { 1 } else { block }
    }

    /// Pages that may become resident now.
    pub(crate) fn free(&self, page: usize) -> usize {
        self.capacity(page).saturating_sub(self.table.resident)
    }
}

pub(crate) type Guard<'a, M> = MutexGuard<'a, State<M>>;

impl<M: Memory> Core<M> {
    pub(crate) fn new(memory: M, page: usize, limit: Limit, look_ahead: usize) -> Self {
        let state = State {
            table: Table::default(),
            limit,
            moving: 0,
            loading: 0,
            wanted: Vec::new(),
            scout: Scout::default(),
            coming: 0,
            leaving: 0,
            failing: false,
            closing: false,
        };
        Self { memory, page, look_ahead, state: Mutex::new(state), moved: Condvar::new(), work: Condvar::new() }
    }

    pub(crate) fn lock(&self) -> Guard<'_, M> {
        // Nothing panics between two changes that belong together: a poisoned state is a whole one.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Wait until a move ended, or a hold.
    pub(crate) fn wait<'a>(&'a self, state: Guard<'a, M>) -> Guard<'a, M> {
        self.moved.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Wait until there may be work.
    pub(crate) fn idle<'a>(&'a self, state: Guard<'a, M>) -> Guard<'a, M> {
        self.work.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The most pages that may be in memory before anybody asked for them. There must be such a bound: each page ahead
    /// that takes the frame of one farther ahead is right by itself, but together they would turn all of memory into a
    /// window that moves along, and keep nothing from one round to the next.
    pub(crate) fn look_ahead(&self, state: &State<M>) -> usize {
        self.look_ahead.min(state.capacity(self.page) * 3 / 8)
    }

    /// Touches within which a page had better come with others of its block: before half of memory is used once, so that
    /// it hardly keeps a frame from what is wanted sooner.
    pub(crate) fn near(&self, state: &State<M>) -> u64 {
        (state.capacity(self.page) / 2) as u64
    }

    /// There may be something for one more worker.
    pub(crate) fn wake_worker(&self) {
        self.work.notify_one();
    }

    /// The same, as a worker says that is about to move something: not while moves fail, or two workers would wake each
    /// other without end, each trying again what the other gave up.
    pub(crate) fn wake_another(&self, state: &State<M>) {
        if !state.failing {
            self.wake_worker();
        }
    }

    /// The pager is gone: that ends the workers.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_all();
    }

    /// Addresses for `pages` pages; the number of the first.
    ///
    /// Errors: addresses that the system does not grant, or of which the books alone would take all that may be in
    /// memory (a MiB of them is always kept): it grants far more than it has.
    pub(crate) fn enter(&self, pages: usize) -> Result<(Arc<M::Region>, PageId)> {
        if pages.saturating_mul(BOOKS) > self.lock().limit.bytes().max(1 << 20) {
            let source = std::io::ErrorKind::OutOfMemory.into();
            return Err(Error::Address { bytes: pages.saturating_mul(self.page), source });
        }
        let region = Arc::new(self.memory.reserve(pages)?);
        let first = self.lock().table.enter(region.clone(), pages);
        Ok((region, first))
    }

    /// An allocation is gone, and with it every hold on it.
    pub(crate) fn leave(&self, pages: Range<PageId>) {
        let mut state = self.settle(self.lock(), pages.clone());
        // Before the books say that they are free: the region itself goes with its last owner, who knows when.
        for run in state.table.runs(pages.clone(), |page| page.place == Place::Resident) {
            self.memory.release(&run.region, run.within);
        }
        let region = state.table.leave(pages.start);
        drop(state);
        drop(region);
        self.moved.notify_all();
    }

    /// Wait until none of the pages moves.
    fn settle<'a>(&'a self, mut state: Guard<'a, M>, pages: Range<PageId>) -> Guard<'a, M> {
        let moves = |place| matches!(place, Place::Loading | Place::Storing);
        while pages.clone().any(|id| moves(state.table.page(id).place)) {
            state = self.wait(state);
        }
        state
    }

    /// The bytes of pages are no longer wanted, but of those that somebody holds: whoever does may be writing them.
    pub(crate) fn discard(&self, pages: Range<PageId>) {
        let mut state = self.settle(self.lock(), pages.clone());
        for run in state.table.runs(pages.clone(), |page| page.kept && page.holds == 0) {
            self.memory.forget(&run.region, run.within);
        }
        pages.for_each(|id| state.table.discard(id));
    }

    /// The pages will not be needed for long.
    pub(crate) fn cool(&self, pages: Range<PageId>) {
        let mut state = self.lock();
        pages.for_each(|id| state.table.page_mut(id).cold = true);
    }

    /// The pages will be needed soon.
    pub(crate) fn want(&self, pages: Range<PageId>) {
        let mut state = self.lock();
        // No more than fit, however often they are asked for.
        let room = state.capacity(self.page).saturating_sub(state.table.ahead + state.wanted.len());
        let kept: Vec<_> = pages.filter(|id| state.table.page(*id).place == Place::Kept).take(room).collect();
        state.wanted.extend(kept);
        self.work.notify_one();
    }

    /// Bring pages in, and keep them until [`Core::unhold`].
    pub(crate) fn hold(&self, pages: Range<PageId>, access: Access) -> Result<()> {
        let mut state = self.lock();
        state.table.hold(pages.clone());
        let mut brought = self.bring(state, pages.clone(), access);
        match &mut brought {
            Ok(state) => {
                for id in pages {
                    let page = state.table.page_mut(id);
                    page.dirty |= access == Access::Write;
                }
                if state.table.away > 0 {
                    self.work.notify_one();
                }
                Ok(())
            }
            Err(_) => {
                let mut state = self.lock();
                state.table.unhold(pages);
                drop(state);
                self.moved.notify_all();
                brought.map(drop)
            }
        }
    }

    /// Pages are no longer held.
    pub(crate) fn unhold(&self, pages: Range<PageId>) {
        self.lock().table.unhold(pages);
        self.moved.notify_all();
    }

    fn bring<'a>(&'a self, mut state: Guard<'a, M>, pages: Range<PageId>, access: Access) -> Result<Guard<'a, M>> {
        let mut at = pages.start;
        let mut failed = None;
        // Whether the rest of a block comes with what is missing of it: it is mostly wanted next, and moves best whole.
        let mut whole = true;
        while at < pages.end {
            let place = state.table.page(at).place;
            match place {
                Place::Resident => at += 1,
                Place::Storing if access == Access::Read => at += 1,
                Place::Storing | Place::Loading => {
                    let begun = Instant::now();
                    state = self.wait(state);
                    state.table.counters.stall += begun.elapsed();
                }
                Place::Empty | Place::Kept => {
                    let is_whole = whole && place == Place::Kept && failed.is_none();
                    let end = if is_whole { self.whole(&state, at, &pages) } else { pages.end };
                    let count = state.table.run(at..end, BATCH, place).map_or(1, |run| run.within.len());
                    let begun = Instant::now();
                    let there_is;
                    match self.room(state, count, &mut failed) {
                        Ok(made) => (state, there_is) = made,
                        Err(_) if end > pages.end => {
                            (state, whole) = (self.lock(), false);
                            continue;
                        }
                        Err(error) => return Err(error),
                    }
                    // What is so after the lock may have been open.
                    let run = state.table.run(at..end, count, place).filter(|_| there_is);
                    match run {
                        Some(run) if place == Place::Kept => {
                            let more = run.pages.end > pages.end;
                            match self.load(state, run) {
                                Ok(loaded) => state = loaded,
                                // Perhaps of what was not asked for.
                                Err(_) if more => (state, whole) = (self.lock(), false),
                                Err(error) => return Err(error),
                            }
                        }
                        Some(run) => {
                            if let Err(error) = self.memory.commit(&run.region, run.within.clone()) {
                                // Half of them may be there.
                                self.memory.release(&run.region, run.within);
                                return Err(error);
                            }
                            at = run.pages.end;
                            self.take_frames(&mut state, run.within.len());
                            run.pages.for_each(|id| state.table.page_mut(id).place = Place::Resident);
                            continue;
                        }
                        None => {}
                    }
                    state.table.counters.stall += begun.elapsed();
                }
            }
        }
        Ok(state)
    }

    /// Where the last block of a range of pages ends, if the rest of it is wanted soon and may be there beside all that is
    /// held; else where the range does.
    fn whole(&self, state: &State<M>, at: PageId, pages: &Range<PageId>) -> PageId {
        let end = state.table.block_of(pages.end - 1, state.block(self)).end.max(pages.end);
        let near = self.near(state);
        let is_soon = |id: PageId| state.table.forecast.is_soon(id, near);
        let fits = state.table.held + (end - pages.end) as usize <= state.capacity(self.page);
        if fits && (end - at) as usize <= BATCH && (pages.end..end).all(is_soon) { end } else { pages.end }
    }

    fn take_frames(&self, state: &mut Guard<'_, M>, count: usize) {
        let table = &mut state.table;
        table.resident += count;
        table.counters.high_water = table.counters.high_water.max(table.resident);
    }

    /// Bring a run in whose pages are kept and for which there is room, before they are asked for where nobody holds them.
    pub(crate) fn load<'a>(&'a self, mut state: Guard<'a, M>, run: Run<M>) -> Result<Guard<'a, M>> {
        self.take_frames(&mut state, run.within.len());
        run.pages.clone().for_each(|id| state.table.page_mut(id).place = Place::Loading);
        state.table.away -= run.within.len();
        state.moving += 1;
        state.loading += run.within.len();
        drop(state);
        let loaded = self.memory.load(&run.region, run.within.clone());
        let mut state = self.lock();
        state.moving -= 1;
        state.loading -= run.within.len();
        state.failing = loaded.is_err();
        let count = run.within.len();
        match &loaded {
            Ok(()) => {
                state.table.counters.loaded += count as u64;
                run.pages.for_each(|id| state.table.arrive(id));
            }
            Err(_) => {
                run.pages.for_each(|id| state.table.page_mut(id).place = Place::Kept);
                // Half of it may be there.
                self.memory.release(&run.region, run.within);
                state.table.resident -= count;
                state.table.away += count;
            }
        }
        self.moved.notify_all();
        loaded.map(|()| state)
    }

    /// Copy a run of resident, dirty pages that nobody holds to the tier below; where that fails they stay as they are.
    pub(crate) fn store<'a>(&'a self, mut state: Guard<'a, M>, run: &Run<M>) -> (Guard<'a, M>, Result<()>) {
        run.pages.clone().for_each(|id| state.table.page_mut(id).place = Place::Storing);
        state.moving += 1;
        drop(state);
        let stored = self.memory.store(&run.region, run.within.clone());
        let mut state = self.lock();
        state.moving -= 1;
        state.failing = stored.is_err();
        for id in run.pages.clone() {
            let page = state.table.page_mut(id);
            page.place = Place::Resident;
            // Where it failed, the copy that was there may still be, and is a stale one.
            page.dirty = stored.is_err();
            page.kept |= stored.is_ok();
        }
        if stored.is_ok() {
            state.table.counters.stored += run.within.len() as u64;
        }
        self.moved.notify_all();
        (state, stored)
    }

    pub(crate) fn stats(&self) -> Stats {
        let file = self.memory.file();
        let state = self.lock();
        let capacity = state.capacity(self.page).saturating_mul(self.page);
        let (table, page) = (&state.table, self.page);
        let c = &table.counters;
        Stats {
            allocated: c.allocated * page,
            capacity,
            resident: table.resident * page,
            high_water: c.high_water * page,
            held: table.held * page,
            away: table.away * page,
            ahead: table.ahead * page,
            hits: c.hits,
            faults: c.faults,
            prefetched: c.prefetched,
            prefetch_hits: c.prefetch_hits,
            evictions: c.evictions,
            stored: c.stored * page as u64,
            loaded: c.loaded * page as u64,
            stall: c.stall,
            file,
        }
    }
}
