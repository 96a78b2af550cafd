//! Making room: which pages leave, and what is stored first.
//!
//! Room is made by letting pages leave that nobody holds. Where there are none, a caller waits only for moves under
//! way, which end by themselves, and else gets an error: no two callers ever wait for each other.

use crate::core::{BATCH, Core, Guard, State};
use crate::forecast::PageId;
use crate::limit::Limit;
use crate::table::Run;
use crate::{Error, Memory, Result};
use std::ops::Range;

/// The first pages of a sorted list that lie together, no more than move at once.
fn together(pages: &[PageId]) -> Option<Range<PageId>> {
    let first = *pages.first()?;
    let count = pages.iter().zip(first..).take(BATCH).take_while(|(id, next)| *id == next).count();
    Some(first..first + count as PageId)
}

impl<M: Memory> Core<M> {
    /// See to it that `count` more pages may be resident: whether they may now. Where not, something moved, and the
    /// caller must look again at what it needs; `failed` is what went wrong so far, for the next call.
    pub(crate) fn room<'a>(
        &'a self,
        mut state: Guard<'a, M>,
        count: usize,
        failed: &mut Option<Error>,
    ) -> Result<(Guard<'a, M>, bool)> {
        let in_use = state.table.resident * self.page + self.memory.aside();
        state.limit.measure(in_use);
        self.trim(&state);
        let capacity = state.capacity(self.page);
        let needed = (state.table.resident + count).saturating_sub(capacity);
        if needed == 0 {
            return Ok((state, true));
        }
        // A few more than needed: they leave in one go.
        let leavers = state.table.leavers(needed.max(BATCH.min(capacity / 8)), 0, failed.is_some(), state.block(self));
        if leavers.is_empty() {
            if state.moving > 0 {
                return Ok((self.wait(state), false));
            }
            if (state.table.resident + count) * self.page <= state.limit.last_resort() {
                return Ok((state, true));
            }
            return Err(self.full(&state, count, failed.take()));
        }
        if self.drop_frames(&mut state, &leavers) >= needed {
            return Ok((state, true));
        }
        // What is left of them must be stored first.
        if let Some(run) = (0..leavers.len()).find_map(|i| self.dirty_run(&state, &leavers[i..])) {
            let stored;
            (state, stored) = self.store(state, &run);
            match stored {
                Ok(()) => drop(self.drop_frames(&mut state, &run.pages.collect::<Vec<_>>())),
                Err(error) => *failed = Some(error),
            }
        }
        Ok((state, false))
    }

    /// Let the frames of clean pages go, those of `pages` that may leave; how many did.
    pub(crate) fn drop_frames(&self, state: &mut Guard<'_, M>, pages: &[PageId]) -> usize {
        let (mut left, mut rest) = (0, pages);
        while let Some(here) = together(rest) {
            let Some(run) = state.table.run_of(here, BATCH, |page| page.may_leave() && !page.dirty) else {
                rest = &rest[1..];
                continue;
            };
            let count = run.within.len();
            let State { scout, table, .. } = &mut **state;
            scout.look_again(table, run.pages.clone());
            run.pages.for_each(|id| table.drop_frame(id));
            self.memory.release(&run.region, run.within);
            (left, rest) = (left + count, &rest[count..]);
        }
        self.trim(state);
        left
    }

    /// What the memory keeps of frames given back fits beside what is resident, and waits for a use that is near.
    fn trim(&self, state: &State<M>) {
        // What a load takes is resident in the books before it is taken from there.
        let kept = (state.free(self.page) + state.loading).min(2 * BATCH);
        self.memory.keep_aside(kept * self.page);
    }

    /// The pages at the head of `leavers` that lie together, that nobody holds and that must be stored; none where the
    /// first is not such a page.
    pub(crate) fn dirty_run(&self, state: &State<M>, leavers: &[PageId]) -> Option<Run<M>> {
        state.table.run_of(together(leavers)?, BATCH, |page| page.may_leave() && page.dirty)
    }

    /// Let every page leave that nobody holds and that does not move.
    pub(crate) fn vacate(&self) -> Result<()> {
        let mut state = self.lock();
        loop {
            let leavers = state.table.leavers(BATCH, 0, false, state.block(self));
            if leavers.is_empty() {
                return Ok(());
            }
            self.drop_frames(&mut state, &leavers);
            let dirty = (0..leavers.len()).find_map(|i| self.dirty_run(&state, &leavers[i..]));
            let Some(run) = dirty else { continue };
            let stored;
            (state, stored) = self.store(state, &run);
            stored?;
        }
    }

    /// Allow another number of bytes; what is beyond leaves at once.
    pub(crate) fn set_limit(&self, limit: Limit) -> Result<()> {
        let mut state = self.lock();
        state.limit = limit;
        let (mut failed, mut there_is) = (None, false);
        while !there_is {
            (state, there_is) = self.room(state, 0, &mut failed)?;
        }
        self.wake_worker();
        Ok(())
    }

    fn full(&self, state: &State<M>, asked: usize, failed: Option<Error>) -> Error {
        let capacity = state.capacity(self.page);
        let free = capacity.saturating_sub(state.table.resident);
        let [asked, pinned, free, capacity] =
            [asked, state.table.held, free, capacity].map(|pages| pages.saturating_mul(self.page));
        match failed {
            Some(source) => Error::Stuck { asked, pinned, free, capacity, source: Box::new(source) },
            None => Error::Full { asked, pinned, free, capacity },
        }
    }
}
