//! A device's memory over the host's, which may itself be over a file: device → host → file.
//!
//! One pager stands on another. What leaves the device is copied into an allocation of the host's pager, whose pages are
//! held for the copy alone and may then leave for the file; so each tier has its own limit, its own forecast, its own
//! workers, and none knows of the others.

use crate::sync::{Mutex, MutexGuard};
use crate::{Allocation, FileFigures, Host, Memory, Pager, Result};
use std::fmt::Debug;
use std::ops::Range;

/// Memory that the host cannot touch, in which addresses can be had without frames behind them.
///
/// All ranges are bytes, of whole pages. A device that works while its caller goes on (streams of kernels) must itself
/// see to it that a copy follows the work that was queued before it, and that frames stay while work on them is queued.
pub trait Device: Debug + Send + Sync + 'static {
    /// Addresses, and the frames that are behind them.
    type Region: Debug + Send + Sync;

    /// Addresses for `bytes` bytes, without frames.
    fn reserve(&self, bytes: usize) -> Result<Self::Region>;

    /// Put frames behind addresses that have none. Their bytes are unspecified.
    fn map(&self, region: &Self::Region, range: Range<usize>) -> Result<()>;

    /// Take them back.
    fn unmap(&self, region: &Self::Region, range: Range<usize>);

    /// Copy from the device, `into` being in the host's memory.
    fn read(&self, region: &Self::Region, at: usize, into: &mut [u8]) -> Result<()>;

    /// Copy to the device.
    fn write(&self, region: &Self::Region, at: usize, from: &[u8]) -> Result<()>;
}

/// A device's memory, whose pages are kept by a pager of the host's.
#[derive(Debug)]
pub struct OnHost<D: Device> {
    device: D,
    host: Pager<Host>,
    page: usize,
}

/// Addresses of the device, and of the host for what is not there.
#[derive(Debug)]
pub struct DeviceRegion<D: Device> {
    device: D::Region,
    host: Mutex<Allocation<Host>>,
}

impl<D: Device> DeviceRegion<D> {
    /// The device's own part.
    pub fn device(&self) -> &D::Region {
        &self.device
    }

    fn host(&self) -> MutexGuard<'_, Allocation<Host>> {
        // Nothing is changed under the lock that a panic could leave half done.
        self.host.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<D: Device> OnHost<D> {
    /// `page` is the device's page, which may be of any size that the host's divides.
    pub fn new(device: D, host: Pager<Host>, page: usize) -> Self {
        Self { device, host, page }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The pager of what is not on it.
    pub fn host(&self) -> &Pager<Host> {
        &self.host
    }

    fn bytes(&self, pages: &Range<usize>) -> Range<usize> {
        pages.start * self.page..pages.end * self.page
    }
}

impl<D: Device> Memory for OnHost<D> {
    type Region = DeviceRegion<D>;

    fn reserve(&self, pages: usize) -> Result<DeviceRegion<D>> {
        let bytes = pages.saturating_mul(self.page);
        // The host first, which refuses what no addresses are for.
        let host = Mutex::new(self.host.alloc(bytes)?);
        Ok(DeviceRegion { device: self.device.reserve(bytes)?, host })
    }

    fn commit(&self, region: &DeviceRegion<D>, pages: Range<usize>) -> Result<()> {
        self.device.map(&region.device, self.bytes(&pages))
    }

    fn store(&self, region: &DeviceRegion<D>, pages: Range<usize>) -> Result<()> {
        let range = self.bytes(&pages);
        let mut host = region.host();
        let mut pin = host.pin_mut(range.clone())?;
        self.device.read(&region.device, range.start, &mut pin)
    }

    fn load(&self, region: &DeviceRegion<D>, pages: Range<usize>) -> Result<()> {
        let range = self.bytes(&pages);
        let host = region.host();
        let pin = host.pin(range.clone())?;
        self.device.map(&region.device, range.clone())?;
        self.device.write(&region.device, range.start, &pin)
    }

    fn release(&self, region: &DeviceRegion<D>, pages: Range<usize>) {
        self.device.unmap(&region.device, self.bytes(&pages));
    }

    fn forget(&self, region: &DeviceRegion<D>, pages: Range<usize>) {
        region.host().discard(self.bytes(&pages));
    }

    fn file(&self) -> Option<FileFigures> {
        self.host.memory().file()
    }
}
