//! The device's memory on a pager: device → host → file.
//!
//! [`Vmm`] is a driver as the pager knows devices. A kernel's pages are held from when its addresses are asked for
//! until its launch returns; it may run later, on pages that nobody holds any more. So a driver lets no frame go
//! before what was launched has run, and copies pages out in the order of launches; whatever comes back comes to new
//! frames, which nothing launched knows of.

use crate::{Driver, Error, NAME};
use rankfold_pager::{self as pager, Device, OnHost, Pager};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pager of a device's memory, over one of the host's.
pub type DevicePager = Pager<OnHost<Vmm>>;

/// A driver as the pager knows devices: addresses, and frames behind them.
#[derive(Debug)]
pub struct Vmm(Arc<dyn Driver>);

/// Addresses of a driver, given back when they are dropped.
#[derive(Debug)]
pub struct Reservation {
    driver: Arc<dyn Driver>,
    start: u64,
    frame: usize,
    /// Which frames have memory.
    mapped: Mutex<Vec<bool>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a driver says, as the pager says it.
pub(crate) fn failed(error: Error) -> pager::Error {
    pager::Error::Device { device: NAME, what: error.to_string() }
}

impl Vmm {
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> Self {
        Self(Arc::clone(driver))
    }
}

impl Reservation {
    /// The address of a byte. It may be used under a hold alone.
    pub(crate) fn at(&self, byte: usize) -> u64 {
        self.start + byte as u64
    }

    /// Whose addresses they are.
    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Let the memory of frames go that have some.
    fn unmap(&self, frames: Range<usize>) {
        let mut mapped = lock(&self.mapped);
        let mut at = frames.start;
        for run in mapped[frames].chunk_by_mut(|a, b| a == b) {
            if run[0] {
                self.driver.unmap(self.at(at * self.frame), run.len() * self.frame);
                run.fill(false);
            }
            at += run.len();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let frames = lock(&self.mapped).len();
        self.unmap(0..frames);
        self.driver.unreserve(self.start, frames * self.frame);
    }
}

impl Device for Vmm {
    type Region = Reservation;

    fn reserve(&self, bytes: usize) -> pager::Result<Reservation> {
        let frame = self.0.frame().map_err(failed)?;
        let frames = bytes.div_ceil(frame);
        let start = self.0.reserve(frames * frame).map_err(failed)?;
        Ok(Reservation { driver: self.0.clone(), start, frame, mapped: Mutex::new(vec![false; frames]) })
    }

    fn map(&self, region: &Reservation, range: Range<usize>) -> pager::Result<()> {
        let mut mapped = lock(&region.mapped);
        self.0.map(region.at(range.start), range.len()).map_err(failed)?;
        mapped[range.start / region.frame..range.end / region.frame].fill(true);
        Ok(())
    }

    fn unmap(&self, region: &Reservation, range: Range<usize>) {
        region.unmap(range.start / region.frame..range.end / region.frame);
    }

    fn read(&self, region: &Reservation, at: usize, into: &mut [u8]) -> pager::Result<()> {
        self.0.page_out(region.at(at), into).map_err(failed)
    }

    fn write(&self, region: &Reservation, at: usize, from: &[u8]) -> pager::Result<()> {
        self.0.page_in(from, region.at(at)).map_err(failed)
    }
}
