//! Parts of blocks on their way between small frames and the disk.
//!
//! Direct I/O hands the disk a list of frames. One huge frame is one entry; 256 KiB in frames of 4 KiB are 64, each handled
//! by the driver, and on a virtual machine by its host: beside two busy threads on an AMD EPYC Zen 3 that is 0.4 GB/s
//! where huge frames give 1.7, for bytes that are copied at 10. So what is no whole block is copied through a block that
//! has a huge frame.

use super::disk::Disk;
use crate::Result;
use crate::space::{BLOCK, Space};
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Bytes that one caller copies at a time.
const SLOT: usize = BLOCK / 4;

/// A file to which whole blocks of memory go as they are, and parts of them through a block of its own.
#[derive(Debug)]
pub(crate) struct Staged {
    file: File,
    stage: Space,
    /// Slots that nobody uses, by where they begin.
    free: Mutex<Vec<usize>>,
}

/// A slot in use.
struct Slot<'a> {
    staged: &'a Staged,
    start: usize,
}

impl Slot<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: within the stage, which has been opened; whoever has the slot has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.staged.stage.start().add(self.start), SLOT) }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.staged.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.start);
    }
}

impl Staged {
    /// Errors: no addresses for the block. It takes memory when it is first used.
    pub(crate) fn new(file: File) -> Result<Self> {
        let stage = Space::reserve(BLOCK)?;
        stage.open(0..BLOCK)?;
        Ok(Self { file, stage, free: Mutex::new((0..BLOCK).step_by(SLOT).collect()) })
    }

    fn slot(&self) -> Option<Slot<'_>> {
        let start = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Slot { staged: self, start })
    }

    /// How many of the first bytes go in one call, and through what if they are no whole blocks (nothing where others use
    /// all of the stage).
    fn part(&self, bytes: &[u8]) -> (usize, Option<Slot<'_>>) {
        let within = bytes.as_ptr().addr() % BLOCK;
        if within == 0 && bytes.len() >= BLOCK {
            return (bytes.len() / BLOCK * BLOCK, None);
        }
        (bytes.len().min(BLOCK - within).min(SLOT), self.slot())
    }
}

impl Disk for Staged {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let (count, slot) = self.part(bytes);
        let bytes = &mut bytes[..count];
        let Some(mut slot) = slot else { return self.file.read_at(bytes, at) };
        let staged = &mut slot.bytes()[..count];
        let read = self.file.read_at(staged, at)?;
        bytes[..read].copy_from_slice(&staged[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let (count, slot) = self.part(bytes);
        let bytes = &bytes[..count];
        let Some(mut slot) = slot else { return self.file.write_at(bytes, at) };
        let staged = &mut slot.bytes()[..count];
        staged.copy_from_slice(bytes);
        self.file.write_at(staged, at)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.file.punch(at, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn free(&self) -> Option<u64> {
        self.file.free()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::disk::{read_all, write_all};
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::thread;

    /// Bytes that tell where they are.
    fn pattern(seed: usize, len: usize) -> Vec<u8> {
        (seed..seed + len).map(|i| (i % 251) as u8).collect()
    }

    fn staged() -> Staged {
        Staged::new(tempfile::tempfile().unwrap()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_is_written_is_in_the_file_and_comes_back(
            start in 0..3 * BLOCK, len in 1..3 * BLOCK, at in 0u64..1 << 20,
        ) {
            let (disk, memory) = (staged(), Space::reserve(6 * BLOCK).unwrap());
            memory.open(0..6 * BLOCK).unwrap();
            // SAFETY: within a space that is this test's alone.
            let bytes = unsafe { std::slice::from_raw_parts_mut(memory.start().add(start), len) };
            bytes.copy_from_slice(&pattern(start, len));
            write_all(&disk, bytes, at).unwrap();
            let mut found = vec![0; len];
            disk.file.read_exact_at(&mut found, at).unwrap();
            prop_assert!(found == pattern(start, len));
            bytes.fill(0);
            read_all(&disk, bytes, at).unwrap();
            prop_assert!(bytes == found);
            prop_assert_eq!(disk.free.lock().unwrap().len(), BLOCK / SLOT);
        }
    }

    #[test]
    fn more_callers_than_there_are_slots_do_not_mix_their_bytes() {
        let disk = staged();
        thread::scope(|scope| {
            for caller in 0..2 * BLOCK / SLOT {
                let disk = &disk;
                scope.spawn(move || {
                    let (mut found, at) = (vec![0; 3 * SLOT / 2], (caller * 2 * SLOT) as u64);
                    for round in 0..20 {
                        let bytes = pattern(caller + 31 * round, found.len());
                        write_all(disk, &bytes, at).unwrap();
                        read_all(disk, &mut found, at).unwrap();
                        assert!(found == bytes, "caller {caller}, round {round}");
                    }
                });
            }
        });
    }

    #[test]
    fn the_end_of_the_file_is_a_short_count() {
        let disk = staged();
        write_all(&disk, &[7; 100], 0).unwrap();
        let mut bytes = [0; 200];
        assert_eq!(disk.read_at(&mut bytes, 0).unwrap(), 100);
        assert!(bytes[..100] == [7; 100] && bytes[100..] == [0; 100]);
    }
}
