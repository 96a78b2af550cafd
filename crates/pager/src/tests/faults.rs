//! A disk that fails: nothing is lost that memory still has, and what is lost is an error.

use super::{PAGE, byte};
use crate::file::FileTier;
use crate::file::faulty::{Call, Faulty};
use crate::{Allocation, Error, Host, Limit, Pager};

/// A pager of so many pages in memory, over a disk that will fail.
fn over(disk: &Faulty, pages: usize) -> Pager {
    let tier = FileTier::on(Box::new(disk.clone()), "a disk that fails".into(), PAGE, u64::MAX);
    Pager::over(Host::on(tier, PAGE), PAGE, Limit::Pages(pages * PAGE), 0).unwrap()
}

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
        let pager = over(&disk, 2);
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
    let pager = over(&disk, 1);
    let mut all: Vec<_> = (0..2).map(|_| pager.alloc(PAGE).unwrap()).collect();
    write(&mut all[0], 0).unwrap();
    write(&mut all[1], 1).unwrap();
    disk.fail(Call::Read, 0, 1, libc::EIO);
    assert!(matches!(holds(&all[0], 0), Err(Error::File { .. })));
    assert!(holds(&all[0], 0).unwrap() && holds(&all[1], 1).unwrap());
}
