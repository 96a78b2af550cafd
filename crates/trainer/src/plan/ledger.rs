//! The record of a counted run: which buffers were made and freed, in which order and phase.
//!
//! What a buffer is for is seen from its life. Weights, adapters, moments and the batch are named by who made them; of
//! the others, one that dies in the phase it was born in is working memory, one born in forward that dies in the
//! backward after it was saved for it, and one that outlives both is a gradient.

use super::paging::PAGES;
use super::scratch::{Nest, Scratch};
use super::{Category, Phase};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most bytes that may be in use at once: sums of several of what is counted then fit in 64 bits.
const MOST: u64 = 1 << 62;

/// What happened, in order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Begun(Phase),
    Made(usize),
    Freed(usize),
    /// Bytes of the kernels' working memory from now on: of the calling thread's, of each other's.
    Scratch([u64; 2]),
    /// Bytes of the heap that were taken and given back.
    Passed(u64),
}

/// A buffer.
#[derive(Debug)]
pub(super) struct Piece {
    pub bytes: u64,
    /// The tensor's name, where it has one.
    pub name: Option<String>,
    label: Option<Category>,
    /// Numbers of phases.
    made: usize,
    freed: Option<usize>,
}

/// The buffers that one call of a kernel reads and writes.
#[derive(Debug)]
pub(super) struct Call {
    pub kernel: &'static str,
    pub pieces: Vec<usize>,
    /// Of those that could be paged.
    pub bytes: u64,
    /// The last buffer with a name that this call or one before it touched.
    pub near: Option<usize>,
}

impl Piece {
    /// Whether it can be paged: it is not smaller than a page, and not the batch, which every layer reads.
    pub(super) fn pages(&self, page: u64) -> bool {
        self.bytes >= page && self.label != Some(Category::Batch)
    }

    /// Bytes of its pages, of which a call touches `touched` bytes: a part may begin and end within a page.
    fn held(&self, touched: u64, page: u64) -> u64 {
        (touched.next_multiple_of(page) + page).min(self.bytes.next_multiple_of(page))
    }
}

/// Everything that happened.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub pieces: Vec<Piece>,
    pub events: Vec<Event>,
    /// By size of a page, the call with the most bytes.
    pub largest: [Option<Call>; PAGES.len()],
    /// Bytes in use, and whether more were asked for than can be counted.
    live: u64,
    is_full: bool,
    near: Option<usize>,
    phases: Vec<Phase>,
    scratch: Scratch,
}

impl Record {
    /// What a buffer was for.
    pub(super) fn category(&self, piece: usize) -> Category {
        let Piece { label, made, freed, .. } = self.pieces[piece];
        let born = self.phases[made];
        match (label, freed) {
            (Some(label), _) => label,
            (None, Some(freed)) if freed == made => Category::Working,
            (None, Some(freed)) if born == Phase::Forward && freed == made + 1 => Category::Saved,
            _ => Category::Gradients,
        }
    }
}

/// A [`Record`] that is being written.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Record>);

impl Ledger {
    fn record(&self) -> MutexGuard<'_, Record> {
        // A record is whole between any two of the calls below.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, phase: Phase) {
        let mut record = self.record();
        record.phases.push(phase);
        record.events.push(Event::Begun(phase));
    }

    /// The phase that runs.
    pub(super) fn phase(&self) -> Option<Phase> {
        self.record().phases.last().copied()
    }

    /// A buffer; none where there is more than can be counted.
    pub(super) fn made(&self, bytes: u64) -> Option<usize> {
        let mut record = self.record();
        let live = record.live.checked_add(bytes).filter(|live| *live <= MOST);
        record.is_full |= live.is_none();
        record.live = live?;
        let (piece, made) = (record.pieces.len(), record.phases.len().saturating_sub(1));
        record.pieces.push(Piece { bytes, name: None, label: None, made, freed: None });
        record.events.push(Event::Made(piece));
        Some(piece)
    }

    pub(super) fn freed(&self, piece: usize) {
        let mut record = self.record();
        let phase = record.phases.len().saturating_sub(1);
        // A record that was closed has no pieces.
        if let Some(found) = record.pieces.get_mut(piece) {
            found.freed = Some(phase);
            record.live -= record.pieces[piece].bytes;
            record.events.push(Event::Freed(piece));
        }
    }

    /// Whether more memory was asked for than can be counted.
    pub(super) fn is_full(&self) -> bool {
        self.record().is_full
    }

    pub(super) fn label(&self, piece: usize, category: Category) {
        self.record().pieces[piece].label = Some(category);
    }

    pub(super) fn name(&self, piece: usize, name: &str) {
        self.record().pieces[piece].name = Some(name.into());
    }

    /// A call of a kernel on these buffers, with the bytes of each that it touches.
    pub(super) fn call(&self, kernel: &'static str, mut touched: Vec<(usize, u64)>) {
        let mut record = self.record();
        // Of two parts of one buffer, the larger: such calls are of the whole and a part.
        touched.sort_unstable_by_key(|(piece, bytes)| (*piece, u64::MAX - bytes));
        touched.dedup_by_key(|(piece, _)| *piece);
        let Record { pieces, largest, near, .. } = &mut *record;
        *near = touched.iter().map(|(piece, _)| *piece).find(|piece| pieces[*piece].name.is_some()).or(*near);
        for (largest, page) in largest.iter_mut().zip(PAGES) {
            let paged = touched.iter().filter(|(piece, _)| pieces[*piece].pages(page));
            let bytes = paged.map(|(piece, bytes)| pieces[*piece].held(*bytes, page)).sum();
            if largest.as_ref().is_none_or(|largest| largest.bytes < bytes) {
                let pieces = touched.iter().map(|(piece, _)| *piece).collect();
                *largest = Some(Call { kernel, pieces, bytes, near: *near });
            }
        }
    }

    /// Working memory that a kernel of the CPU backend asks for.
    pub(super) fn scratch(&self, nest: &Nest) {
        let mut record = self.record();
        if record.scratch.grow(nest) {
            let bytes = record.scratch.bytes();
            record.events.push(Event::Scratch(bytes));
        }
    }

    /// Bytes that were taken of the heap and given back to the system at once.
    pub(super) fn passed(&self, bytes: u64) {
        self.record().events.push(Event::Passed(bytes));
    }

    /// Take the record; what is freed from now on is not seen.
    pub(super) fn close(&self) -> Record {
        std::mem::take(&mut self.record())
    }
}
