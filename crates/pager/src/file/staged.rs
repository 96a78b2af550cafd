//! Parts of blocks on their way between small frames and the disk.
//!
//! Direct I/O hands the disk a list of frames. One huge frame is one entry; 256 KiB in frames of 4 KiB are 64, each
//! handled by the driver, and on a virtual machine by its host: beside two busy threads on an AMD EPYC Zen 3 that is
//! 0.4 GB/s where huge frames give 1.7, for bytes that are copied at 10. So what is no whole block is copied through a
//! block that has a huge frame.

use super::disk::Disk;
use crate::Result;
use crate::space::{BLOCK, Space};
use std::io;
use std::sync::{Mutex, PoisonError};

/// Bytes that one caller copies at a time.
const SLOT: usize = BLOCK / 4;

/// Bytes of memory that a pager takes for it, where pages bypass the system's cache.
pub const STAGE: usize = BLOCK;

/// A disk to which whole blocks of memory go as they are, and parts of them through a block of its own.
#[derive(Debug)]
pub(crate) struct Staged<D> {
    disk: D,
    stage: Space,
    /// Slots that nobody uses, by where they begin.
    free: Mutex<Vec<usize>>,
}

/// A slot in use.
struct Slot<'a> {
    stage: &'a Space,
    free: &'a Mutex<Vec<usize>>,
    start: usize,
}

impl Slot<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: within the stage, which has been opened; whoever has the slot has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.stage.start().add(self.start), SLOT) }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.start);
    }
}

impl<D> Staged<D> {
    /// Errors: no addresses for the block. It takes memory when it is first used.
    pub(crate) fn new(disk: D) -> Result<Self> {
        let stage = Space::reserve(STAGE)?;
        // SAFETY: it is new.
        unsafe { stage.open(0..STAGE) }?;
        Ok(Self { disk, stage, free: Mutex::new((0..STAGE).step_by(SLOT).collect()) })
    }

    fn slot(&self) -> Option<Slot<'_>> {
        let start = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Slot { stage: &self.stage, free: &self.free, start })
    }

    /// How many of the first bytes go in one call, and through what if they are no whole blocks (nothing where others
    /// use all of the stage).
    fn part(&self, bytes: &[u8]) -> (usize, Option<Slot<'_>>) {
        let within = bytes.as_ptr().addr() % BLOCK;
        if within == 0 && bytes.len() >= BLOCK {
            return (bytes.len() / BLOCK * BLOCK, None);
        }
        (bytes.len().min(BLOCK - within).min(SLOT), self.slot())
    }
}

impl<D: Disk> Disk for Staged<D> {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let (count, slot) = self.part(bytes);
        let bytes = &mut bytes[..count];
        let Some(mut slot) = slot else { return self.disk.read_at(bytes, at) };
        let staged = &mut slot.bytes()[..count];
        let read = self.disk.read_at(staged, at)?;
        bytes[..read].copy_from_slice(&staged[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let (count, slot) = self.part(bytes);
        let bytes = &bytes[..count];
        let Some(mut slot) = slot else { return self.disk.write_at(bytes, at) };
        let staged = &mut slot.bytes()[..count];
        staged.copy_from_slice(bytes);
        self.disk.write_at(staged, at)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.disk.punch(at, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }

    fn free(&self) -> Option<u64> {
        self.disk.free()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::file::disk::{self, read_all, write_all};
    use crate::file::faulty::{Call, Faulty};
    use proptest::prelude::*;
    use std::thread;

    /// Bytes that tell where they are.
    fn pattern(seed: usize, len: usize) -> Vec<u8> {
        (seed..seed + len).map(|i| (i % 251) as u8).collect()
    }

    fn staged() -> (Faulty, Staged<Faulty>) {
        let disk = Faulty::default();
        (disk.clone(), Staged::new(disk).unwrap())
    }

    /// A range of memory that lies in blocks as it does in the space.
    #[allow(clippy::mut_from_ref)] // the memory is the space's, not borrowed from it
    fn memory(space: &Space, start: usize, len: usize) -> &mut [u8] {
        // SAFETY: within a space that is one test's alone.
        unsafe { std::slice::from_raw_parts_mut(space.start().add(start), len) }
    }

    fn space(bytes: usize) -> Space {
        let space = Space::reserve(bytes).unwrap();
        // SAFETY: it is new.
        unsafe { space.open(0..bytes) }.unwrap();
        space
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        #[test]
        fn what_is_written_is_on_the_disk_and_comes_back_whatever_the_counts(
            start in 0..2 * BLOCK, len in 1..2 * BLOCK, at in 0u64..1 << 20, seed in prop::option::of(any::<u32>()),
        ) {
            let ((disk, staged), space) = (staged(), space(4 * BLOCK));
            if let Some(seed) = seed {
                disk.move_short_counts(seed);
            }
            let bytes = memory(&space, start, len);
            bytes.copy_from_slice(&pattern(start, len));
            write_all(&staged, bytes, at).unwrap();
            let mut found = vec![0; len];
            read_all(&disk, &mut found, at).unwrap();
            prop_assert!(found == pattern(start, len));
            bytes.fill(0);
            read_all(&staged, bytes, at).unwrap();
            prop_assert!(bytes == found);
            prop_assert_eq!(staged.free.lock().unwrap().len(), STAGE / SLOT);
        }
    }

    /// The system refuses direct I/O at an odd address.
    #[test]
    fn parts_of_blocks_go_through_the_stage_and_blocks_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let Ok(file) = disk::open(folder.path(), true) else {
            eprintln!("skipped: no direct I/O in {}", folder.path().display());
            return;
        };
        let (staged, space) = (Staged::new(file).unwrap(), space(2 * BLOCK));
        let odd = memory(&space, 1, 3 * SLOT);
        odd.copy_from_slice(&pattern(5, 3 * SLOT));
        write_all(&staged, odd, 0).unwrap();
        odd.fill(0);
        read_all(&staged, odd, 0).unwrap();
        assert!(*odd == pattern(5, 3 * SLOT));
        // Whatever the stage has, a block passes by.
        let slots: Vec<_> = std::iter::from_fn(|| staged.slot()).collect();
        let block = memory(&space, 0, BLOCK);
        assert_eq!(staged.write_at(block, 0).unwrap(), BLOCK);
        assert_eq!(staged.read_at(block, 0).unwrap(), BLOCK);
        assert_eq!(slots.len(), STAGE / SLOT);
    }

    #[test]
    fn where_others_use_all_of_the_stage_bytes_go_as_they_are() {
        let (disk, staged) = staged();
        let slots: Vec<_> = std::iter::from_fn(|| staged.slot()).collect();
        let bytes = pattern(7, 1000);
        write_all(&staged, &bytes, 3).unwrap();
        let mut found = [vec![0; 1000], vec![0; 1000]];
        read_all(&staged, &mut found[0], 3).unwrap();
        read_all(&disk, &mut found[1], 3).unwrap();
        assert!(found.iter().all(|found| *found == bytes) && slots.len() == STAGE / SLOT);
    }

    #[test]
    fn more_callers_than_there_are_slots_do_not_mix_their_bytes() {
        let (_, disk) = staged();
        thread::scope(|scope| {
            for caller in 0..2 * STAGE / SLOT {
                let disk = &disk;
                scope.spawn(move || {
                    let (mut found, at) = (vec![0; 2 * SLOT + 100], (caller * 3 * SLOT) as u64);
                    for round in 0..3 {
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
    fn a_disk_that_fails_is_told_of_and_gives_its_slot_back() {
        let (disk, staged) = staged();
        for call in [Call::Read, Call::Write] {
            disk.fail(call, 0, 1, libc::EIO);
        }
        let mut bytes = [3; 200];
        assert_eq!(staged.write_at(&bytes, 0).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(staged.read_at(&mut bytes, 0).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(bytes == [3; 200] && staged.free.lock().unwrap().len() == STAGE / SLOT);
    }

    #[test]
    fn what_a_short_read_did_not_bring_is_left_as_it_was() {
        let staged = Staged::new(tempfile::tempfile().unwrap()).unwrap();
        write_all(&staged, &[7; 200], 0).unwrap();
        let mut bytes = [3; 300];
        assert_eq!(staged.read_at(&mut bytes, 100).unwrap(), 100);
        assert!(bytes[..100] == [7; 100] && bytes[100..] == [3; 200]);
    }
}
