//! Which buffers are paged, on how much of the device's memory.
//!
//! A limit is on all of the device's memory that buffers and kernels take. What is not paged (small buffers, working
//! memory) is seldom much, and taken off the pages' share: it is never thought to be less than it was seen to be.
//!
//! A step of training frees and asks for the same sizes over and over, and a frame cannot be let go before everything
//! launched has run. So allocations are kept for the next of their size: their bytes are discarded, and their frames
//! leave before others. With what is in use, as many addresses are kept as make 5/4 of the most that ever were.

use crate::paging::{DevicePager, Vmm, failed, lock};
use crate::{Driver, Error, Result};
use rankfold_pager::{self as pager, Allocation, Limit, OnHost, Pager};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// Bytes that are brought in ahead of their use.
const LOOK_AHEAD: usize = 32 << 20;

/// Which buffers are paged, and what is left for them.
#[derive(Debug)]
pub(crate) struct Paging {
    /// Whose pages they take.
    pub(crate) pager: DevicePager,
    /// Those of at least as many bytes.
    pub(crate) from: usize,
    /// Bytes of the device that may be taken.
    limit: usize,
    beside: Mutex<Beside>,
    kept: Mutex<Kept>,
}

/// Bytes that are taken and not paged.
#[derive(Debug, Default)]
struct Beside {
    now: usize,
    most: usize,
}

/// Allocations that nobody has, by their bytes; and bytes of addresses, theirs and those in use.
#[derive(Debug, Default)]
struct Kept {
    free: BTreeMap<usize, Vec<Allocation<OnHost<Vmm>>>>,
    bytes: usize,
    live: usize,
    peak: usize,
}

impl Kept {
    fn take(&mut self, bytes: usize) -> Option<Allocation<OnHost<Vmm>>> {
        let allocations = self.free.get_mut(&bytes)?;
        let allocation = allocations.pop();
        if allocations.is_empty() {
            self.free.remove(&bytes);
        }
        self.bytes -= allocation.as_ref().map_or(0, Allocation::bytes);
        allocation
    }

    /// What is too much, the largest first.
    fn shrink(&mut self) -> Vec<Allocation<OnHost<Vmm>>> {
        let mut gone = Vec::new();
        while self.live + self.bytes > self.peak + self.peak / 4 {
            let Some((&largest, _)) = self.free.last_key_value() else { break };
            gone.extend(self.take(largest));
        }
        gone
    }
}

impl Paging {
    /// Of buffers of at least `from` bytes (a frame where not given), with at most `limit` bytes on the device.
    ///
    /// Errors: a limit below a frame; a device that has no frames.
    pub(crate) fn new(
        driver: &Arc<dyn Driver>,
        host: Pager,
        limit: usize,
        from: Option<usize>,
    ) -> pager::Result<Arc<Self>> {
        let frame = driver.frame().map_err(failed)?;
        let memory = OnHost::new(Vmm::new(driver), host, frame);
        let pager = Pager::over(memory, frame, Limit::Pages(limit), LOOK_AHEAD)?;
        let (beside, kept) = Default::default();
        Ok(Arc::new(Self { pager, from: from.unwrap_or(frame), limit, beside, kept }))
    }

    /// Paged memory of at least `bytes` bytes, its values unspecified.
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> pager::Result<Paged> {
        let too_many = || pager::Error::Address { bytes, source: std::io::ErrorKind::OutOfMemory.into() };
        let bytes = bytes.max(1).checked_next_multiple_of(self.pager.page()).ok_or_else(too_many)?;
        let mut kept = lock(&self.kept);
        let found = kept.take(bytes);
        let allocation = match found {
            Some(allocation) => allocation,
            None => self.pager.alloc(bytes)?,
        };
        kept.live += bytes;
        kept.peak = kept.peak.max(kept.live);
        let gone = kept.shrink();
        drop(kept);
        // A device may have to be waited for.
        drop(gone);
        Ok(Paged { allocation: Some(allocation), paging: Arc::clone(self) })
    }

    /// Make room for bytes that are not paged.
    pub(crate) fn share(self: &Arc<Self>, bytes: usize) -> Result<Share> {
        let mut beside = lock(&self.beside);
        let now = beside.now.saturating_add(bytes);
        if now > beside.most {
            let left = |beside| Limit::Pages(self.limit.saturating_sub(beside));
            if let Err(why) = self.pager.set_limit(left(now)) {
                // What there was room for before, there is room for.
                let _ = self.pager.set_limit(left(beside.most));
                let (asked, free) = (bytes, self.limit.saturating_sub(beside.now));
                return Err(match why {
                    pager::Error::Full { .. } | pager::Error::Capacity { .. } => Error::OutOfMemory { asked, free },
                    why => Error::NoRoom { asked, free, why: why.to_string() },
                });
            }
            beside.most = now;
        }
        beside.now = now;
        Ok(Share { paging: Arc::clone(self), bytes })
    }
}

/// A part of what is not paged, which ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    paging: Arc<Paging>,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        lock(&self.paging.beside).now -= self.bytes;
    }
}

/// Paged memory, kept for the next when it is dropped.
#[derive(Debug)]
pub(crate) struct Paged {
    /// `None` only while it is dropped.
    allocation: Option<Allocation<OnHost<Vmm>>>,
    paging: Arc<Paging>,
}

impl Deref for Paged {
    type Target = Allocation<OnHost<Vmm>>;
    fn deref(&self) -> &Self::Target {
        self.allocation.as_ref().expect("an allocation until it is dropped")
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        let Some(mut allocation) = self.allocation.take() else { return };
        let bytes = allocation.bytes();
        allocation.discard(0..bytes);
        let mut kept = lock(&self.paging.kept);
        kept.live -= bytes;
        kept.bytes += bytes;
        kept.free.entry(bytes).or_default().push(allocation);
    }
}
