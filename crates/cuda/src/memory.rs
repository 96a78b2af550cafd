//! The storage behind this backend's buffers.

use crate::{Driver, Result};
use rankfold_backend::Storage;
use std::any::Any;
use std::sync::Arc;

/// An allocation of a driver, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    address: u64,
    /// What the host wrote, as long as nobody wrote anything else.
    written: Option<Vec<u8>>,
}

impl DeviceMemory {
    /// `bytes` bytes of unspecified value.
    pub(crate) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        Ok(Self { address: driver.alloc(bytes)?, driver: Arc::clone(driver), written: None })
    }

    /// The first byte's address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The host has written all of it: ids, positions and labels, which kernels check before they use them as indices,
    /// are then checked without asking the device for them.
    pub(crate) fn remember(&mut self, bytes: &[u8]) {
        self.written = Some(bytes.to_vec());
    }

    /// Somebody else is about to write.
    pub(crate) fn forget(&mut self) {
        self.written = None;
    }

    /// All of it, where the host wrote it last.
    pub(crate) fn remembered(&self) -> Option<&[u8]> {
        self.written.as_deref()
    }

    /// Whether it is this driver's memory: another device has addresses of its own.
    pub(crate) fn belongs_to(&self, driver: &Arc<dyn Driver>) -> bool {
        Arc::ptr_eq(&self.driver, driver)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

impl Storage for DeviceMemory {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
