//! A memory for tests, of a number a page, that panics on whatever breaks the contract of [`Memory`].
//!
//! Each page knows its frame, its copy below, who touches it and whether it moves. Moves take no time, but give way in
//! between, so that under shuttle anything may happen meanwhile.

use crate::sync::thread::yield_now;
use crate::{Access, Error, Memory, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a frame holds before anything is written or after half a move: nobody may ever see it.
const TORN: u64 = u64::MAX;

/// The memory. The page of a pager over it is 1 byte.
#[derive(Debug)]
pub(crate) struct Guarded {
    works: AtomicBool,
    /// Whether the next call fails while it does not work.
    fails: fn() -> bool,
    /// Calls that could fail, so far.
    calls: AtomicUsize,
    movers: usize,
    block: usize,
}

impl Default for Guarded {
    fn default() -> Self {
        Self { works: AtomicBool::new(true), ..Self::failing(|| true) }
    }
}

#[derive(Clone, Debug, Default)]
struct Cell {
    frame: Option<u64>,
    below: Option<u64>,
    /// The move under way.
    moves: Option<&'static str>,
    readers: usize,
    writers: usize,
}

/// The pages of an allocation.
#[derive(Debug)]
pub(crate) struct Cells(Mutex<Vec<Cell>>);

impl Guarded {
    /// One whose calls fail when `fails` says so, until it works.
    pub(crate) fn failing(fails: fn() -> bool) -> Self {
        Self { works: AtomicBool::new(false), fails, calls: AtomicUsize::new(0), movers: 1, block: 1 }
    }

    /// The same with so many threads of the pager's and pages of a block.
    pub(crate) fn with(self, movers: usize, block: usize) -> Self {
        Self { movers, block, ..self }
    }

    /// Whether it works from now on.
    pub(crate) fn set_working(&self, works: bool) {
        self.works.store(works, Ordering::Relaxed);
    }

    /// Calls that could fail, so far.
    #[cfg(not(feature = "shuttle"))]
    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    fn succeeds(&self, what: &str) -> Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match self.works.load(Ordering::Relaxed) || !(self.fails)() {
            true => Ok(()),
            false => Err(Error::Device { device: "the guarded memory", what: what.into() }),
        }
    }
}

impl Cells {
    fn lock(&self) -> MutexGuard<'_, Vec<Cell>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pages are in memory and do not move.
    #[cfg(feature = "shuttle")]
    pub(crate) fn are_there(&self, pages: &Range<usize>) -> bool {
        self.lock()[pages.clone()].iter().all(|cell| cell.frame.is_some() && cell.moves.is_none())
    }

    fn each<T>(&self, pages: &Range<usize>, mut act: impl FnMut(usize, &mut Cell) -> T) -> Vec<T> {
        self.lock()[pages.clone()].iter_mut().enumerate().map(|(i, cell)| act(i, cell)).collect()
    }

    /// What a kernel does while it holds pages: look at them, see that nobody changes them, and change them itself. What
    /// each held before.
    pub(crate) fn touch(&self, pages: &Range<usize>, write: Option<u64>) -> Vec<u64> {
        let access = if write.is_some() { Access::Write } else { Access::Read };
        let before = self.each(pages, |_, cell| {
            assert!(
                cell.writers == 0 && (access == Access::Read || cell.readers == 0),
                "the test itself races: {cell:?}"
            );
            match access {
                Access::Read => cell.readers += 1,
                Access::Write => cell.writers += 1,
            }
            assert!(cell.moves.is_none_or(|moves| moves == "store" && access == Access::Read), "held, and {cell:?}");
            cell.frame.unwrap_or_else(|| panic!("held without a frame: {cell:?}"))
        });
        yield_now();
        self.each(pages, |i, cell| {
            assert_eq!(cell.frame, Some(before[i]), "held, and changed");
            cell.frame = write.or(cell.frame);
            match access {
                Access::Read => cell.readers -= 1,
                Access::Write => cell.writers -= 1,
            }
        });
        before
    }

    /// Mark pages as moving, all of which `may`.
    fn begin(&self, pages: &Range<usize>, name: &'static str, may: fn(&Cell) -> bool) {
        self.each(pages, |_, cell| {
            assert!(cell.moves.is_none() && cell.writers == 0 && may(cell), "{name} of {cell:?}");
            cell.moves = Some(name);
        });
        yield_now();
    }

    fn end(&self, pages: &Range<usize>, mut change: impl FnMut(&mut Cell)) {
        self.each(pages, |_, cell| {
            assert!(cell.writers == 0, "written during a move: {cell:?}");
            cell.moves = None;
            change(cell);
        });
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        let free = |cell: &Cell| cell.moves.is_none() && cell.frame.is_none() && cell.readers + cell.writers == 0;
        assert!(
            self.lock().iter().all(free) || std::thread::panicking(),
            "freed while it moves, is held or has frames"
        );
    }
}

impl Memory for Guarded {
    type Region = Cells;

    fn reserve(&self, pages: usize) -> Result<Cells> {
        Ok(Cells(Mutex::new(vec![Cell::default(); pages])))
    }

    fn commit(&self, cells: &Cells, pages: Range<usize>) -> Result<()> {
        cells.each(&pages, |_, cell| {
            assert!(cell.moves.is_none() && cell.frame.is_none() && cell.below.is_none(), "commit of {cell:?}");
        });
        let committed = self.succeeds("commit");
        cells.each(&pages, |_, cell| cell.frame = Some(if committed.is_ok() { 0 } else { TORN }));
        committed
    }

    fn store(&self, cells: &Cells, pages: Range<usize>) -> Result<()> {
        cells.begin(&pages, "store", |cell| cell.frame.is_some());
        let stored = self.succeeds("store");
        // Half of a copy is none; a tier that is full leaves what it has.
        let is_full = stored.is_err() && (self.fails)();
        cells.end(&pages, |cell| {
            if !is_full {
                cell.below = cell.frame.filter(|_| stored.is_ok());
            }
        });
        stored
    }

    fn load(&self, cells: &Cells, pages: Range<usize>) -> Result<()> {
        cells.begin(&pages, "load", |cell| cell.frame.is_none() && cell.below.is_some() && cell.readers == 0);
        let loaded = self.succeeds("load");
        cells.end(&pages, |cell| {
            assert!(cell.readers == 0, "read during a load: {cell:?}");
            cell.frame = if loaded.is_ok() { cell.below } else { Some(TORN) };
        });
        loaded
    }

    fn release(&self, cells: &Cells, pages: Range<usize>) {
        cells.each(&pages, |_, cell| {
            assert!(cell.moves.is_none() && cell.readers + cell.writers == 0, "release of {cell:?}");
            assert!(cell.frame.take().is_some(), "released twice");
        });
    }

    fn movers(&self) -> usize {
        self.movers
    }

    fn block(&self) -> usize {
        self.block
    }

    fn forget(&self, cells: &Cells, pages: Range<usize>) {
        cells.each(&pages, |_, cell| {
            assert!(cell.moves.is_none(), "forgotten while it moves: {cell:?}");
            cell.below = None;
        });
    }
}
