//! The threads that bring pages in before they are asked for, and keep frames free for those that will be.
//!
//! All of them do the same, each with other pages, so that one move's bytes travel while another's frames are put in place.
//! A worker walks ahead in what the forecast expects, notes the pages that are not in memory, up to a bounded number, each
//! with those of its block that are expected hardly later, and loads them in that order, run by run. A run takes free
//! frames, or those of pages expected later than its first page: never one of a page that is needed sooner, so that looking
//! ahead cannot cost more than it gains, however far it looks. Then it lets pages beyond all that leave, so that a frame is
//! free when the next one is needed.
//!
//! What is noted and does not come (no frame, a move that fails) is looked at again, and so is what leaves from within the
//! part that was looked at.

use crate::Memory;
use crate::core::{BATCH, Core, Guard, State};
use crate::forecast::PageId;
use crate::table::{Place, Table};
use std::collections::{HashSet, VecDeque};
use std::ops::Range;

/// Touches that are looked at in one go, under the lock.
const LOOK: usize = 8192;

/// What was seen ahead.
#[derive(Default)]
pub(crate) struct Scout {
    /// The number of the first touch that was not looked at.
    seen: u64,
    /// [`crate::forecast::Forecast::breaks`] then.
    breaks: u64,
    /// Pages to bring in, with the number of the touch that wants each; none where its owner asked for it. Among them
    /// are those that hold nothing yet: there is nothing to bring, but they will take a frame sooner than what follows,
    /// which had better stay away until then.
    targets: VecDeque<(Option<u64>, PageId)>,
}

impl Scout {
    /// Look further ahead, until `most` pages are noted, by whole blocks of `block` as far as those are expected within
    /// `near` touches of each other.
    fn look<M: Memory>(&mut self, table: &Table<M>, wanted: &mut Vec<PageId>, most: usize, block: usize, near: u64) {
        if self.breaks != table.forecast.breaks() {
            (self.seen, self.breaks) = (0, table.forecast.breaks());
            self.targets.retain(|(touch, _)| touch.is_none());
        }
        let is_kept = |page: PageId| table.page(page).place == Place::Kept;
        let takes_a_frame = |page: PageId| matches!(table.page(page).place, Place::Kept | Place::Empty);
        // What is past, or was brought in by somebody else.
        self.targets.retain(|(touch, page)| match touch {
            Some(touch) => takes_a_frame(*page) && table.forecast.ahead(*touch).is_some_and(|n| n > 0),
            None => is_kept(*page),
        });
        for page in wanted.drain(..).rev().filter(|page| is_kept(*page)) {
            self.targets.push_front((None, page));
        }
        let mut noted: HashSet<PageId> = self.targets.iter().map(|(_, page)| *page).collect();
        for (touch, page) in table.forecast.expected(self.seen).take(LOOK) {
            if self.targets.len() >= most {
                break;
            }
            self.seen = touch + 1;
            if !takes_a_frame(page) || noted.contains(&page) {
                continue;
            }
            let soon = table.forecast.ahead(touch).unwrap_or(0) + near;
            let comes_with_it = |other: PageId| is_kept(other) && table.forecast.distance(other) <= soon;
            for page in table.block_of(page, block).filter(|other| *other == page || comes_with_it(*other)) {
                if noted.insert(page) {
                    self.targets.push_back((Some(touch), page));
                }
            }
        }
    }

    /// Pages leave: those of them that are expected within the part that was looked at must be seen again.
    pub(crate) fn look_again<M: Memory>(&mut self, table: &Table<M>, pages: Range<PageId>) {
        let nearest = pages.map(|id| table.forecast.distance(id)).min();
        if let (Some(nearest), Some(seen)) = (nearest, table.forecast.ahead(self.seen)) {
            self.seen -= seen.saturating_sub(nearest);
        }
    }

    /// Give up for now: what was noted will be looked at again, and so will a touch that was taken from it.
    fn give_up(&mut self, taken: Option<u64>) {
        let noted = self.targets.drain(..).filter_map(|(touch, _)| touch);
        self.seen = noted.chain(taken).fold(self.seen, u64::min);
    }

    /// Take the first pages to bring in that lie together in one allocation, with the touch that wants the first of them.
    fn take<M: Memory>(&mut self, table: &Table<M>) -> Option<(Option<u64>, Range<PageId>)> {
        let at = self.targets.iter().position(|(_, page)| table.page(*page).place == Place::Kept)?;
        let (touch, first) = self.targets[at];
        let together = self.targets.range(at..).zip(first..).take_while(|((_, page), next)| page == next).count();
        let run = table.run(first..first + together as PageId, BATCH, Place::Kept)?;
        self.targets.drain(at..at + run.pages.len());
        Some((touch, run.pages))
    }

    /// Note again what was taken and did not come, before all else.
    fn put_back(&mut self, touch: Option<u64>, pages: Range<PageId>) {
        pages.rev().for_each(|page| self.targets.push_front((touch, page)));
    }
}

/// Work until the pager is gone.
pub(crate) fn work<M: Memory>(core: &Core<M>) {
    let mut state = core.lock();
    while !state.closing {
        let moved;
        (moved, state) = step(core, state);
        if !moved {
            state = core.idle(state);
        }
    }
}

/// Look ahead, and move what is to move first: whether anything did.
pub(crate) fn step<'a, M: Memory>(core: &'a Core<M>, mut state: Guard<'a, M>) -> (bool, Guard<'a, M>) {
    let block = state.block(core);
    let most = core.look_ahead(&state).saturating_sub(state.table.ahead + state.coming);
    let near = core.near(&state);
    let State { scout, table, wanted, .. } = &mut *state;
    scout.look(table, wanted, most, block, near);
    match scout.take(table) {
        Some((touch, pages)) => {
            let count = pages.len();
            state.coming += count;
            let moved;
            (moved, state) = bring(core, state, touch, pages);
            state.coming -= count;
            if moved { (true, state) } else { free_frames(core, state) }
        }
        None => free_frames(core, state),
    }
}

/// Bring pages in that are wanted by a touch: whether anything moved.
fn bring<'a, M: Memory>(
    core: &'a Core<M>,
    mut state: Guard<'a, M>,
    touch: Option<u64>,
    pages: Range<PageId>,
) -> (bool, Guard<'a, M>) {
    let ahead = touch.and_then(|touch| state.table.forecast.ahead(touch)).unwrap_or(0);
    let spare = state.free(core.page).saturating_sub(core.look_ahead(&state) / 2);
    // Pages that are expected within a run of each other may be wanted in one hold, whichever is touched first.
    let horizon = ahead.saturating_add(BATCH as u64);
    let leavers = state.table.leavers(pages.len().saturating_sub(spare), horizon, false, state.block(core));
    let left;
    (left, state) = let_leave(core, state, &leavers);
    let end = pages.end.min(pages.start.saturating_add(state.free(core.page) as PageId));
    // What does not fit is cut off by whole blocks.
    let end = if end < pages.end { state.table.block_of(end, state.block(core)).start } else { end };
    match state.table.run(pages.start..end.max(pages.start), BATCH, Place::Kept) {
        Some(run) => {
            state.scout.put_back(touch, run.pages.end..pages.end);
            core.wake_another(&state);
            match core.load(state, run) {
                Ok(state) => (true, state),
                Err(_) => {
                    // Whoever needs the page will fail on it, and say so.
                    let mut state = core.lock();
                    state.scout.give_up(touch);
                    (false, state)
                }
            }
        }
        None => {
            // All that is in memory is needed sooner.
            state.scout.give_up(touch);
            (left, state)
        }
    }
}

/// Have some frames free, where pages that are not needed in the part that was looked at can leave: whether any did.
fn free_frames<'a, M: Memory>(core: &'a Core<M>, state: Guard<'a, M>) -> (bool, Guard<'a, M>) {
    let lacking = (core.look_ahead(&state) / 2).saturating_sub(state.free(core.page) + state.leaving);
    let Some(beyond) = state.table.forecast.ahead(state.scout.seen).filter(|_| state.table.away > 0) else {
        return (false, state);
    };
    let mut leavers = state.table.leavers(lacking.min(BATCH), beyond, false, state.block(core));
    // What was brought in would come back, and leave again.
    leavers.retain(|id| !state.table.page(*id).ahead);
    let_leave(core, state, &leavers)
}

/// Let pages leave that may: whether any did.
fn let_leave<'a, M: Memory>(core: &'a Core<M>, mut state: Guard<'a, M>, leavers: &[PageId]) -> (bool, Guard<'a, M>) {
    let mut left = core.drop_frames(&mut state, leavers);
    let mut rest = leavers;
    while !rest.is_empty() {
        let Some(run) = core.dirty_run(&state, rest) else {
            rest = &rest[1..];
            continue;
        };
        let count = run.pages.len();
        rest = &rest[count..];
        core.wake_another(&state);
        state.leaving += count;
        let stored;
        (state, stored) = core.store(state, &run);
        state.leaving -= count;
        if stored.is_err() {
            // Whoever needs the room will fail on it, and say so.
            break;
        }
        left += core.drop_frames(&mut state, &run.pages.collect::<Vec<_>>());
    }
    (left > 0, state)
}
