//! The core under every order of its threads that shuttle comes upon: random ones, those with few switches at the worst
//! places (Burckhardt et al. 2010, "A randomized scheduler with probabilistic guarantees of finding bugs", PCT), and,
//! of the smallest programs, all.
//!
//! [`Guarded`] sees to it that no move and no hold meets another; here are the laws of what is read. A deadlock, a wake
//! that is lost and a loop without end are what shuttle itself reports, with the schedule that led there.

use crate::guarded::Guarded;
use crate::{Access, Allocation, Error, FileOptions, Limit, OnHost, Options, Pager, Simulated};
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::{Arc, Mutex, RwLock};
use shuttle::thread;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Pages that a thread holds at once, at the most.
const MOST: usize = 2;
const THREADS: usize = 3;
/// Whatever the threads hold, it fits.
const LEAST: usize = MOST * THREADS;

/// An allocation, and what its pages hold: nothing is known of what was discarded.
struct Known {
    allocation: Allocation<Guarded>,
    pages: Vec<Option<u64>>,
}

impl Known {
    fn new(pager: &Pager<Guarded>, pages: usize) -> Self {
        Self { allocation: pager.alloc(pages).unwrap(), pages: vec![Some(0); pages] }
    }

    fn touch(&self, range: &Range<usize>, write: Option<u64>) -> Result<(), Error> {
        let access = if write.is_some() { Access::Write } else { Access::Read };
        let _hold = self.allocation.hold(range.clone(), access)?;
        let found = self.allocation.region().touch(range, write);
        for (found, known) in found.iter().zip(&self.pages[range.clone()]) {
            assert!(known.is_none_or(|known| known == *found), "found {found}, last written was {known:?}");
        }
        Ok(())
    }

    fn read(&self, range: &Range<usize>) -> Result<(), Error> {
        self.touch(range, None)
    }

    fn write(&mut self, range: &Range<usize>, value: u64) -> Result<(), Error> {
        self.touch(range, Some(value))?;
        self.pages[range.clone()].fill(Some(value));
        Ok(())
    }

    fn discard(&mut self, range: &Range<usize>) {
        self.pages[range.clone()].fill(None);
        self.allocation.discard(range.clone());
    }
}

/// A range of 1 to [`MOST`] of `pages`.
fn range(pages: usize) -> Range<usize> {
    let start = thread_rng().gen_range(0..pages);
    start..(start + thread_rng().gen_range(1..=MOST)).min(pages)
}

/// One random act of a thread on what it has for itself and what it shares. `allow` says which errors are none.
fn act(pager: &Pager<Guarded>, own: &mut Known, shared: &RwLock<Known>, value: u64, allow: fn(&Error) -> bool) {
    let allowed = |done: Result<(), Error>| match done {
        Err(error) if !allow(&error) => panic!("{error}"),
        _ => {}
    };
    let range = range(own.pages.len());
    match thread_rng().gen_range(0..17) {
        0..3 => allowed(own.write(&range, value)),
        3..5 => allowed(own.read(&range)),
        5..7 => allowed(shared.write().unwrap().write(&range, value)),
        7..9 => allowed(shared.read().unwrap().read(&range)),
        9 => own.allocation.prefetch(range),
        10 => shared.read().unwrap().allocation.prefetch(range),
        11 => own.allocation.cool(range),
        12 => own.discard(&range),
        13 => shared.write().unwrap().discard(&range),
        14 => {
            // A hold keeps the pages of an allocation that is gone.
            let hold = own.allocation.hold(range, Access::Read);
            *own = Known::new(pager, own.pages.len());
            allowed(hold.map(drop));
        }
        15 => allowed(pager.set_limit(Limit::Pages(thread_rng().gen_range(LEAST..2 * LEAST)))),
        _ => allowed(pager.vacate()),
    }
}

/// Several threads that do anything at all: what they read is what was written last, and at the end nothing is left.
fn anything(memory: Guarded, acts: u64, allow: fn(&Error) -> bool) {
    let pager = Pager::over(memory, 1, Limit::Pages(LEAST), 0).unwrap();
    let shared = Arc::new(RwLock::new(Known::new(&pager, 4)));
    let threads: Vec<_> = (0..THREADS as u64)
        .map(|number| {
            let (pager, shared) = (pager.clone(), shared.clone());
            thread::spawn(move || {
                let mut own = Known::new(&pager, 4);
                (0..acts).for_each(|i| act(&pager, &mut own, &shared, 1 + number + i * THREADS as u64, allow));
                own
            })
        })
        .collect();
    let mut all: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    all.push(Arc::into_inner(shared).unwrap().into_inner().unwrap());
    pager.memory().set_working(true);
    for known in all {
        // One page at a time: whatever else there is may leave.
        (0..known.pages.len()).for_each(|page| known.read(&(page..page + 1)).unwrap());
    }
    nothing_is_left(&pager);
}

fn nothing_is_left(pager: &Pager<Guarded>) {
    let stats = pager.stats();
    assert_eq!((stats.allocated, stats.resident, stats.held, stats.away, stats.ahead), (0, 0, 0, 0, 0));
}

#[test]
fn whatever_threads_do_each_reads_what_was_written_and_what_fits_is_never_refused() {
    let program = || anything(Guarded::default().with(2, 2), 6, |_| false);
    shuttle::check_random(program, 3000);
    shuttle::check_pct(program, 3000, 4);
}

#[test]
fn whatever_fails_meanwhile_nothing_is_lost_and_every_error_says_which_move_failed() {
    fn is_of_a_move(error: &Error) -> bool {
        match error {
            Error::Stuck { source, .. } => is_of_a_move(source),
            error => matches!(error, Error::Device { .. }),
        }
    }
    let program = || anything(Guarded::failing(|| thread_rng().gen_bool(0.3)).with(2, 2), 6, is_of_a_move);
    shuttle::check_random(program, 3000);
    shuttle::check_pct(program, 3000, 4);
}

/// More is asked for than there is: some are refused, all end, and who is alone again is served.
#[test]
fn threads_that_together_ask_for_too_much_are_refused_and_never_wait_for_each_other() {
    let program = || {
        let pager = Pager::over(Guarded::default().with(2, 1), 1, Limit::Pages(3), 0).unwrap();
        let threads: Vec<_> = (1..=3)
            .map(|number| {
                let pager = pager.clone();
                thread::spawn(move || {
                    let mut own = Known::new(&pager, 4);
                    for i in 0..3 {
                        match own.write(&(i % 2..i % 2 + 2), 10 * number + i as u64) {
                            Ok(()) | Err(Error::Full { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                    own
                })
            })
            .collect();
        for known in threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>() {
            known.read(&(0..3)).unwrap();
        }
        nothing_is_left(&pager);
    };
    shuttle::check_random(program, 2000);
    shuttle::check_pct(program, 2000, 3);
}

/// Two workers foresee, on a walk that two threads share: a cycle of 20 pages in a memory of 16.
#[test]
fn workers_that_look_ahead_take_no_page_from_who_holds_it_and_come_to_rest() {
    let program = || {
        let pager = Pager::over(Guarded::default().with(2, 2), 1, Limit::Pages(16), 2).unwrap();
        let walked = Arc::new(Mutex::new(Known::new(&pager, 40)));
        let mut own = Known::new(&pager, 2);
        let walker = {
            let walked = walked.clone();
            thread::spawn(move || {
                for step in 0..60 {
                    let page = 2 * (step % 20);
                    walked.lock().unwrap().write(&(page..page + 1), step as u64).unwrap();
                }
            })
        };
        for value in 1..8 {
            own.write(&(0..2), value).unwrap();
            walked.lock().unwrap().allocation.prefetch(0..8);
        }
        walker.join().unwrap();
        drop((own, walked));
        nothing_is_left(&pager);
    };
    shuttle::check_random(program, 600);
    shuttle::check_pct(program, 600, 4);
}

/// A walk over blocks, and over two allocations side by side, from some place on not before what comes next is there, or
/// would have been long ago. It comes: there are frames of pages that are wanted later. Where it was forgotten, it never
/// would. But for one wait in fifty: pages that came for their block's sake and that nobody has asked for hold the
/// look-ahead up in some schedule of hundreds.
#[test]
fn what_comes_next_is_there_once_the_workers_rest() {
    const LONG: usize = 2000;
    // Over all schedules.
    static WAITS: AtomicUsize = AtomicUsize::new(0);
    static IN_VAIN: AtomicUsize = AtomicUsize::new(0);
    let program = || {
        let pager = Pager::over(Guarded::default().with(2, 2), 1, Limit::Pages(32), 4).unwrap();
        let mut parts = [Known::new(&pager, 25), Known::new(&pager, 35)];
        // Not from first to last: each jump is a step of what repeats.
        for step in 0..4 * 20 {
            let start = 3 * (7 * step % 20);
            for page in [start..start + 2, start + 2..start + 3] {
                for (part, first) in [(0, 0), (1, 25)] {
                    let end = first + parts[part].pages.len();
                    let within = page.start.clamp(first, end) - first..page.end.clamp(first, end) - first;
                    if !within.is_empty() {
                        if step >= 3 * 20 {
                            let there = |_: &usize| parts[part].allocation.region().are_there(&within);
                            let came = (0..LONG).inspect(|_| thread::yield_now()).find(there).is_some();
                            WAITS.fetch_add(1, Ordering::Relaxed);
                            IN_VAIN.fetch_add(usize::from(!came), Ordering::Relaxed);
                        }
                        parts[part].write(&within, step as u64).unwrap();
                    }
                }
            }
        }
    };
    shuttle::check_random(program, 200);
    shuttle::check_pct(program, 200, 4);
    let [waits, in_vain] = [&WAITS, &IN_VAIN].map(|count| count.load(Ordering::Relaxed));
    assert!(50 * in_vain <= waits, "{in_vain} of {waits} in vain");
}

#[test]
fn what_is_prefetched_comes_without_anybody_asking_again() {
    let program = || {
        let pager = Pager::over(Guarded::default().with(2, 1), 1, Limit::Pages(4), 0).unwrap();
        let mut known = Known::new(&pager, 4);
        known.write(&(0..4), 7).unwrap();
        pager.vacate().unwrap();
        known.allocation.prefetch(1..3);
        while pager.stats().ahead < 2 {
            thread::yield_now();
        }
        known.read(&(1..3)).unwrap();
        assert_eq!((pager.stats().prefetch_hits, pager.stats().faults, pager.stats().ahead), (2, 0, 0));
    };
    shuttle::check_random(program, 2000);
    shuttle::check_pct(program, 2000, 3);
}

#[test]
fn pages_on_their_way_are_waited_for_and_make_way() {
    let program = || {
        let pager = Pager::over(Guarded::default(), 1, Limit::Pages(2), 0).unwrap();
        let mut known = Known::new(&pager, 4);
        known.write(&(0..2), 7).unwrap();
        known.write(&(2..4), 8).unwrap();
        known.allocation.prefetch(0..2);
        known.read(&(2..4)).unwrap();
        known.read(&(0..2)).unwrap();
    };
    shuttle::check_random(program, 2000);
    shuttle::check_pct(program, 2000, 3);
}

/// Device, host and file, each with its lock and its worker: a tier that moves waits for the one below, never the other
/// way round. What moves at once on the device, 2 pages, fits on the host.
#[test]
fn three_tiers_never_wait_for_each_other() {
    const PAGE: usize = 64 << 10;
    let program = || {
        let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
        let options = Options { page: PAGE, look_ahead: 0, ..Options::new(Limit::Pages(2 * PAGE), Some(file)) };
        let simulated = Simulated::new(2 * PAGE, PAGE, f64::INFINITY, Duration::from_nanos(1));
        let on_host = OnHost::new(simulated, Pager::new(options).unwrap(), PAGE);
        let pager = Pager::over(on_host, PAGE, Limit::Pages(2 * PAGE), 0).unwrap();
        let threads = [1u8, 2].map(|number| {
            let pager = pager.clone();
            thread::spawn(move || {
                let mut own = pager.alloc(2 * PAGE).unwrap();
                let mut written = [None; 2];
                for turn in 0..4u8 {
                    let page = usize::from(turn % 2);
                    let range = page * PAGE..(page + 1) * PAGE;
                    let hold = own.hold(range.clone(), Access::Write).unwrap();
                    pager.memory().device().run(own.region().device(), range.clone(), |_, frame| {
                        assert!(written[page].is_none_or(|value| frame[0] == value && frame[PAGE - 1] == value));
                        frame.fill(number + 2 * turn);
                    });
                    written[page] = Some(number + 2 * turn);
                    drop(hold);
                    own.prefetch(0..2 * PAGE);
                    if turn == 1 {
                        own.discard(range);
                        written[page] = None;
                    }
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let (device, host) = (pager.stats(), pager.memory().host().stats());
        assert_eq!((device.allocated, device.resident, host.allocated, host.resident), (0, 0, 0, 0));
        assert_eq!(device.file.unwrap().stored, 0);
    };
    shuttle::check_random(program, 300);
    shuttle::check_pct(program, 300, 3);
}

/// Every schedule there is of one page's leaving, coming back and being freed, beside the worker that brings it in.
#[test]
fn all_schedules_of_a_page_that_two_want_are_right() {
    shuttle::check_dfs(
        || {
            let pager = Pager::over(Guarded::default(), 1, Limit::Pages(1), 0).unwrap();
            let mut known = Known::new(&pager, 1);
            known.write(&(0..1), 7).unwrap();
            pager.vacate().unwrap();
            known.allocation.prefetch(0..1);
            known.read(&(0..1)).unwrap();
            let stats = pager.stats();
            // It was brought in before it was asked for, or had to be waited for; and is asked for now.
            assert_eq!((stats.prefetch_hits + stats.faults, stats.loaded, stats.ahead), (1, 1, 0));
            assert_eq!(stats.prefetched, stats.prefetch_hits);
            drop(known);
            nothing_is_left(&pager);
        },
        None,
    );
}
