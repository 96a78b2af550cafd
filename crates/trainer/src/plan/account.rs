//! Peaks from a record.

use super::ledger::{Event, Record};
use super::paging::{Floor, PAGES};
use super::pool::{Block, Pool, SLACK};
use super::{Bytes, Category, Machine, Peak, Phase};
use std::collections::HashMap;

/// What a record tells, where buffers of at least a page of one size are paged.
#[derive(Clone, Debug)]
pub(super) struct Account {
    pub phases: Vec<Peak>,
    pub floor: Floor,
}

impl Account {
    /// The run's peak: the largest phase's, and of several that are as large (the pool keeps what was freed) that of
    /// the one that uses most.
    pub(super) fn peak(&self) -> &Peak {
        let largest = self.phases.iter().max_by_key(|peak| (peak.bytes.sum(), peak.in_use()));
        largest.expect("a run has phases")
    }
}

/// Go through the record, adding up, with pages of the size of that number.
pub(super) fn account(record: &Record, machine: &Machine, size: usize) -> Account {
    let page = PAGES[size];
    let mut now = Bytes::default();
    now[Category::Program] = machine.program;
    let (mut pool, mut blocks) = (Pool::default(), HashMap::<usize, Block>::new());
    // Where others are paged: those that cannot be.
    let (mut small, mut small_blocks) = (Pool::of_small_blocks(), HashMap::<usize, Block>::new());
    // Of live buffers: bytes, and those that can be paged, by category.
    let (mut live, mut large) = (0, Bytes::default());
    // Bytes of the pages of those now, and the most that ever were.
    let (mut pages, mut most_pages) = (0, 0);
    // The most that was taken of the heap for a while.
    let mut most_passed = 0;
    let mut phase = Phase::Load;
    let mut peaks: Vec<Peak> = Vec::new();
    for event in &record.events {
        let mut passed = 0;
        match *event {
            Event::Begun(begun) => phase = begun,
            Event::Scratch([main, other]) => {
                if let Some(threads) = machine.cpu_threads {
                    now[Category::Scratch] = main + other.saturating_mul(threads.saturating_sub(1) as u64);
                }
            }
            Event::Made(piece) => {
                let (bytes, category) = (record.pieces[piece].bytes, record.category(piece));
                live += bytes;
                now[category] += bytes;
                if record.pieces[piece].pages(page) {
                    large[category] += bytes;
                    pages += bytes.next_multiple_of(page);
                    most_pages = most_pages.max(pages);
                } else {
                    small_blocks.insert(piece, small.take(bytes));
                }
                if machine.cpu_threads.is_some() {
                    blocks.insert(piece, pool.take(bytes));
                }
            }
            Event::Freed(piece) => {
                let (bytes, category) = (record.pieces[piece].bytes, record.category(piece));
                live -= bytes;
                now[category] -= bytes;
                match small_blocks.remove(&piece) {
                    Some(block) => small.give(block),
                    None => {
                        large[category] -= bytes;
                        pages -= bytes.next_multiple_of(page);
                    }
                }
                if let Some(block) = blocks.remove(&piece) {
                    pool.give(block);
                }
            }
            Event::Passed(bytes) => passed = bytes,
        }
        most_passed = most_passed.max(passed);
        let mut moment = now;
        moment[Category::Working] = moment[Category::Working].saturating_add(passed);
        let peak = match peaks.iter().position(|peak| peak.phase == phase) {
            Some(found) => &mut peaks[found],
            None => peaks.push_mut(Peak { phase, bytes: moment, pageable: large }),
        };
        // What the pool keeps is counted at the phase's worst, beside what is in use when most is.
        let resident = moment.sum() + pool.resident.saturating_sub(live);
        let most = peak.bytes.sum().max(resident);
        if moment.sum() > peak.in_use() {
            (peak.bytes, peak.pageable) = (moment, large);
        }
        peak.bytes[Category::Pool] = most - peak.in_use();
    }
    // The run's worst may be another moment than the one at which most is in use: the pool's part is that of the worst.
    let most = peaks.iter().map(|peak| peak.bytes.sum()).max().unwrap_or(0);
    if let Some(peak) = peaks.iter_mut().max_by_key(|peak| peak.in_use()) {
        peak.bytes[Category::Pool] = most - peak.in_use();
    }
    peaks.sort_by_key(|peak| Phase::ALL.iter().position(|phase| *phase == peak.phase));
    // Small blocks are never given back: at the end there are as many as ever were.
    let fixed = (machine.program + now[Category::Scratch] + small.resident).saturating_add(most_passed);
    let floor = Floor::new(record, fixed, size, most_pages + most_pages / 4 + SLACK);
    Account { phases: peaks, floor }
}
