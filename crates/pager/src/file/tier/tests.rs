use super::*;
use crate::file::faulty::{Call, Faulty};
use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::thread;

/// Small, so that a case is quick; the tier does not care.
const PAGE: usize = 256;

fn tier(disk: &Faulty, pages: u64) -> FileTier {
    FileTier::on(Box::new(disk.clone()), "folder".into(), PAGE, pages * PAGE as u64)
}

/// Bytes that differ by seed and by page.
fn bytes(seed: u32, len: usize) -> Vec<u8> {
    let words = (0..len.div_ceil(4) as u32).map(|i| crc32fast::hash(&[seed.to_le_bytes(), i.to_le_bytes()].concat()));
    words.flat_map(u32::to_le_bytes).take(len).collect()
}

fn load(tier: &FileTier, extent: &Extent, pages: Range<usize>) -> Result<Vec<u8>> {
    let mut back = vec![0; pages.len() * tier.page];
    tier.load(extent, pages.start, &mut back).map(|()| back)
}

#[derive(Clone, Debug)]
enum Op {
    Reserve(usize),
    Free(Index),
    Store(Index, [Index; 2], u32),
    Load(Index, [Index; 2]),
    Forget(Index, [Index; 2]),
    Discard(Index, [Index; 2]),
    Flip(Index, Index, Index, u32),
    Fail(Call, usize, i32),
    Mend,
}

fn op() -> impl Strategy<Value = Op> {
    let call = prop::sample::select(vec![Call::Read, Call::Write, Call::Punch]);
    let error = prop::sample::select(vec![libc::EIO, libc::ENOSPC]);
    prop_oneof![
        2 => (1usize..9).prop_map(Op::Reserve),
        1 => any::<Index>().prop_map(Op::Free),
        6 => any::<(Index, [Index; 2], u32)>().prop_map(|(place, pages, seed)| Op::Store(place, pages, seed)),
        6 => any::<(Index, [Index; 2])>().prop_map(|(place, pages)| Op::Load(place, pages)),
        2 => any::<(Index, [Index; 2])>().prop_map(|(place, pages)| Op::Forget(place, pages)),
        2 => any::<(Index, [Index; 2])>().prop_map(|(place, pages)| Op::Discard(place, pages)),
        1 => (any::<[Index; 3]>(), 0u32..8).prop_map(|([place, page, at], bit)| Op::Flip(place, page, at, bit)),
        2 => (call, 0usize..6, error).prop_map(|(call, after, error)| Op::Fail(call, after, error)),
        1 => Just(Op::Mend),
    ]
}

/// What is stored of a page: its bytes, and the bits of them that are flipped on the disk.
type Stored = Option<(Vec<u8>, BTreeSet<(usize, u32)>)>;

/// A place and its pages.
struct Place {
    extent: Extent,
    pages: Vec<Stored>,
}

impl Place {
    fn range(&self, [a, b]: [Index; 2]) -> Range<usize> {
        let (a, b) = (a.index(self.pages.len()), b.index(self.pages.len()));
        a.min(b)..a.max(b) + 1
    }

    fn position(&self, page: usize) -> u64 {
        (self.extent.first + page as u64) * PAGE as u64
    }

    fn stored(&self) -> usize {
        self.pages.iter().flatten().count()
    }
}

/// The tier beside a model of it.
struct Machine {
    disk: Faulty,
    tier: FileTier,
    places: Vec<Place>,
    faults: Vec<Call>,
    is_leaking: bool,
}

impl Machine {
    const CAPACITY: usize = 24;

    fn stored(&self) -> usize {
        self.places.iter().map(Place::stored).sum()
    }

    fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
        let which = |index: &Index, places: &[Place]| (!places.is_empty()).then(|| index.index(places.len()));
        match op {
            Op::Reserve(pages) => {
                let extent = self.tier.reserve(pages);
                self.places.push(Place { extent, pages: vec![None; pages] });
            }
            Op::Free(index) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                self.tier.free(self.places.swap_remove(which).extent);
            }
            Op::Store(index, pages, seed) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                self.store(which, pages, seed)?;
            }
            Op::Load(index, pages) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                self.load(which, self.places[which].range(pages))?;
            }
            Op::Forget(index, pages) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                let place = &mut self.places[which];
                let pages = place.range(pages);
                self.tier.forget(&place.extent, pages.clone());
                place.pages[pages].fill(None);
            }
            Op::Discard(index, pages) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                let place = &mut self.places[which];
                let pages = place.range(pages);
                self.tier.discard(&place.extent, pages.clone());
                place.pages[pages].fill(None);
            }
            Op::Flip(index, page, at, bit) => {
                let Some(which) = which(&index, &self.places) else { return Ok(()) };
                let place = &mut self.places[which];
                let (page, at) = (page.index(place.pages.len()), at.index(PAGE));
                let position = place.position(page);
                // Of three flips and more the checksum finds almost all, of two all.
                if let Some((_, flipped)) = &mut place.pages[page]
                    && (flipped.len() < 2 || flipped.contains(&(at, bit)))
                {
                    self.disk.flip(position + at as u64, bit);
                    if !flipped.remove(&(at, bit)) {
                        flipped.insert((at, bit));
                    }
                }
            }
            Op::Fail(call, after, error) => {
                self.disk.fail(call, after, 1, error);
                self.faults.push(call);
                self.is_leaking |= call == Call::Punch;
            }
            Op::Mend => {
                self.disk.mend();
                self.faults.clear();
            }
        }
        let figures = self.tier.figures();
        // What was discarded may take space, but never such as something else needs.
        let (least, most) = (self.stored() * PAGE, Self::CAPACITY * PAGE);
        prop_assert!((least..=most).contains(&(figures.stored as usize)) && figures.high_water >= figures.stored);
        // The disk holds what the books say, unless it failed to give something back.
        prop_assert!(self.disk.held() as u64 == figures.stored || self.is_leaking);
        Ok(())
    }

    fn store(&mut self, which: usize, pages: [Index; 2], seed: u32) -> Result<(), TestCaseError> {
        let pages = self.places[which].range(pages);
        let free = Self::CAPACITY - self.stored();
        let place = &mut self.places[which];
        let new = place.pages[pages.clone()].iter().filter(|page| page.is_none()).count();
        let bytes = bytes(seed, pages.len() * PAGE);
        match self.tier.store(&place.extent, pages.start, &bytes) {
            Ok(()) => {
                prop_assert!(new <= free);
                for (page, bytes) in place.pages[pages].iter_mut().zip(bytes.chunks(PAGE)) {
                    *page = Some((bytes.to_vec(), BTreeSet::new()));
                }
            }
            Err(Error::FileFull { asked, free: found, .. }) => {
                prop_assert!(new > free);
                prop_assert_eq!((asked, found), ((new * PAGE) as u64, (free * PAGE) as u64));
            }
            Err(Error::File { .. }) => {
                prop_assert!(new <= free && self.faults.contains(&Call::Write));
                place.pages[pages].fill(None);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
        Ok(())
    }

    fn load(&self, which: usize, pages: Range<usize>) -> Result<(), TestCaseError> {
        let place = &self.places[which];
        let wanted = &place.pages[pages.clone()];
        let first = |is: fn(&Stored) -> bool| wanted.iter().position(is).map(|page| place.position(pages.start + page));
        let missing = first(|page| page.is_none());
        let damaged = first(|page| page.as_ref().is_some_and(|(_, flipped)| !flipped.is_empty()));
        match load(&self.tier, &place.extent, pages.clone()) {
            Ok(back) => {
                prop_assert_eq!((missing, damaged), (None, None));
                let expected: Vec<u8> = wanted.iter().flatten().flat_map(|(bytes, _)| bytes.clone()).collect();
                prop_assert_eq!(back, expected);
            }
            Err(Error::NotStored { position, .. }) => prop_assert_eq!(Some(position), missing),
            Err(Error::File { .. }) => prop_assert!(missing.is_none() && self.faults.contains(&Call::Read)),
            Err(Error::Damaged { position, .. }) => prop_assert_eq!((Some(position), missing), (damaged, None)),
            Err(other) => prop_assert!(false, "{other}"),
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn what_was_stored_comes_back_or_is_an_error_whatever_fails(
        ops in prop::collection::vec(op(), 1..100),
        short in prop::option::of(any::<u32>()),
    ) {
        let disk = Faulty::default();
        if let Some(seed) = short {
            disk.move_short_counts(seed);
        }
        let tier = tier(&disk, Machine::CAPACITY as u64);
        let mut machine = Machine { disk, tier, places: vec![], faults: vec![], is_leaking: false };
        for op in ops {
            machine.step(op)?;
        }
        // Nothing that a fault did not touch is lost: without faults, all of it loads.
        machine.step(Op::Mend)?;
        for which in 0..machine.places.len() {
            for page in 0..machine.places[which].pages.len() {
                machine.load(which, page..page + 1)?;
            }
        }
        for place in machine.places.drain(..) {
            machine.tier.free(place.extent);
        }
        let figures = machine.tier.figures();
        prop_assert_eq!((figures.stored, figures.end), (0, 0));
        prop_assert!(machine.disk.held() == 0 || machine.is_leaking);
    }
}

#[test]
fn every_flipped_bit_of_a_page_is_found() {
    let disk = Faulty::default();
    let tier = tier(&disk, 3);
    let extent = tier.reserve(3);
    let pages = bytes(1, 3 * PAGE);
    tier.store(&extent, 0, &pages).unwrap();
    for at in PAGE..2 * PAGE {
        for bit in 0..8 {
            disk.flip(at as u64, bit);
            let error = load(&tier, &extent, 0..3).unwrap_err();
            assert!(matches!(error, Error::Damaged { position, .. } if position == PAGE as u64), "{error}");
            assert_eq!(load(&tier, &extent, 2..3).unwrap(), pages[2 * PAGE..]);
            disk.flip(at as u64, bit);
        }
    }
    assert_eq!(load(&tier, &extent, 0..3).unwrap(), pages);
}

#[test]
fn a_failed_store_loses_its_own_pages_alone() {
    for error in [libc::EIO, libc::ENOSPC] {
        let disk = Faulty::default();
        let tier = tier(&disk, 4);
        let extent = tier.reserve(4);
        let pages = bytes(2, 4 * PAGE);
        tier.store(&extent, 0, &pages).unwrap();
        disk.fail(Call::Write, 0, 1, error);
        let failed = tier.store(&extent, 1, &bytes(3, 2 * PAGE)).unwrap_err();
        assert!(matches!(&failed, Error::File { source, .. } if source.raw_os_error() == Some(error)), "{failed}");
        assert_eq!(load(&tier, &extent, 0..1).unwrap(), pages[..PAGE]);
        assert_eq!(load(&tier, &extent, 3..4).unwrap(), pages[3 * PAGE..]);
        for lost in 1..3 {
            assert!(matches!(load(&tier, &extent, lost..lost + 1), Err(Error::NotStored { .. })));
        }
        tier.store(&extent, 1, &pages[PAGE..3 * PAGE]).unwrap();
        assert_eq!(load(&tier, &extent, 0..4).unwrap(), pages);
    }
}

#[test]
fn a_full_disk_gets_back_what_a_failed_store_took() {
    let disk = Faulty::default();
    disk.limit(3 * PAGE);
    let tier = tier(&disk, 100);
    let extent = tier.reserve(4);
    let error = tier.store(&extent, 0, &bytes(4, 4 * PAGE)).unwrap_err();
    let message = "folder: the disk is full: 1024 bytes of pages were to be written to a file in it, 768 are free";
    assert_eq!(error.to_string(), message);
    assert_eq!((disk.held(), tier.figures().stored), (0, 0));
    tier.store(&extent, 1, &bytes(4, 3 * PAGE)).unwrap();
    assert_eq!(load(&tier, &extent, 1..4).unwrap(), bytes(4, 3 * PAGE));
}

#[test]
fn the_capacity_counts_a_page_once_and_a_refusal_touches_nothing() {
    let disk = Faulty::default();
    let tier = FileTier::on(Box::new(disk.clone()), "folder".into(), PAGE, 3 * PAGE as u64 + 1);
    let (a, b) = (tier.reserve(3), tier.reserve(2));
    for seed in 0..3 {
        tier.store(&a, 0, &bytes(seed, 2 * PAGE)).unwrap();
    }
    tier.store(&b, 0, &bytes(3, PAGE)).unwrap();
    let error = tier.store(&b, 0, &bytes(4, 2 * PAGE)).unwrap_err().to_string();
    assert_eq!(error, "folder: the file tier is full: 256 bytes were asked for, 1 of 769 are free");
    assert_eq!(load(&tier, &a, 0..2).unwrap(), bytes(2, 2 * PAGE));
    assert_eq!(load(&tier, &b, 0..1).unwrap(), bytes(3, PAGE));
    tier.forget(&a, 0..3);
    tier.store(&b, 0, &bytes(4, 2 * PAGE)).unwrap();
    let [stored, high_water, written, read] = [2, 3, 9, 3].map(|pages| pages * PAGE as u64);
    let figures = FileFigures { stored, high_water, written, read, end: 5 * PAGE as u64, fragmentation: 0.0 };
    assert_eq!(tier.figures(), figures);
    tier.free(a);
    assert_eq!(tier.figures().fragmentation, 0.0);
}

/// The limit falls below what the disk holds, as where others fill it.
#[test]
fn a_disk_that_holds_more_than_it_may_has_nothing_free() {
    let disk = Faulty::default();
    let tier = tier(&disk, 100);
    let extent = tier.reserve(4);
    tier.store(&extent, 0, &bytes(4, 2 * PAGE)).unwrap();
    disk.limit(PAGE);
    let error = tier.store(&extent, 2, &bytes(4, 2 * PAGE)).unwrap_err();
    assert!(matches!(error, Error::DiskFull { free: 0, .. }), "{error}");
}

#[test]
fn a_quota_that_is_used_up_gets_back_what_was_discarded() {
    let disk = Faulty::default();
    let tier = tier(&disk, 100);
    let [a, b] = [0, 1].map(|_| tier.reserve(2));
    tier.store(&a, 0, &bytes(4, 2 * PAGE)).unwrap();
    tier.discard(&a, 0..2);
    disk.fail(Call::Write, 0, 1, libc::EDQUOT);
    tier.store(&b, 0, &bytes(5, 2 * PAGE)).unwrap();
    assert_eq!((disk.held(), load(&tier, &b, 0..2).unwrap()), (2 * PAGE, bytes(5, 2 * PAGE)));
    // Nothing is left to give back, and the disk itself may have room.
    disk.fail(Call::Write, 0, 1, libc::EDQUOT);
    let error = tier.store(&b, 0, &bytes(6, 2 * PAGE)).unwrap_err();
    assert!(matches!(&error, Error::File { source, .. } if source.raw_os_error() == Some(libc::EDQUOT)), "{error}");
}

/// Round after round of buffers that come and go, as a pool of them has it: each in a place of its own, discarded.
#[test]
fn what_was_discarded_makes_room_for_what_is_stored() {
    for is_disk in [false, true] {
        let disk = Faulty::default();
        let tier = tier(&disk, if is_disk { 100 } else { 4 });
        if is_disk {
            disk.limit(4 * PAGE);
        }
        let places: Vec<_> = (0..8).map(|_| tier.reserve(2)).collect();
        for (round, place) in places.iter().enumerate() {
            tier.store(place, 0, &bytes(round as u32, 2 * PAGE)).unwrap();
            assert_eq!(load(&tier, place, 0..2).unwrap(), bytes(round as u32, 2 * PAGE));
            tier.discard(place, 0..2);
            assert!(matches!(load(&tier, place, 0..2), Err(Error::NotStored { .. })));
        }
        assert!(tier.figures().stored <= 4 * PAGE as u64 && disk.held() as u64 == tier.figures().stored);
    }
}

#[test]
fn a_place_that_was_given_back_holds_nothing_of_its_former_owner() {
    let disk = Faulty::default();
    let tier = tier(&disk, 4);
    let extent = tier.reserve(2);
    tier.store(&extent, 0, &bytes(5, 2 * PAGE)).unwrap();
    disk.fail(Call::Punch, 0, 1, libc::EIO);
    tier.free(extent);
    let extent = tier.reserve(2);
    assert_eq!(extent.first, 0);
    assert!(matches!(load(&tier, &extent, 0..2), Err(Error::NotStored { position: 0, .. })));
}

/// A disk that does nothing and calls that success.
#[derive(Debug)]
struct Idle;

impl Disk for Idle {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> Option<u64> {
        None
    }
}

#[test]
fn a_disk_that_moves_nothing_is_an_error() {
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(disk::write_all(&Idle, &[1], 0)), io::ErrorKind::WriteZero);
    assert_eq!(kind(disk::read_all(&Idle, &mut [1], 0)), io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_real_disk_says_what_is_free() {
    let folder = tempfile::tempdir().unwrap();
    let free = disk::open(folder.path(), false).unwrap().free().unwrap();
    assert!(free > 0 && free < 1 << 60, "{free}");
}

#[test]
fn a_disk_that_fails_is_found_before_any_work() {
    for call in [Call::Write, Call::Sync, Call::Read, Call::Punch] {
        let disk = Faulty::default();
        disk.fail(call, 0, 1, libc::ENOSPC);
        let error = tier(&disk, 1).try_out().unwrap_err();
        assert!(matches!(&error, Error::File { source, .. } if source.kind() == io::ErrorKind::StorageFull), "{error}");
        let tier = tier(&disk, 1);
        tier.try_out().unwrap();
        assert_eq!((disk.held(), tier.figures()), (0, FileFigures::default()));
    }
}

#[test]
fn a_folder_or_a_capacity_that_will_not_do_is_an_error_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = FileOptions { folder: folder.path().into(), direct: false, capacity: 65535 };
    let error = FileTier::open(&options, 65536).unwrap_err();
    assert!(matches!(error, Error::Capacity { found: 65535, page: 65536 }));
    options.capacity = 65536;
    FileTier::open(&options, 65536).unwrap();
    options.folder.push("missing");
    let error = FileTier::open(&options, 65536).unwrap_err();
    assert!(matches!(error, Error::File { path, .. } if path == options.folder));
}

const REAL_PAGE: usize = 64 << 10;

/// A tier on a real file, and the file; none where the file system has no direct I/O and that is asked.
fn real(direct: bool) -> Option<(FileTier, File)> {
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions { folder: folder.path().into(), direct, capacity: u64::MAX };
    match FileTier::open(&options, REAL_PAGE) {
        Err(Error::File { action: "use direct I/O in it", .. }) if direct => return None,
        opened => drop(opened.unwrap()),
    }
    let file = disk::open(folder.path(), direct).unwrap();
    let tier = FileTier::on(Box::new(file.try_clone().unwrap()), folder.path().into(), REAL_PAGE, u64::MAX);
    Some((tier, file))
}

#[test]
fn a_real_file_takes_space_for_what_is_stored_alone() {
    for (tier, file) in [false, true].into_iter().filter_map(real) {
        let space = || {
            file.sync_all().unwrap();
            file.metadata().unwrap().blocks() * 512 / REAL_PAGE as u64
        };
        let far = tier.reserve(1 << 20);
        let near = tier.reserve(16);
        let (mut memory, range) = aligned(16 * REAL_PAGE);
        memory[range.clone()].copy_from_slice(&bytes(6, 16 * REAL_PAGE));
        tier.store(&near, 0, &memory[range.clone()]).unwrap();
        assert_eq!(space(), 16);
        tier.forget(&near, 3..9);
        assert_eq!(space(), 10);
        memory[range.clone()].fill(0);
        tier.load(&near, 9, &mut memory[range.clone()][..7 * REAL_PAGE]).unwrap();
        assert_eq!(memory[range.clone()][..7 * REAL_PAGE], bytes(6, 16 * REAL_PAGE)[9 * REAL_PAGE..]);
        assert!(matches!(tier.load(&near, 2, &mut memory[range][..REAL_PAGE * 2]), Err(Error::NotStored { .. })));
        tier.free(near);
        assert_eq!(space(), 0);
        tier.free(far);
    }
}

#[test]
fn threads_store_and_load_at_once_without_a_trace_of_each_other() {
    for (tier, file) in [false, true].into_iter().filter_map(real) {
        thread::scope(|scope| {
            for thread in 0..4u32 {
                let tier = &tier;
                scope.spawn(move || {
                    for round in 0..12u32 {
                        let pages = 1 + (thread + round) as usize % 5;
                        let extent = tier.reserve(pages);
                        let (mut memory, range) = aligned(pages * REAL_PAGE);
                        let memory = &mut memory[range];
                        memory.copy_from_slice(&bytes(thread << 16 | round, pages * REAL_PAGE));
                        tier.store(&extent, 0, memory).unwrap();
                        memory.fill(0);
                        tier.load(&extent, 0, memory).unwrap();
                        assert_eq!(memory, bytes(thread << 16 | round, pages * REAL_PAGE));
                        tier.free(extent);
                    }
                });
            }
        });
        let figures = tier.figures();
        assert_eq!((figures.stored, figures.end, figures.written), (0, 0, figures.read));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }
}
