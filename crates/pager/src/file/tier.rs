//! Pages stored in the file, and what is left when that fails.
//!
//! Memory keeps a checksum of each stored page: CRC-32, which finds every flip of one or two bits in a page and every
//! burst of up to 32 bits. A page that comes back with another is an error, never data. One core of an AMD EPYC Zen 4
//! sums 24 GB/s of pages from memory, 58 GB/s from its cache. What a failure leaves:
//!
//! | failed | then |
//! |---|---|
//! | `store`, the file is full to its capacity | nothing was touched: pages stored before can still be loaded |
//! | `store`, the disk | the pages may be torn, so none of the run is stored any more; the caller has them all |
//! | `load`, the disk or a checksum | what is stored is what it was: it may be tried again |
//! | giving back space | the disk keeps it until the pages are stored again, or the process ends |
//!
//! The file takes space where pages are stored, and where pages were that their owner discarded: those are mostly
//! written again soon, and punching holes for buffers that come and go with every step would take longer than writing
//! over what lies there. Their space is taken back when there is no other. A place in the file that is given back may
//! be reserved again: what an earlier owner stored there is not to be had.

use super::disk::{self, Disk};
use super::staged::Staged;
use crate::extents::{Extent, Extents};
use crate::{Error, Result};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where pages go that do not fit in memory, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// The folder of the file, which has no name in it: nothing is left there, however the process ends. Its disk
    /// should be a fast one, and not memory itself (`/tmp` and `/dev/shm` sometimes are).
    pub folder: PathBuf,
    /// Whether pages bypass the system's cache. Where the file system cannot, opening is an error.
    pub direct: bool,
    /// The most bytes of pages that the file may hold at a time; `u64::MAX` for no limit but the disk's.
    pub capacity: u64,
}

impl FileOptions {
    /// Bytes that the file could take now: the disk's free ones where the system tells, and no more than the capacity.
    pub fn free(&self) -> u64 {
        let disk = File::open(&self.folder).ok().and_then(|folder| folder.free());
        self.capacity.min(disk.unwrap_or(u64::MAX))
    }
}

/// What a file tier holds and did. All but `fragmentation` are bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FileFigures {
    /// Of the pages that take space now: stored, being stored, or discarded and not given back yet.
    pub stored: u64,
    /// The most that `stored` has been.
    pub high_water: u64,
    /// Written in all.
    pub written: u64,
    /// Read in all.
    pub read: u64,
    /// The end of the last place taken in the file: its addresses, not its space.
    pub end: u64,
    /// The part of the free addresses below `end` that is not in their largest run; 0 where none are free.
    pub fragmentation: f64,
}

/// Pages in a file. Several threads may call at once, but not two for one page.
#[derive(Debug)]
pub(crate) struct FileTier {
    disk: Box<dyn Disk>,
    /// Whom errors name: the folder of the file.
    path: PathBuf,
    page: usize,
    capacity: u64,
    /// Held while the disk works only to give back what was discarded.
    table: Mutex<Table>,
}

/// The books. Pages are counted from the start of the file.
#[derive(Debug, Default)]
struct Table {
    extents: Extents,
    /// By page; what lies beyond is empty.
    slots: Vec<Slot>,
    /// Pages that count against the capacity: those that take space.
    charged: u64,
    most_charged: u64,
    written: u64,
    read: u64,
}

/// A page of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// It takes no space.
    Empty,
    /// It takes space that nobody needs.
    Discarded,
    /// It is being written: it takes space, and nothing can be had from it.
    Writing,
    /// Stored, with its checksum.
    Stored(u32),
}

impl FileTier {
    /// Make the file, and try it: a page is written, brought to the medium, read back and given up again.
    ///
    /// Errors: a capacity under a page; a folder that is missing, read-only or full; no direct I/O, if that is asked.
    pub(crate) fn open(options: &FileOptions, page: usize) -> Result<Self> {
        if options.capacity < page as u64 {
            return Err(Error::Capacity { found: options.capacity as usize, page });
        }
        let file = disk::open(&options.folder, options.direct)?;
        let disk: Box<dyn Disk> = if options.direct { Box::new(Staged::new(file)?) } else { Box::new(file) };
        let tier = Self::on(disk, options.folder.clone(), page, options.capacity);
        tier.try_out()?;
        Ok(tier)
    }

    /// A tier on any disk, which errors call `path`.
    pub(crate) fn on(disk: Box<dyn Disk>, path: PathBuf, page: usize, capacity: u64) -> Self {
        Self { disk, path, page, capacity, table: Mutex::default() }
    }

    /// A place for `pages` pages, at least one. It takes no space until they are stored.
    pub(crate) fn reserve(&self, pages: usize) -> Extent {
        self.table().extents.reserve(pages)
    }

    /// Give a place back, with what is stored in it.
    pub(crate) fn free(&self, extent: Extent) {
        self.forget(&extent, 0..extent.pages);
        self.table().extents.free(extent);
    }

    /// Write whole pages to a place, from its page `first` on. Direct I/O wants `bytes` at a multiple of 4096.
    ///
    /// Errors: [`Error::FileFull`], and what was stored still is; [`Error::DiskFull`] or [`Error::File`], and none of
    /// these pages is.
    pub(crate) fn store(&self, extent: &Extent, first: usize, bytes: &[u8]) -> Result<()> {
        let run = self.run(extent, first..first + bytes.len() / self.page);
        self.charge(run.clone())?;
        let checksums = bytes.chunks_exact(self.page).map(|page| Slot::Stored(crc32fast::hash(page)));
        let checksums: Vec<_> = checksums.collect();
        let write = || disk::write_all(&*self.disk, bytes, self.position(run.start));
        let is_full = |e: &io::Error| e.kind() == io::ErrorKind::StorageFull;
        // A quota that is used up says nothing of the disk, but what is given back counts for it as well.
        let has_no_more = |e: &io::Error| is_full(e) || e.kind() == io::ErrorKind::QuotaExceeded;
        let written = match write() {
            Err(source) if has_no_more(&source) && self.give_back_discarded(&mut self.table()) => write(),
            written => written,
        };
        if let Err(source) = written {
            self.give_back(run);
            let (path, asked) = (self.path.clone(), bytes.len() as u64);
            return Err(match self.disk.free().filter(|_| is_full(&source)) {
                Some(free) => Error::DiskFull { path, asked, free },
                None => self.failed("write pages to a file in it")(source),
            });
        }
        let mut table = self.table();
        table.slots[run.start as usize..run.end as usize].copy_from_slice(&checksums);
        table.written += bytes.len() as u64;
        Ok(())
    }

    /// Read whole pages of a place, from its page `first` on, and check them. `bytes` as for [`FileTier::store`].
    ///
    /// Errors, which leave anything in `bytes` and what is stored as it was: [`Error::NotStored`], [`Error::File`],
    /// [`Error::Damaged`].
    pub(crate) fn load(&self, extent: &Extent, first: usize, bytes: &mut [u8]) -> Result<()> {
        let run = self.run(extent, first..first + bytes.len() / self.page);
        let expected = self.checksums(run.clone())?;
        let read = disk::read_all(&*self.disk, bytes, self.position(run.start));
        read.map_err(self.failed("read pages from a file in it"))?;
        for ((number, expected), page) in run.zip(expected).zip(bytes.chunks_exact(self.page)) {
            self.check(number, expected, page)?;
        }
        self.table().read += bytes.len() as u64;
        Ok(())
    }

    /// What is stored of these pages is no longer wanted. Their space is kept until it is needed.
    pub(crate) fn discard(&self, extent: &Extent, pages: Range<usize>) {
        let run = self.run(extent, pages);
        let mut table = self.table();
        let end = table.slots.len().min(run.end as usize);
        for slot in table.slots[..end].iter_mut().skip(run.start as usize) {
            if matches!(slot, Slot::Stored(_)) {
                *slot = Slot::Discarded;
            }
        }
    }

    /// The same, and their space is given back.
    pub(crate) fn forget(&self, extent: &Extent, pages: Range<usize>) {
        let run = self.run(extent, pages);
        let table = self.table();
        let end = (table.slots.len() as u64).min(run.end);
        let takes_space = |number: &u64| table.slots[*number as usize] != Slot::Empty;
        let bounds = (run.start..end).find(takes_space).zip((run.start..end).rfind(takes_space));
        drop(table);
        // One hole for all: what lies between takes no space, and is nobody else's.
        if let Some((first, last)) = bounds {
            self.give_back(first..last + 1);
        }
    }

    /// What it holds and did.
    pub(crate) fn figures(&self) -> FileFigures {
        let table = self.table();
        FileFigures {
            stored: self.position(table.charged),
            high_water: self.position(table.most_charged),
            written: table.written,
            read: table.read,
            end: self.position(table.extents.end()),
            fragmentation: table.extents.fragmentation(),
        }
    }

    /// Write a page where nothing is yet, and read it back.
    fn try_out(&self) -> Result<()> {
        let (mut memory, range) = aligned(self.page);
        let bytes = &mut memory[range];
        bytes.iter_mut().zip((0..=250u8).cycle()).for_each(|(byte, i)| *byte = i);
        let expected = crc32fast::hash(bytes);
        let written = disk::write_all(&*self.disk, bytes, 0).and_then(|()| self.disk.sync());
        written.map_err(self.failed("write a page to a file in it"))?;
        bytes.fill(0);
        disk::read_all(&*self.disk, bytes, 0).map_err(self.failed("read a page from a file in it"))?;
        self.check(0, expected, bytes)?;
        disk::punch(&*self.disk, 0, self.page as u64).map_err(self.failed("give back the space of a file in it"))
    }

    /// Count those pages of a run that take no space yet. None of it is stored from now on: it is about to change.
    fn charge(&self, run: Range<u64>) -> Result<()> {
        let pages = run.start as usize..run.end as usize;
        let mut table = self.table();
        if table.slots.len() < pages.end {
            table.slots.resize(pages.end, Slot::Empty);
        }
        let most = self.capacity / self.page as u64;
        let new = |table: &Table| table.slots[pages.clone()].iter().filter(|slot| **slot == Slot::Empty).count() as u64;
        if table.charged + new(&table) > most {
            self.give_back_discarded(&mut table);
        }
        let new = new(&table);
        if table.charged + new > most {
            let free = self.capacity - self.position(table.charged);
            let (path, asked) = (self.path.clone(), self.position(new));
            return Err(Error::FileFull { path, asked, free, capacity: self.capacity });
        }
        table.slots[pages].fill(Slot::Writing);
        table.charged += new;
        table.most_charged = table.most_charged.max(table.charged);
        Ok(())
    }

    /// Give back the space of all pages that were discarded: whether there were any. The books are kept meanwhile, for
    /// their owners may write them again at any time.
    fn give_back_discarded(&self, table: &mut Table) -> bool {
        let (mut first, mut given_back) = (0, 0);
        for run in table.slots.chunk_by_mut(|a, b| a == b) {
            if run[0] == Slot::Discarded {
                self.punch(first, run.len() as u64);
                run.fill(Slot::Empty);
                given_back += run.len() as u64;
            }
            first += run.len() as u64;
        }
        table.charged -= given_back;
        given_back > 0
    }

    /// Punch a run, whose pages then take no space.
    fn give_back(&self, run: Range<u64>) {
        self.punch(run.start, run.end - run.start);
        let mut table = self.table();
        let slots = &mut table.slots[run.start as usize..run.end as usize];
        let taken = slots.iter().filter(|slot| **slot != Slot::Empty).count() as u64;
        slots.fill(Slot::Empty);
        table.charged -= taken;
    }

    /// A failure has no one to be told: nothing is lost, the space alone is kept.
    fn punch(&self, first: u64, pages: u64) {
        let _ = disk::punch(&*self.disk, self.position(first), self.position(pages));
    }

    /// The checksums of pages that are all stored.
    fn checksums(&self, run: Range<u64>) -> Result<Vec<u32>> {
        let table = self.table();
        let checksum = |number: u64| match table.slots.get(number as usize) {
            Some(Slot::Stored(checksum)) => Some(*checksum),
            _ => None,
        };
        let not_stored = |number| Error::NotStored { path: self.path.clone(), position: self.position(number) };
        run.map(|number| checksum(number).ok_or_else(|| not_stored(number))).collect()
    }

    fn check(&self, number: u64, expected: u32, page: &[u8]) -> Result<()> {
        match crc32fast::hash(page) {
            found if found == expected => Ok(()),
            found => Err(Error::Damaged { path: self.path.clone(), position: self.position(number), expected, found }),
        }
    }

    /// Pages of a place, counted from the start of the file.
    fn run(&self, extent: &Extent, pages: Range<usize>) -> Range<u64> {
        assert!(pages.start <= pages.end && pages.end <= extent.pages, "pages beyond their place");
        extent.first + pages.start as u64..extent.first + pages.end as u64
    }

    /// The bytes of so many pages: also where the page of that number begins.
    fn position(&self, pages: u64) -> u64 {
        pages * self.page as u64
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::File { path: self.path.clone(), action, source }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory in which a range of `len` bytes is good for direct I/O.
fn aligned(len: usize) -> (Vec<u8>, Range<usize>) {
    const ALIGNMENT: usize = 4096;
    let memory = vec![0; len + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    (memory, start..start + len)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
