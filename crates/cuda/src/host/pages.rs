//! Paged memory of the host's device: the checker is told what has memory behind it, so that a kernel that touches what
//! has none is found; without it such a kernel reads zeros, and what it writes is lost.

use super::HostDriver;
use super::memory::FRAME;
use crate::{Driver, PagedMemory, Result};

impl PagedMemory for HostDriver {
    fn frame(&self) -> Result<usize> {
        Ok(FRAME)
    }

    fn reserve(&self, bytes: usize) -> Result<u64> {
        self.memory.reserve(bytes)
    }

    fn unreserve(&self, address: u64, _: usize) {
        self.memory.unreserve(address);
    }

    fn map(&self, address: u64, bytes: usize) -> Result<()> {
        self.memory.map(address, bytes)?;
        if let Some(mut checker) = self.checker() {
            checker.allocated(address, bytes);
        }
        Ok(())
    }

    fn unmap(&self, address: u64, bytes: usize) {
        // Everything launched before has run: a launch returns when it is done.
        if let Some(mut checker) = self.checker() {
            checker.freed(address, bytes);
        }
        self.memory.unmap(address, bytes);
    }

    fn page_in(&self, bytes: &[u8], to: u64) -> Result<()> {
        self.upload(bytes, to)
    }

    fn page_out(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.download(from, bytes)
    }
}
