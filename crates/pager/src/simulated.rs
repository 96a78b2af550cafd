//! A device that is not there: memory of a given size, behind a link of a given bandwidth and latency.

use crate::sync::{Mutex, MutexGuard, thread};
use crate::{Device, Error, Result};
use std::ops::Range;
use std::time::Duration;

/// A device for tests and for trying out: what it would cost to page over a link that this machine does not have.
#[derive(Debug)]
pub struct Simulated {
    page: usize,
    /// Frames that are left.
    free: Mutex<usize>,
    /// Seconds a byte.
    per_byte: f64,
    latency: Duration,
}

/// The frames of an allocation, by page.
pub type Frames = Mutex<Vec<Option<Box<[u8]>>>>;

impl Simulated {
    /// A device of `capacity` bytes in frames of `page`, over a link of `bandwidth` bytes a second that takes `latency`
    /// a copy.
    pub fn new(capacity: usize, page: usize, bandwidth: f64, latency: Duration) -> Self {
        Self { page, free: Mutex::new(capacity / page), per_byte: 1.0 / bandwidth, latency }
    }

    /// What a kernel on the device would do: run on the bytes of a range of whole pages, all of which have frames.
    ///
    /// # Panics
    /// Where a page has none: the device's fault on a stray access.
    pub fn run(&self, region: &Frames, range: Range<usize>, mut kernel: impl FnMut(usize, &mut [u8])) {
        let mut frames = lock(region);
        for page in self.pages(&range) {
            let frame = frames[page].as_mut().unwrap_or_else(|| panic!("page {page} has no frame"));
            kernel(page * self.page, frame);
        }
    }

    fn pages(&self, range: &Range<usize>) -> Range<usize> {
        range.start / self.page..range.end.div_ceil(self.page)
    }

    fn copy(&self, bytes: usize) {
        let time = self.latency + Duration::from_secs_f64(bytes as f64 * self.per_byte);
        if !time.is_zero() {
            thread::sleep(time);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Device for Simulated {
    type Region = Frames;

    fn reserve(&self, bytes: usize) -> Result<Frames> {
        Ok(Mutex::new((0..bytes / self.page).map(|_| None).collect()))
    }

    fn map(&self, region: &Frames, range: Range<usize>) -> Result<()> {
        let (mut free, mut frames) = (lock(&self.free), lock(region));
        for page in self.pages(&range) {
            if frames[page].is_none() {
                *free = free.checked_sub(1).ok_or_else(|| Error::Device {
                    device: "the simulated device",
                    what: "it has no frame left".into(),
                })?;
                // A device promises nothing of what is in a new frame.
                frames[page] = Some(vec![0xa5; self.page].into());
            }
        }
        Ok(())
    }

    fn unmap(&self, region: &Frames, range: Range<usize>) {
        let (mut free, mut frames) = (lock(&self.free), lock(region));
        for page in self.pages(&range) {
            *free += usize::from(frames[page].take().is_some());
        }
    }

    fn read(&self, region: &Frames, at: usize, into: &mut [u8]) -> Result<()> {
        self.copy(into.len());
        let (start, len) = (at, into.len());
        self.run(region, start..start + len, |at, frame| into[at - start..][..frame.len()].copy_from_slice(frame));
        Ok(())
    }

    fn write(&self, region: &Frames, at: usize, from: &[u8]) -> Result<()> {
        self.copy(from.len());
        self.run(region, at..at + from.len(), |page, frame| frame.copy_from_slice(&from[page - at..][..frame.len()]));
        Ok(())
    }
}
