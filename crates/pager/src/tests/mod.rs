//! Whole pagers: against a plain map of bytes, under faults, from several threads, and how well they foresee.

mod ahead;
mod faults;
mod machine;
mod threads;
mod tiers;

use crate::core::BATCH;
use crate::file::FileTier;
use crate::file::faulty::Faulty;
use crate::space::BLOCK;
use crate::{Error, FileOptions, Host, Limit, Options, Pager};

/// The least page there is.
pub(super) const PAGE: usize = 64 << 10;

/// A pager of so many pages in memory, over a file in the system's folder for such.
pub(super) fn pager(pages: usize) -> Pager {
    of_pages(PAGE, pages)
}

/// The same of pages of that size.
pub(super) fn of_pages(page: usize, pages: usize) -> Pager {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
    let options = Options { page, look_ahead: 4 * page, ..Options::new(Limit::Pages(pages * page), Some(file)) };
    Pager::new(options).expect("a pager over a temporary file")
}

/// A pager of so many pages in memory, `look_ahead` of them ahead, over a disk that may fail.
pub(super) fn over(disk: &Faulty, pages: usize, look_ahead: usize) -> Pager {
    of_pages_over(disk, PAGE, pages, look_ahead)
}

/// The same of pages of that size.
pub(super) fn of_pages_over(disk: &Faulty, page: usize, pages: usize, look_ahead: usize) -> Pager {
    let tier = FileTier::on(Box::new(disk.clone()), "a disk that fails".into(), page, u64::MAX);
    Pager::over(Host::on(tier, page), page, Limit::Pages(pages * page), look_ahead * page).unwrap()
}

/// Bytes that belong to a place and a seed.
pub(super) fn byte(seed: u64, at: usize) -> u8 {
    let mixed = (seed ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

#[test]
fn what_cannot_work_is_refused_before_anything_starts() {
    let options = |page, limit| Options { page, ..Options::new(Limit::Pages(limit), None) };
    for page in [0, 1, 4096, 32 << 10, (64 << 10) + 1, 8 << 20] {
        assert!(matches!(Pager::new(options(page, 1 << 30)), Err(Error::PageSize { found }) if found == page));
    }
    for limit in [0, 1, PAGE - 1] {
        assert!(matches!(Pager::new(options(PAGE, limit)), Err(Error::Capacity { .. })));
    }
    let missing = FileOptions { folder: "/nowhere/at/all".into(), direct: false, capacity: u64::MAX };
    let over = Options::new(Limit::Pages(1 << 20), Some(missing));
    let message = Pager::new(over).unwrap_err().to_string();
    assert!(message.contains("/nowhere/at/all"), "{message}");
}

#[test]
fn without_a_file_what_does_not_fit_is_an_error_that_says_so() {
    let pager = Pager::new(Options { page: PAGE, ..Options::new(Limit::Pages(2 * PAGE), None) }).unwrap();
    let mut first = pager.alloc(2 * PAGE).unwrap();
    first.pin_mut(0..2 * PAGE).unwrap().fill(7);
    let second = pager.alloc(1).unwrap();
    let error = second.pin(0..1).unwrap_err();
    assert!(matches!(&error, Error::Stuck { source, .. } if matches!(**source, Error::NoTier)), "{error}");
    assert!(first.pin(0..2 * PAGE).unwrap().iter().all(|byte| *byte == 7));
    // What is not wanted leaves without a file.
    first.discard(0..2 * PAGE);
    assert_eq!(*second.pin(0..1).unwrap(), [0]);
}

/// The system grants addresses for far more than it has; the books of what cannot be used are not even begun.
#[test]
fn an_allocation_whose_books_fill_the_memory_is_an_error() {
    let pager = pager(4);
    for bytes in [1 << 46, usize::MAX] {
        assert!(matches!(pager.alloc(bytes), Err(Error::Address { .. })));
    }
    assert_eq!((pager.stats().allocated, pager.alloc(1 << 20).unwrap().bytes()), (0, 1 << 20));
}

#[test]
fn a_range_beyond_its_allocation_is_named() {
    let pager = pager(2);
    let allocation = pager.alloc(100).unwrap();
    let reversed = std::ops::Range { start: 5, end: 4 };
    for range in [0..101, 101..101, reversed] {
        assert!(matches!(allocation.pin(range), Err(Error::Range { available: 100, .. })));
    }
    assert!(allocation.pin(100..100).unwrap().is_empty());
}

#[test]
fn a_range_that_is_cool_is_so_as_far_as_it_exists() {
    let pager = pager(4);
    let mut all: Vec<_> = (0..3).map(|_| pager.alloc(2 * PAGE).unwrap()).collect();
    all[..2].iter_mut().for_each(|allocation| allocation.pin_mut(0..2 * PAGE).unwrap().fill(1));
    all[1].cool(0..usize::MAX);
    all[1].cool(usize::MAX..usize::MAX);
    all[2].pin_mut(0..2 * PAGE).unwrap().fill(1);
    // Otherwise the first had left, unused for longest.
    drop(all[0].pin(0..2 * PAGE).unwrap());
    assert_eq!(pager.stats().faults, 0);
}

/// One write for [`BATCH`] of them, whether room is made for others, a block of the memory's at a time, or all leave.
#[test]
fn dirty_pages_that_lie_together_are_written_together() {
    let disk = Faulty::default();
    let (pages, block) = (8 * BATCH, BLOCK / PAGE);
    let pager = over(&disk, pages, 0);
    let mut allocation = pager.alloc(pages * PAGE).unwrap();
    for page in 0..pages {
        allocation.pin_mut(page * PAGE..(page + 1) * PAGE).unwrap().fill(page as u8);
    }
    let written = || (disk.moves(), pager.stats().stored as usize / PAGE);
    let mut others = pager.alloc(block * PAGE).unwrap();
    others.pin_mut(0..block * PAGE).unwrap().fill(1);
    assert_eq!(written(), (block / BATCH, block));
    pager.vacate().unwrap();
    assert_eq!(written(), ((pages + block) / BATCH, pages + block));
}

#[test]
fn two_pagers_do_not_meet() {
    let (one, two) = (pager(2), pager(2));
    let mut allocations: Vec<_> = (0..12).map(|i| [&one, &two][i % 2].alloc(PAGE).unwrap()).collect();
    for (i, allocation) in allocations.iter_mut().enumerate() {
        allocation.pin_mut(0..PAGE).unwrap().fill(i as u8);
    }
    for (i, allocation) in allocations.iter().enumerate() {
        assert!(allocation.pin(0..PAGE).unwrap().iter().all(|byte| *byte == i as u8));
    }
    assert!(one.stats().evictions >= 4 && two.stats().evictions >= 4);
}

#[test]
fn everything_pinned_is_an_error_and_not_a_deadlock() {
    let pager = pager(3);
    let held: Vec<_> = (0..3).map(|_| pager.alloc(PAGE).unwrap()).collect();
    let pins: Vec<_> = held.iter().map(|allocation| allocation.pin(0..PAGE).unwrap()).collect();
    let more = pager.alloc(PAGE).unwrap();
    let error = more.pin(0..PAGE).unwrap_err();
    // Its own page counts as pinned while it asks.
    assert!(matches!(error, Error::Full { free: 0, .. }), "{error}");
    drop(pins);
    more.pin(0..PAGE).unwrap();
}
