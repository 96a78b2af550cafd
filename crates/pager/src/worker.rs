//! The thread that brings pages in before they are asked for, and keeps frames free for those that will be.
//!
//! It walks ahead in what the forecast expects, notes the pages that are not in memory, up to a bounded number, and
//! loads them in that order. A page takes a free frame, or that of a page expected later than itself: never one of a
//! page that is needed sooner, so that looking ahead cannot cost more than it gains, however far it looks. Then it lets
//! pages beyond all that leave, so that a frame is free when the next one is needed.

use crate::Memory;
use crate::core::{BATCH, Core, Guard, State};
use crate::forecast::PageId;
use crate::table::Place;
use std::collections::VecDeque;
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
    /// Pages to bring in, with the number of the touch that wants each; none where its owner asked for it.
    targets: VecDeque<(Option<u64>, PageId)>,
}

impl Scout {
    /// Look further ahead, until `most` pages are noted.
    fn look<M: Memory>(&mut self, state: &mut State<M>, most: usize) {
        let table = &state.table;
        if self.breaks != table.forecast.breaks() {
            (self.seen, self.breaks) = (0, table.forecast.breaks());
            self.targets.retain(|(touch, _)| touch.is_none());
        }
        // What is past, or was brought in by somebody else.
        let is_ahead =
            |touch: &Option<u64>| touch.is_none_or(|touch| table.forecast.ahead(touch).is_some_and(|n| n > 0));
        self.targets.retain(|(touch, page)| table.page(*page).place == Place::Kept && is_ahead(touch));
        for page in state.wanted.drain(..).rev() {
            if table.page(page).place == Place::Kept {
                self.targets.push_front((None, page));
            }
        }
        for (touch, page) in table.forecast.expected(self.seen).take(LOOK) {
            if self.targets.len() >= most {
                break;
            }
            self.seen = touch + 1;
            if table.page(page).place == Place::Kept && !self.targets.iter().any(|(_, noted)| *noted == page) {
                self.targets.push_back((Some(touch), page));
            }
        }
    }

    /// Give up for now: what was noted will be looked at again.
    fn give_up(&mut self) {
        self.seen = self.targets.drain(..).filter_map(|(touch, _)| touch).fold(self.seen, u64::min);
    }

    /// The first pages to bring in that lie together, and how far ahead they are wanted.
    fn next<M: Memory>(&self, state: &State<M>) -> Option<(u64, Range<PageId>)> {
        let (touch, first) = *self.targets.front()?;
        let together = self.targets.iter().zip(first..).take_while(|((_, page), next)| page == next).take(BATCH);
        let ahead = touch.and_then(|touch| state.table.forecast.ahead(touch)).unwrap_or(0);
        Some((ahead, first..first + together.count() as PageId))
    }
}

/// Work until the pager is gone.
pub(crate) fn work<M: Memory>(core: &Core<M>) {
    let (mut scout, mut state) = (Scout::default(), core.lock());
    while !state.closing {
        let moved;
        (moved, state) = step(core, state, &mut scout);
        if !moved {
            state = core.idle(state);
        }
    }
}

/// Look ahead, and move what is to move first: whether anything did.
pub(crate) fn step<'a, M: Memory>(
    core: &'a Core<M>,
    mut state: Guard<'a, M>,
    scout: &mut Scout,
) -> (bool, Guard<'a, M>) {
    let most = core.look_ahead(&state).saturating_sub(state.table.ahead);
    scout.look(&mut state, most);
    match bring_next(core, state, scout) {
        (false, state) => free_frames(core, state, scout),
        moved => moved,
    }
}

/// Bring in what is wanted first: whether anything moved.
fn bring_next<'a, M: Memory>(core: &'a Core<M>, mut state: Guard<'a, M>, scout: &mut Scout) -> (bool, Guard<'a, M>) {
    let Some((ahead, pages)) = scout.next(&state) else { return (false, state) };
    let spare = state.free(core.page).saturating_sub(core.look_ahead(&state) / 2);
    let left;
    (left, state) = let_leave(core, state, scout, pages.len().saturating_sub(spare), ahead);
    let room = state.free(core.page).min(BATCH);
    match state.table.run(pages, room, Place::Kept) {
        Some(run) => match core.load(state, run, true) {
            Ok(state) => (true, state),
            Err(_) => {
                // Whoever needs the page will fail on it, and say so.
                scout.give_up();
                (false, core.lock())
            }
        },
        None => {
            // All that is in memory is needed sooner.
            scout.give_up();
            (left, state)
        }
    }
}

/// Have some frames free, where pages that are not needed in the part that was looked at can leave: whether any did.
fn free_frames<'a, M: Memory>(core: &'a Core<M>, state: Guard<'a, M>, scout: &mut Scout) -> (bool, Guard<'a, M>) {
    let lacking = (core.look_ahead(&state) / 2).saturating_sub(state.free(core.page));
    match state.table.forecast.ahead(scout.seen).filter(|_| state.table.away > 0) {
        Some(beyond) => let_leave(core, state, scout, lacking.min(BATCH), beyond),
        None => (false, state),
    }
}

/// Let up to `count` pages leave that are expected later than `horizon` touches ahead: whether any did.
fn let_leave<'a, M: Memory>(
    core: &'a Core<M>,
    mut state: Guard<'a, M>,
    scout: &mut Scout,
    count: usize,
    horizon: u64,
) -> (bool, Guard<'a, M>) {
    if count == 0 {
        return (false, state);
    }
    let leavers = state.table.leavers(count, horizon, false);
    // What leaves from within the part that was looked at must be seen again.
    let nearest = leavers.iter().map(|id| state.table.forecast.distance(*id)).min();
    if let (Some(nearest), Some(seen)) = (nearest, state.table.forecast.ahead(scout.seen)) {
        scout.seen -= seen.saturating_sub(nearest);
    }
    let mut left = core.drop_frames(&mut state, &leavers);
    let mut rest = &leavers[..];
    while !rest.is_empty() {
        let Some(run) = core.dirty_run(&state, rest) else {
            rest = &rest[1..];
            continue;
        };
        rest = &rest[run.pages.len()..];
        let stored;
        (state, stored) = core.store(state, &run);
        if stored.is_err() {
            // Whoever needs the room will fail on it, and say so.
            break;
        }
        left += core.drop_frames(&mut state, &run.pages.collect::<Vec<_>>());
    }
    (left > 0, state)
}
