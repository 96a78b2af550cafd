//! A disk in memory that fails as it is told: for tests.

use super::disk::Disk;
use std::collections::BTreeMap;
use std::io;
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

    /// Forget all faults that have not come yet.
    pub(crate) fn mend(&self) {
        self.state().faults.clear();
    }

    /// The most bytes that it can hold.
    pub(crate) fn limit(&self, room: usize) {
        self.state().room = Some(room);
    }

    /// The bytes that it holds.
    pub(crate) fn held(&self) -> usize {
        self.state().blocks.len() * BLOCK
    }

    /// Flip a bit of the byte at `at`, which must be held.
    pub(crate) fn flip(&self, at: u64, bit: u32) {
        let (block, byte) = State::place(at);
        self.state().blocks.get_mut(&block).unwrap()[byte] ^= 1 << bit;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    /// Fail, if this call is to fail; else how many of `asked` bytes to move.
    fn begin(&mut self, call: Call, asked: usize) -> io::Result<usize> {
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

    /// The block of a position, and the position in it.
    fn place(at: u64) -> (u64, usize) {
        (at / BLOCK as u64, at as usize % BLOCK)
    }
}

impl Disk for Faulty {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let mut state = self.state();
        let count = state.begin(Call::Read, bytes.len())?;
        for (i, byte) in bytes[..count].iter_mut().enumerate() {
            let (block, place) = State::place(at + i as u64);
            *byte = state.blocks.get(&block).map_or(0, |block| block[place]);
        }
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut state = self.state();
        let count = state.begin(Call::Write, bytes.len())?;
        for (i, &byte) in bytes[..count].iter().enumerate() {
            let (block, place) = State::place(at + i as u64);
            let is_full = state.room.is_some_and(|room| (state.blocks.len() + 1) * BLOCK > room);
            match state.blocks.contains_key(&block) || !is_full {
                true => state.blocks.entry(block).or_insert([0; BLOCK])[place] = byte,
                false if i > 0 => return Ok(i),
                false => return Err(io::ErrorKind::StorageFull.into()),
            }
        }
        Ok(count)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.begin(Call::Punch, 0)?;
        let (first, end) = (at.div_ceil(BLOCK as u64), (at + len) / BLOCK as u64);
        state.blocks.retain(|&block, _| !(first..end).contains(&block));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.state().begin(Call::Sync, 0).map(|_| ())
    }
}
