//! A disk that fails: nothing is lost that memory still has, and what is lost is an error.

use super::{PAGE, byte, over};
use crate::file::faulty::{Call, Faulty};
use crate::{Access, Allocation, Error, Hold};

fn write(allocation: &mut Allocation, seed: u64) -> Result<(), Error> {
    let mut pin = allocation.pin_mut(0..PAGE)?;
    pin.iter_mut().enumerate().for_each(|(at, to)| *to = byte(seed, at));
    Ok(())
}

fn holds(allocation: &Allocation, seed: u64) -> Result<bool, Error> {
    Ok(allocation.pin(0..PAGE)?.iter().enumerate().all(|(at, found)| *found == byte(seed, at)))
}

#[test]
fn a_store_that_fails_loses_nothing() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let disk = Faulty::default();
        let pager = over(&disk, 2, 0);
        let mut all: Vec<_> = (0..3).map(|_| pager.alloc(PAGE).unwrap()).collect();
        write(&mut all[0], 0).unwrap();
        write(&mut all[1], 1).unwrap();
        disk.fail(Call::Write, 0, usize::MAX, errno);
        let error = write(&mut all[2], 2).unwrap_err();
        assert!(matches!(&error, Error::Stuck { source, .. } if matches!(**source, Error::File { .. })), "{error}");
        assert!(holds(&all[0], 0).unwrap() && holds(&all[1], 1).unwrap());
        disk.mend();
        write(&mut all[2], 2).unwrap();
        assert!((0..3).all(|i| holds(&all[i], i as u64).unwrap()));
    }
}

#[test]
fn a_load_that_fails_can_be_tried_again() {
    let disk = Faulty::default();
    let pager = over(&disk, 1, 0);
    let mut all: Vec<_> = (0..2).map(|_| pager.alloc(PAGE).unwrap()).collect();
    write(&mut all[0], 0).unwrap();
    write(&mut all[1], 1).unwrap();
    disk.fail(Call::Read, 0, 1, libc::EIO);
    assert!(matches!(holds(&all[0], 0), Err(Error::File { .. })));
    assert!(holds(&all[0], 0).unwrap() && holds(&all[1], 1).unwrap());
}

#[test]
fn a_flipped_bit_is_named_by_its_page_and_every_other_page_is_whole() {
    let disk = Faulty::default();
    let pager = over(&disk, 8, 0);
    let mut all: Vec<_> = (0..6).map(|_| pager.alloc(PAGE).unwrap()).collect();
    all.iter_mut().enumerate().for_each(|(i, allocation)| write(allocation, i as u64).unwrap());
    pager.vacate().unwrap();
    // Places in the file are taken in order.
    disk.flip(3 * PAGE as u64 + 77, 5);
    for (i, allocation) in all.iter().enumerate() {
        match holds(allocation, i as u64) {
            Err(Error::Damaged { position, .. }) => assert_eq!((i, position), (3, 3 * PAGE as u64)),
            whole => assert!(whole.unwrap() && i != 3),
        }
    }
    // Written anew as a whole, it is well again.
    all[3].discard(0..PAGE);
    write(&mut all[3], 9).unwrap();
    pager.vacate().unwrap();
    assert!(holds(&all[3], 9).unwrap());
}

/// A walk round and round over 24 pages in a memory of 16, which the worker knows when the disk breaks.
#[test]
fn a_disk_that_always_fails_is_asked_a_few_times_a_hold_and_harms_nothing() {
    let disk = Faulty::default();
    let pager = over(&disk, 16, 2);
    // Every other page, so that each touch counts as a step of what repeats.
    let mut all: Vec<_> = (0..24).map(|_| [pager.alloc(PAGE).unwrap(), pager.alloc(PAGE).unwrap()]).collect();
    for round in 0..4 {
        all.iter_mut().enumerate().for_each(|(i, [page, _])| write(page, round * 24 + i as u64).unwrap());
    }
    for call in [Call::Read, Call::Write] {
        disk.fail(call, 0, usize::MAX, libc::EIO);
    }
    let before = disk.moves();
    let there: Vec<Result<Hold, _>> = all.iter().map(|[page, _]| page.hold(0..PAGE, Access::Read)).collect();
    assert!(there.iter().flatten().count() >= 8 && there.iter().any(Result::is_err));
    drop(there);
    // The pages that are there serve on.
    for (i, [page, _]) in (0..20).flat_map(|_| all.iter().enumerate()) {
        assert!(holds(page, 72 + i as u64).unwrap_or(true));
        page.prefetch(0..PAGE);
    }
    // A hold that must load asks once to make room, once to load; so does a worker that the hold or the prefetch wakes.
    let asked = disk.moves() - before;
    assert!(asked <= 6 * 21 * 24, "{asked} calls");
    disk.mend();
    assert!(all.iter().enumerate().all(|(i, [page, _])| holds(page, 72 + i as u64).unwrap()));
}
