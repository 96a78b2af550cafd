//! A disk in memory that fails as it is told: for tests.

use super::disk::Disk;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write,
    Punch,
    Sync,
}

/// Clones are one disk: a test keeps one, the tier has another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faulty(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// What is not here reads as zero and takes no room.
    blocks: BTreeMap<u64, [u8; BLOCK]>,
    room: Option<usize>,
    short: Option<u32>,
    faults: Vec<Fault>,
    /// Bits that are other than they were written.
    flipped: BTreeSet<(u64, u32)>,
    /// Reads and writes so far.
    moves: usize,
}

/// The calls of one kind fail with `error`: from the one after the next `after`, `times` of them.
#[derive(Debug)]
struct Fault {
    call: Call,
    after: usize,
    times: usize,
    error: i32,
}

const BLOCK: usize = 64;

impl Faulty {
    /// From now on calls move a part of what they are asked, of random length, or are interrupted.
    pub(crate) fn move_short_counts(&self, seed: u32) {
        self.state().short = Some(seed);
    }

    /// After the next `after` calls of a kind, `times` of them fail.
    pub(crate) fn fail(&self, call: Call, after: usize, times: usize, error: i32) {
        self.state().faults.push(Fault { call, after, times, error });
    }

    /// Forget all faults that have not come yet, and the limit. What is flipped stays so.
    pub(crate) fn mend(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.room = None;
    }

    /// The most bytes that it can hold.
    pub(crate) fn limit(&self, room: usize) {
        self.state().room = Some(room);
    }

    /// Reads and writes that were asked of it so far, those that failed too.
    pub(crate) fn moves(&self) -> usize {
        self.state().moves
    }

    /// The bytes that it holds.
    pub(crate) fn held(&self) -> usize {
        self.state().blocks.len() * BLOCK
    }

    /// Flip a bit of the byte at `at`, which must be held.
    pub(crate) fn flip(&self, at: u64, bit: u32) {
        let (block, byte) = State::place(at);
        let mut state = self.state();
        state.blocks.get_mut(&block).unwrap()[byte] ^= 1 << bit;
        if !state.flipped.remove(&(at, bit)) {
            state.flipped.insert((at, bit));
        }
    }

    /// Flip a bit of the first byte of a block that is held, the one of that number modulo how many there are; none
    /// where that range of `page` bytes has a flipped bit already (of three the checksum need not tell).
    pub(crate) fn flip_any(&self, number: usize, bit: u32, page: u64) {
        let held: Vec<u64> = self.state().blocks.keys().map(|block| block * BLOCK as u64).collect();
        let Some(&at) = (!held.is_empty()).then(|| &held[number % held.len()]) else { return };
        let start = at / page * page;
        if !self.is_flipped(start..start + page) {
            self.flip(at, bit);
        }
    }

    /// Whether a range has bits that are other than they were written.
    pub(crate) fn is_flipped(&self, range: Range<u64>) -> bool {
        self.state().flipped.range((range.start, 0)..(range.end, 0)).next().is_some()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    /// Fail, if this call is to fail; else how many of `asked` bytes to move.
    fn begin(&mut self, call: Call, asked: usize) -> io::Result<usize> {
        self.moves += usize::from(matches!(call, Call::Read | Call::Write));
        for fault in self.faults.iter_mut().filter(|fault| fault.call == call && fault.times > 0) {
            if fault.after == 0 {
                fault.times -= 1;
                return Err(io::Error::from_raw_os_error(fault.error));
            }
            fault.after -= 1;
        }
        let Some(random) = &mut self.short else { return Ok(asked) };
        *random = crc32fast::hash(&random.to_le_bytes());
        if random.is_multiple_of(8) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(if asked == 0 { 0 } else { 1 + *random as usize % asked })
    }

    /// What was flipped in a range is so no longer.
    fn written(&mut self, range: Range<u64>) {
        if !self.flipped.is_empty() {
            self.flipped.retain(|(at, _)| !range.contains(at));
        }
    }

    /// `count` bytes from a position on, block by block: which of them, the block, and where in it they begin.
    fn parts(at: u64, count: usize) -> impl Iterator<Item = (Range<usize>, u64, usize)> {
        let next = move |within: &Range<usize>| {
            let place = (at + within.end as u64) as usize % BLOCK;
            Some(within.end..count.min(within.end + BLOCK - place)).filter(|next| !next.is_empty())
        };
        std::iter::successors(next(&(0..0)), next).map(move |within| {
            let (block, place) = Self::place(at + within.start as u64);
            (within, block, place)
        })
    }

    /// The block of a position, and the position in it.
    fn place(at: u64) -> (u64, usize) {
        (at / BLOCK as u64, at as usize % BLOCK)
    }
}

impl Disk for Faulty {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let mut state = self.state();
        let count = state.begin(Call::Read, bytes.len())?;
        for (within, block, place) in State::parts(at, count) {
            let part = &mut bytes[within];
            match state.blocks.get(&block) {
                Some(block) => part.copy_from_slice(&block[place..][..part.len()]),
                None => part.fill(0),
            }
        }
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut state = self.state();
        let count = state.begin(Call::Write, bytes.len())?;
        for (within, block, place) in State::parts(at, count) {
            let is_full = state.room.is_some_and(|room| (state.blocks.len() + 1) * BLOCK > room);
            if !state.blocks.contains_key(&block) && is_full {
                return if within.start > 0 { Ok(within.start) } else { Err(io::ErrorKind::StorageFull.into()) };
            }
            state.written(at + within.start as u64..at + within.end as u64);
            let part = &bytes[within];
            state.blocks.entry(block).or_insert([0; BLOCK])[place..][..part.len()].copy_from_slice(part);
        }
        Ok(count)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.begin(Call::Punch, 0)?;
        let (first, end) = (at.div_ceil(BLOCK as u64), (at + len) / BLOCK as u64);
        state.blocks.retain(|&block, _| !(first..end).contains(&block));
        state.written(first * BLOCK as u64..end * BLOCK as u64);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.state().begin(Call::Sync, 0).map(|_| ())
    }

    fn free(&self) -> Option<u64> {
        let state = self.state();
        state.room.map(|room| room.saturating_sub(state.blocks.len() * BLOCK) as u64)
    }
}
