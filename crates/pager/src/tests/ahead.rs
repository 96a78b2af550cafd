//! How well a pager foresees. The worker is not a thread here: it works when a test tells it to, on a memory whose
//! moves take no time, until it rests.

use crate::core::Core;
use crate::forecast::PageId;
use crate::guarded::{Cells, Guarded};
use crate::sync::Arc;
use crate::table::Place;
use crate::worker::step;
use crate::{Access, Limit};
use std::cell::Cell;
use std::ops::Range;

/// A pager of one allocation, and its worker.
struct Walk {
    core: Core<Guarded>,
    region: Arc<Cells>,
    all: Range<PageId>,
}

impl Drop for Walk {
    fn drop(&mut self) {
        self.core.leave(self.all.clone());
    }
}

impl Walk {
    /// Over `pages` pages, in a memory of `frames`.
    fn new(pages: usize, frames: usize, look_ahead: usize) -> Self {
        Self::over(Guarded::default(), pages, frames, look_ahead)
    }

    fn over(memory: Guarded, pages: usize, frames: usize, look_ahead: usize) -> Self {
        let core = Core::new(memory, 1, Limit::Pages(frames), look_ahead);
        let (region, first) = core.enter(pages).unwrap();
        Self { core, region, all: first..first + pages as PageId }
    }

    fn pages(&self, range: &Range<usize>) -> Range<PageId> {
        self.all.start + range.start as PageId..self.all.start + range.end as PageId
    }

    fn touch(&self, range: Range<usize>) {
        self.core.hold(self.pages(&range), Access::Write).unwrap();
        self.region.touch(&range, Some(1));
        self.core.unhold(self.pages(&range));
    }

    fn rest(&self) -> usize {
        rest(&self.core)
    }

    /// Faults while `range` is touched.
    fn faults(&self, range: Range<usize>) -> u64 {
        let before = self.core.stats().faults;
        self.touch(range);
        self.core.stats().faults - before
    }
}

/// Let the worker work until it rests; how often something moved.
fn rest(core: &Core<Guarded>) -> usize {
    let mut steps = 0;
    let mut state = core.lock();
    loop {
        let moved;
        (moved, state) = step(core, state);
        if !moved {
            return steps;
        }
        steps += 1;
        assert!(steps < 1000, "it never rests");
    }
}

/// Faults and hits of pages brought in ahead in the last of some rounds: the earlier ones teach the order.
fn last_of_rounds(core: &Core<Guarded>, mut round: impl FnMut()) -> (u64, u64) {
    (0..4).for_each(|_| round());
    let before = core.stats();
    round();
    let after = core.stats();
    (after.faults - before.faults, after.prefetch_hits - before.prefetch_hits)
}

/// Every other page, so that each touch counts as a step of what repeats.
#[test]
fn a_walk_slower_than_the_disk_finds_nine_of_ten_pages_that_were_away_there() {
    for (pages, frames) in [(100, 80), (100, 30), (41, 40)] {
        let walk = Walk::new(2 * pages, frames, 10);
        let round = || {
            let before = walk.core.stats();
            let mut moves = 0;
            for page in 0..pages {
                walk.touch(2 * page..2 * page + 1);
                moves += walk.rest();
            }
            let after = walk.core.stats();
            // Each page that is touched makes way for at most itself, what comes in ahead of it, and a free frame.
            assert!(moves <= 4 * pages, "{moves} moves for {pages} pages");
            (after.faults - before.faults, after.prefetch_hits - before.prefetch_hits, after.loaded - before.loaded)
        };
        // Two rounds to learn.
        let _ = [round(), round()];
        for _ in 0..3 {
            let (faults, hits, loaded) = round();
            assert!(faults * 9 <= hits, "{faults} faults, {hits} hits");
            // What comes ahead takes frames from what would stay, and no more.
            assert!(loaded <= (pages - frames + 2 * 10) as u64, "{loaded} loaded, {} do not fit", pages - frames);
        }
    }
}

/// While everything fits there is nothing to bring, as far as the worker looks; what then leaves for whoever holds something
/// is seen again.
#[test]
fn what_left_for_a_hold_comes_back_ahead() {
    let walk = Walk::new(200, 200, 40);
    let round = || {
        for i in (0..100).chain((1..99).rev()) {
            walk.touch(2 * i..2 * i + 1);
            walk.rest();
        }
    };
    (0..3).for_each(|_| round());
    walk.core.set_limit(Limit::Pages(80)).unwrap();
    let (faults, hits) = last_of_rounds(&walk.core, round);
    assert!(hits > 0 && faults * 9 <= hits, "{faults} faults, {hits} hits");
}

/// There is room for half of the next layer, and its second half is there: that does not leave for the first.
#[test]
fn what_is_wanted_together_does_not_push_out_each_other() {
    const LAYER: usize = 16;
    let layer = |i: usize| i * LAYER..(i + 1) * LAYER;
    let walk = Walk::over(Guarded::default().with(1, LAYER / 2), 21 * LAYER, 21 * LAYER, 100);
    let hold = |range: Range<usize>| {
        walk.core.hold(walk.pages(&range), Access::Write).unwrap();
        walk.pages(&range)
    };
    let always = hold(layer(20));
    (0..3 * 20).for_each(|step| walk.touch(layer(7 * step % 20)));
    let first = hold(layer(0));
    walk.core.vacate().unwrap();
    walk.core.set_limit(Limit::Pages(2 * LAYER + LAYER / 2)).unwrap();
    let second_half = walk.pages(&(layer(7).start + LAYER / 2..layer(7).end));
    walk.core.want(second_half.clone());
    walk.rest();
    assert!(second_half.clone().all(|id| walk.core.lock().table.page(id).place == Place::Resident));
    assert_eq!(walk.core.stats().loaded, LAYER as u64 / 2);
    [always, first].into_iter().for_each(|pages| walk.core.unhold(pages));
}

/// As long as they are held whole.
#[test]
fn blocks_come_and_leave_whole() {
    const BLOCK: usize = 4;
    let walk = Walk::over(Guarded::default().with(1, BLOCK), 100 * BLOCK, 32 * BLOCK, 9);
    for step in 0..5 * 50 {
        let start = 2 * BLOCK * (step % 50);
        walk.touch(start..start + BLOCK);
        walk.rest();
        let state = walk.core.lock();
        for block in 0..100 {
            let pages = walk.pages(&(BLOCK * block..BLOCK * (block + 1)));
            let there = pages.filter(|id| state.table.page(*id).place == Place::Resident).count();
            assert!(there == 0 || there == BLOCK, "{there} of {BLOCK} pages");
        }
    }
    assert!(walk.core.stats().evictions > 0 && walk.core.stats().prefetched > 0);
}

/// A layer's codes and its scales lie side by side, and are wanted one after the other.
#[test]
fn pages_side_by_side_come_whichever_allocation_they_are_of() {
    // Two layers ahead, so that what is looked at in one go is a layer.
    let core = Core::new(Guarded::default(), 1, Limit::Pages(80), 10);
    let sizes = (0..20).flat_map(|_| [3, 2]);
    let parts: Vec<_> = sizes.map(|pages| (core.enter(pages).unwrap(), pages)).collect();
    let (faults, hits) = last_of_rounds(&core, || {
        for i in 0..20 {
            let layer = 7 * i % 20;
            for ((region, first), pages) in &parts[2 * layer..2 * layer + 2] {
                let all = *first..first + *pages as PageId;
                core.hold(all.clone(), Access::Write).unwrap();
                region.touch(&(0..*pages), Some(1));
                core.unhold(all);
            }
            rest(&core);
        }
    });
    assert!(hits > 0 && faults * 9 <= hits, "{faults} faults, {hits} hits");
    parts.iter().for_each(|((_, first), pages)| core.leave(*first..first + *pages as PageId));
}

#[test]
fn a_page_that_holds_nothing_keeps_none_behind_it_away() {
    let walk = Walk::new(180, 100, 12);
    let (faults, hits) = last_of_rounds(&walk.core, || {
        for i in 0..60 {
            let start = 3 * (7 * i % 60);
            for page in start..start + 3 {
                walk.touch(page..page + 1);
            }
            walk.core.discard(walk.pages(&(start + 1..start + 2)));
            walk.rest();
        }
    });
    assert!(hits > 0 && faults * 9 <= hits, "{faults} faults, {hits} hits");
}

/// Few frames that are not held: of four pages that are wanted next two come at a time.
#[test]
fn what_there_was_no_frame_for_comes_when_there_is_one() {
    let walk = Walk::new(50 + 4 * 12, 64, 8);
    let always = walk.pages(&(0..50));
    walk.core.hold(always.clone(), Access::Write).unwrap();
    let mut last = None;
    let (faults, hits) = last_of_rounds(&walk.core, || {
        for i in 0..12 {
            let start = 50 + 4 * (5 * i % 12);
            let pages = walk.pages(&(start..start + 4));
            walk.core.hold(pages.clone(), Access::Write).unwrap();
            walk.rest();
            // Each four are held until those after them are.
            last.replace(pages).into_iter().for_each(|pages| walk.core.unhold(pages));
        }
    });
    assert!(hits > 0 && faults * 9 <= hits, "{faults} faults, {hits} hits");
    last.into_iter().for_each(|pages| walk.core.unhold(pages));
    walk.core.unhold(always);
}

/// Of each block one page is wanted, round after round; the others were once, long ago.
#[test]
fn what_a_block_holds_beside_what_is_wanted_stays_away() {
    const BLOCK: usize = 4;
    let walk = Walk::over(Guarded::default().with(1, BLOCK), 40 * BLOCK, 32, 4);
    (0..40 * BLOCK).for_each(|page| walk.touch(page..page + 1));
    let (faults, hits) = last_of_rounds(&walk.core, || {
        for block in 0..40 {
            walk.touch(BLOCK * block..BLOCK * block + 1);
            walk.rest();
        }
    });
    assert!(hits > 0 && faults * 9 <= hits, "{faults} faults, {hits} hits");
}

/// A walk over halves of blocks without a worker, two blocks by turns.
fn halves(walk: &Walk) {
    for start in (0..160).step_by(8) {
        for half in [start, start + 4, start + 2, start + 6] {
            walk.touch(half..half + 2);
        }
    }
}

#[test]
fn who_waits_for_half_a_block_gets_the_other_half_with_it() {
    let walk = Walk::over(Guarded::default().with(1, 4), 160, 32, 0);
    let (faults, hits) = last_of_rounds(&walk.core, || halves(&walk));
    // But for blocks of which a half was there.
    assert!(hits > 0 && 4 * faults <= 5 * hits, "{faults} faults, {hits} hits");
}

#[test]
fn what_comes_with_half_a_block_fails_nobody() {
    thread_local!(static FAILURES: Cell<usize> = const { Cell::new(0) });
    let fails = || FAILURES.replace(0) > 0;
    let walk = Walk::over(Guarded::failing(fails).with(1, 4), 160, 32, 0);
    (0..4).for_each(|_| halves(&walk));
    walk.core.vacate().unwrap();
    FAILURES.set(1);
    walk.touch(0..2);
    let stats = walk.core.stats();
    assert_eq!((FAILURES.get(), stats.resident), (0, 2), "the block failed, its half did not");
}

/// Rounds over pages that stay, and over many that are written first and forgotten at the end, as activations are: what
/// came back before those had their frames would have to leave for them again.
#[test]
fn what_holds_nothing_yet_gets_its_frame_before_what_is_wanted_later() {
    let walk = Walk::new(400, 120, 15);
    let mut before = walk.core.stats();
    for round in 0..6 {
        (0..100).for_each(|page| {
            walk.touch(200 + 2 * page..201 + 2 * page);
            walk.rest();
        });
        (0..100).for_each(|page| {
            walk.touch(2 * page..2 * page + 1);
            walk.rest();
        });
        walk.core.discard(walk.pages(&(200..400)));
        if round == 2 {
            before = walk.core.stats();
        }
    }
    let after = walk.core.stats();
    let (brought, used) = (after.prefetched - before.prefetched, after.prefetch_hits - before.prefetch_hits);
    assert!(used > 0 && 10 * used >= 9 * brought, "{used} of {brought} were used");
}

/// Moves that fail are not tried over and over: whoever needs the page tries again.
#[test]
fn a_worker_whose_every_move_fails_rests_and_harms_nothing() {
    let walk = Walk::new(80, 30, 4);
    (0..3 * 40).for_each(|step| walk.touch(2 * (step % 40)..2 * (step % 40) + 1));
    // All that is there is clean, and so may leave for what cannot come.
    for page in 0..80 {
        let pages = walk.pages(&(2 * (page % 40)..2 * (page % 40) + 1));
        walk.core.hold(pages.clone(), Access::Read).unwrap();
        walk.core.unhold(pages);
    }
    walk.core.memory.set_working(false);
    let before = walk.core.memory.calls();
    for page in 0..40 {
        let pages = walk.pages(&(2 * page..2 * page + 1));
        if walk.core.hold(pages.clone(), Access::Read).is_ok() {
            walk.core.unhold(pages.clone());
        }
        walk.core.want(pages);
        walk.rest();
    }
    // A hold stores to make room and loads; so does the worker, for what it foresees and for its free frames.
    let calls = walk.core.memory.calls() - before;
    assert!(calls <= 6 * 40, "{calls} calls");
    walk.core.memory.set_working(true);
    (0..40).for_each(|page| walk.touch(2 * page..2 * page + 1));
}

#[test]
fn a_prefetched_range_is_there_when_it_is_asked_for() {
    let walk = Walk::new(40, 20, 0);
    (0..40).for_each(|page| walk.touch(page..page + 1));
    walk.core.vacate().unwrap();
    walk.core.want(walk.pages(&(5..15)));
    walk.rest();
    assert_eq!((walk.core.stats().ahead, walk.faults(5..15)), (10, 0));
    assert_eq!(walk.core.stats().prefetch_hits, 10);
}

#[test]
fn asking_for_more_than_fits_brings_in_what_fits() {
    let walk = Walk::new(60, 20, 0);
    (0..60).for_each(|page| walk.touch(page..page + 1));
    walk.core.vacate().unwrap();
    (0..100).for_each(|_| walk.core.want(walk.pages(&(0..60))));
    walk.rest();
    let stats = walk.core.stats();
    assert_eq!((stats.ahead, stats.loaded), (20, 20));
    assert_eq!(walk.faults(0..20), 0);
}

#[test]
fn cool_pages_leave_first_and_dead_ones_before_them() {
    let walk = Walk::new(30, 10, 0);
    (0..10).for_each(|page| walk.touch(page..page + 1));
    walk.core.cool(walk.pages(&(6..8)));
    walk.core.discard(walk.pages(&(8..9)));
    let stored = walk.core.stats().stored;
    // One dead and two cool ones make room for three.
    walk.touch(20..21);
    assert_eq!(walk.core.stats().stored, stored);
    walk.touch(21..23);
    assert_eq!(walk.core.stats().stored, stored + 2);
    assert_eq!(walk.faults(0..6) + walk.faults(9..10), 0);
    assert_eq!(walk.faults(6..8), 2);
}

#[test]
fn what_somebody_holds_is_not_discarded() {
    let walk = Walk::new(4, 2, 0);
    walk.core.hold(walk.pages(&(0..1)), Access::Write).unwrap();
    walk.core.discard(walk.pages(&(0..2)));
    walk.region.touch(&(0..1), Some(7));
    walk.core.unhold(walk.pages(&(0..1)));
    walk.core.vacate().unwrap();
    walk.core.hold(walk.pages(&(0..1)), Access::Read).unwrap();
    assert_eq!(walk.region.touch(&(0..1), None), [7]);
}

/// A store that fails may leave the copy that was there: it is stale, and still to be forgotten.
#[test]
fn a_copy_that_a_failed_store_left_is_forgotten_with_its_page() {
    let walk = Walk::new(1, 1, 0);
    walk.touch(0..1);
    walk.core.vacate().unwrap();
    walk.touch(0..1);
    walk.core.memory.set_working(false);
    assert!(walk.core.vacate().is_err());
    walk.core.memory.set_working(true);
    walk.core.discard(walk.all.clone());
    walk.core.vacate().unwrap();
    // The memory sees that nothing is below where it puts a new frame.
    walk.touch(0..1);
}
