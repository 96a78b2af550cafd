//! A pager is a map of byte vectors: whatever is done to it, in whatever order, under whatever limit, and on a disk that
//! fails, is full, is mended, or gives back other bits than it was given.

use super::{PAGE, byte, of_pages, of_pages_over, pager};
use crate::file::faulty::{Call, Faulty};
use crate::{Access, Allocation, Error, Hold, Limit, Pager};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::ops::Range;

/// One thing to do. Numbers choose among what there is, modulo how much.
#[derive(Clone, Debug)]
enum Act {
    Alloc(usize),
    Write(usize, Range<usize>, u64),
    Read(usize, Range<usize>),
    /// Keep a range in memory until it is let go.
    Hold(usize, Range<usize>),
    LetGo(usize),
    Prefetch(usize, Range<usize>),
    Cool(usize, Range<usize>),
    Discard(usize, Range<usize>),
    Free(usize),
    Capacity(usize),
    /// Some calls of the disk fail, after others.
    Fail(Call, usize, usize, i32),
    /// The disk takes so many bytes more.
    Room(usize),
    Flip(usize, u32),
    Mend,
}

fn act(page: usize) -> impl Strategy<Value = Act> {
    // The most bytes of an allocation.
    let most = 6 * page;
    let range = move || (0..=most, 0..=most).prop_map(|(a, b)| a.min(b)..a.max(b));
    prop_oneof![
        3 => (1..=most).prop_map(Act::Alloc),
        8 => (any::<usize>(), range(), any::<u64>()).prop_map(|(i, range, seed)| Act::Write(i, range, seed)),
        8 => (any::<usize>(), range()).prop_map(|(i, range)| Act::Read(i, range)),
        2 => (any::<usize>(), range()).prop_map(|(i, range)| Act::Hold(i, range)),
        2 => any::<usize>().prop_map(Act::LetGo),
        2 => (any::<usize>(), range()).prop_map(|(i, range)| Act::Prefetch(i, range)),
        1 => (any::<usize>(), range()).prop_map(|(i, range)| Act::Cool(i, range)),
        1 => (any::<usize>(), range()).prop_map(|(i, range)| Act::Discard(i, range)),
        1 => any::<usize>().prop_map(Act::Free),
        1 => (1usize..16).prop_map(Act::Capacity),
    ]
}

/// What happens to a disk.
fn fate(page: usize) -> impl Strategy<Value = Act> {
    let call = prop::sample::select(vec![Call::Read, Call::Write, Call::Punch]);
    let error = prop::sample::select(vec![libc::EIO, libc::ENOSPC]);
    prop_oneof![
        3 => (call, 0usize..4, 1usize..6, error).prop_map(|(call, after, times, error)| Act::Fail(call, after, times, error)),
        1 => (0usize..3 * page).prop_map(Act::Room),
        1 => (any::<usize>(), 0u32..8).prop_map(|(number, bit)| Act::Flip(number, bit)),
        3 => Just(Act::Mend),
    ]
}

/// An allocation and what it must hold; nothing is known of what was discarded.
struct Known {
    allocation: Allocation,
    /// Apart for ever: names its pages.
    number: usize,
    bytes: Vec<Option<u8>>,
}

struct Machine {
    pager: Pager,
    /// Bytes of a page.
    page: usize,
    disk: Faulty,
    /// The disk may fail, or have failed since it was mended.
    failing: bool,
    capacity: usize,
    /// Pages that may be resident: more than the capacity where more were held when it shrank.
    most: usize,
    known: Vec<Known>,
    made: usize,
    held: Vec<(Hold, BTreeSet<(usize, usize)>)>,
}

fn clip(range: &Range<usize>, known: &Known) -> Range<usize> {
    let len = known.bytes.len();
    range.start.min(len)..range.end.min(len)
}

impl Machine {
    /// On a pager of 4 pages of that size.
    fn new(pager: Pager, page: usize, disk: Faulty) -> Self {
        let (known, held) = (Vec::new(), Vec::new());
        Self { pager, page, disk, failing: false, capacity: 4, most: 4, known, made: 0, held }
    }

    fn pages(&self, range: &Range<usize>, known: &Known) -> BTreeSet<(usize, usize)> {
        let end = if range.is_empty() { range.start / self.page } else { range.end.div_ceil(self.page) };
        (range.start / self.page..end).map(|page| (known.number, page)).collect()
    }

    /// That an error has a cause, `fits` being whether there was room.
    fn explain(&self, error: &Error, fits: bool) {
        match error {
            Error::Full { .. } => assert!(!fits || self.most > self.capacity, "it fits, and was refused: {error}"),
            Error::Stuck { source, .. } => self.explain(source, true),
            Error::File { .. } | Error::DiskFull { .. } => assert!(self.failing, "{error}"),
            Error::Damaged { position, .. } => {
                assert!(self.disk.is_flipped(*position..position + self.page as u64), "{error}")
            }
            error => panic!("{error}"),
        }
    }

    fn held_pages(&self) -> BTreeSet<(usize, usize)> {
        self.held.iter().flat_map(|(_, pages)| pages.iter().copied()).collect()
    }

    /// Whether a range can be held beside what is: it can exactly if all of that fits, or nothing of it is new. (While more
    /// is in memory than the capacity, because it was held when that shrank, it depends on what leaves first.)
    fn fits(&self, i: usize, range: &Range<usize>) -> bool {
        let held = self.held_pages();
        let new = self.pages(range, &self.known[i]).difference(&held).count();
        new == 0 || held.len() + new <= self.capacity
    }

    fn check(&self, i: usize, range: Range<usize>) {
        let (fits, over) = (self.fits(i, &range), self.most > self.capacity);
        let Known { allocation, bytes, .. } = &self.known[i];
        match allocation.pin(range.clone()) {
            Ok(pin) => {
                assert!(fits || over, "{range:?} cannot fit");
                let wrong = pin.iter().zip(&bytes[range.clone()]).position(|(a, b)| b.is_some_and(|b| *a != b));
                assert_eq!(wrong.map(|at| range.start + at), None, "the first byte that is another");
            }
            Err(error) => self.explain(&error, fits),
        }
    }

    fn act(&mut self, act: Act) {
        if let Act::Alloc(bytes) = act {
            let allocation = self.pager.alloc(bytes).unwrap();
            self.known.push(Known { allocation, number: self.made, bytes: vec![Some(0); bytes] });
            self.made += 1;
            return;
        }
        let count = self.known.len();
        match act {
            Act::Capacity(pages) => {
                let held = self.held_pages().len();
                let set = self.pager.set_limit(Limit::Pages(pages * self.page));
                self.capacity = pages;
                // What could not leave then leaves when next something must come.
                match set {
                    Err(error @ Error::Stuck { .. }) => {
                        self.most = self.most.max(pages);
                        self.explain(&error, true);
                    }
                    set => {
                        assert_eq!(set.is_ok(), held <= pages, "{held} pages are held, {pages} allowed: {set:?}");
                        self.most = pages.max(held);
                    }
                }
            }
            Act::Fail(call, after, times, error) => {
                self.failing = true;
                self.disk.fail(call, after, times, error);
            }
            Act::Room(bytes) => {
                self.failing = true;
                self.disk.limit(self.disk.held() + bytes);
            }
            Act::Flip(number, bit) => self.disk.flip_any(number, bit, self.page as u64),
            Act::Mend => {
                self.disk.mend();
                self.failing = false;
                self.act(Act::Capacity(self.capacity));
            }
            Act::LetGo(i) if !self.held.is_empty() => drop(self.held.swap_remove(i % self.held.len())),
            _ if count == 0 => {}
            Act::Write(i, range, seed) => {
                let i = i % count;
                let (range, number) = (clip(&range, &self.known[i]), self.known[i].number);
                // Whoever holds a page may be reading it.
                if self.held_pages().iter().any(|(other, _)| *other == number) {
                    return;
                }
                let (fits, over) = (self.fits(i, &range), self.most > self.capacity);
                let Known { allocation, bytes, .. } = &mut self.known[i];
                match allocation.pin_mut(range.clone()) {
                    Ok(mut pin) => {
                        assert!(fits || over);
                        for (at, (to, known)) in pin.iter_mut().zip(&mut bytes[range]).enumerate() {
                            *to = byte(seed, at);
                            *known = Some(*to);
                        }
                    }
                    Err(error) => self.explain(&error, fits),
                }
            }
            Act::Read(i, range) => self.check(i % count, clip(&range, &self.known[i % count])),
            Act::Hold(i, range) => {
                let i = i % count;
                let range = clip(&range, &self.known[i]);
                match self.known[i].allocation.hold(range.clone(), Access::Read) {
                    Ok(hold) => self.held.push((hold, self.pages(&range, &self.known[i]))),
                    Err(error) => self.explain(&error, self.fits(i, &range)),
                }
            }
            Act::Prefetch(i, range) => self.known[i % count].allocation.prefetch(range),
            Act::Cool(i, range) => self.known[i % count].allocation.cool(range),
            Act::Discard(i, range) => {
                let known = &mut self.known[i % count];
                let range = clip(&range, known);
                known.bytes[range.clone()].fill(None);
                known.allocation.discard(range);
            }
            Act::Free(i) => {
                let number = self.known.swap_remove(i % count).number;
                // The addresses stay while somebody holds them, and so do the frames.
                assert!(
                    self.pager.stats().held >= self.held_pages().iter().filter(|p| p.0 == number).count() * self.page
                );
            }
            Act::Alloc(_) | Act::LetGo(_) => {}
        }
        let stats = self.pager.stats();
        assert_eq!(stats.held, self.held_pages().len() * self.page);
        assert!(stats.resident <= self.most * self.page, "{stats:?}");
    }

    /// At the end, on a disk that works, each page is what was written or is damaged; and when all are freed, nothing
    /// is left.
    fn end(mut self) {
        self.act(Act::Mend);
        self.held.clear();
        self.act(Act::Capacity(7));
        for i in 0..self.known.len() {
            let bytes = self.known[i].bytes.len();
            (0..bytes).step_by(self.page).for_each(|at| self.check(i, at..bytes.min(at + self.page)));
            if !self.disk.is_flipped(0..u64::MAX) {
                self.check(i, 0..bytes);
            }
        }
        self.known.clear();
        let stats = self.pager.stats();
        assert_eq!((stats.allocated, stats.resident, stats.held, stats.away, stats.ahead), (0, 0, 0, 0, 0));
        assert_eq!(stats.file.unwrap().stored, 0);
    }
}

/// Pages as large as those of the memory's blocks and larger, too: few and short, for all bytes are looked at.
fn large_pages() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![256 << 10, 2 << 20, 4 << 20])
}

/// Less than `count` acts, before them an allocation larger than memory.
fn acts(page: usize, act: impl Strategy<Value = Act>, count: usize) -> impl Strategy<Value = Vec<Act>> {
    let first = (5 * page..=6 * page).prop_map(Act::Alloc);
    (first, prop::collection::vec(act, 1..count)).prop_map(|(first, rest)| [vec![first], rest].concat())
}

/// Acts, and what happens to the disk meanwhile.
fn acts_and_fates(page: usize, count: usize) -> impl Strategy<Value = Vec<Act>> {
    acts(page, prop_oneof![5 => act(page), 1 => fate(page)], count)
}

fn act_out(page: usize, acts: Vec<Act>) {
    let mut machine = Machine::new(of_pages(page, 4), page, Faulty::default());
    acts.into_iter().for_each(|act| machine.act(act));
    machine.end();
}

fn act_out_on_a_disk_that_fails(page: usize, acts: Vec<Act>, seed: u32) {
    let disk = Faulty::default();
    disk.move_short_counts(seed);
    let mut machine = Machine::new(of_pages_over(&disk, page, 4, 4), page, disk);
    acts.into_iter().for_each(|act| machine.act(act));
    machine.end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pager_is_a_map_of_bytes(acts in acts(PAGE, act(PAGE), 150)) {
        act_out(PAGE, acts);
    }

    #[test]
    fn a_pager_on_a_disk_that_fails_loses_nothing_and_gives_no_wrong_byte(
        acts in acts_and_fates(PAGE, 150), seed in any::<u32>(),
    ) {
        act_out_on_a_disk_that_fails(PAGE, acts, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pager_of_large_pages_is_a_map_of_bytes(
        (page, acts) in large_pages().prop_flat_map(|page| (Just(page), acts(page, act(page), 40))),
    ) {
        act_out(page, acts);
    }

    #[test]
    fn large_pages_on_a_disk_that_fails_lose_nothing_and_give_no_wrong_byte(
        (page, acts) in large_pages().prop_flat_map(|page| (Just(page), acts_and_fates(page, 40))),
        seed in any::<u32>(),
    ) {
        act_out_on_a_disk_that_fails(page, acts, seed);
    }
}

/// The same walk, round after round: a cycle of 80 pages in a memory of 24.
#[test]
fn rounds_over_more_than_fits_keep_every_byte_and_a_part_of_the_pages() {
    const ALLOCATIONS: u64 = 40;
    let pager = pager(24);
    let mut all: Vec<_> = (0..ALLOCATIONS).map(|_| pager.alloc(2 * PAGE).unwrap()).collect();
    let mut loaded = Vec::new();
    for round in 0..9 {
        for (i, allocation) in all.iter_mut().enumerate() {
            let seed = round * ALLOCATIONS + i as u64;
            if round > 0 {
                let pin = allocation.pin(0..2 * PAGE).unwrap();
                let right = |(at, found): (usize, &u8)| *found == byte(seed - ALLOCATIONS, at);
                assert!(pin.iter().enumerate().all(right), "round {round}, {i}");
            }
            let mut pin = allocation.pin_mut(0..2 * PAGE).unwrap();
            pin.iter_mut().enumerate().for_each(|(at, to)| *to = byte(seed, at));
        }
        loaded.push(pager.stats().loaded as usize / PAGE);
    }
    // LRU would load all 80 in every round, the optimum 57. The rounds before the third teach the order; of the 24
    // frames 4 are for what is ahead and free, and half of the others at least must hold something from round to round.
    let later = (loaded[8] - loaded[3]) as f64 / 5.0;
    assert!(later <= 70.0, "{later} pages a round: {loaded:?}");
    assert!(pager.stats().prefetch_hits > 0, "{:?}", pager.stats());
}
