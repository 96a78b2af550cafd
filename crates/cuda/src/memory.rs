//! The storage behind this backend's buffers, and memory that kernels work in.
//!
//! A buffer's memory may be paged: its address is told against [`Holds`] alone, which keep the pages in place until
//! they are dropped. Memory of the driver is always where it is.

use crate::paging::Vmm;
use crate::pool::{Paged, Paging, Share};
use crate::{Driver, Result};
use rankfold_backend::Storage;
use rankfold_pager::{self as pager, Access, Hold, OnHost};
use std::any::Any;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// An allocation of a driver, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    address: u64,
    /// What it takes of a limit.
    _share: Option<Share>,
}

impl DeviceMemory {
    /// `bytes` bytes of unspecified value.
    pub(crate) fn new(driver: &Arc<dyn Driver>, paging: Option<&Arc<Paging>>, bytes: usize) -> Result<Self> {
        let share = paging.map(|paging| paging.share(bytes)).transpose()?;
        Ok(Self { address: driver.alloc(bytes)?, driver: Arc::clone(driver), _share: share })
    }

    /// The first byte's address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// What one kernel of the contract keeps in place until it is launched.
#[derive(Debug, Default)]
pub(crate) struct Holds(RefCell<Vec<Hold<OnHost<Vmm>>>>);

/// The memory of a buffer.
#[derive(Debug)]
pub(crate) struct BufferMemory {
    place: Place,
    /// What the host wrote, as long as nobody wrote anything else.
    written: Option<Vec<u8>>,
}

#[derive(Debug)]
enum Place {
    /// Always there.
    Fixed(DeviceMemory),
    /// There while it is held.
    Paged(Paged),
}

impl BufferMemory {
    /// Of memory that stays where it is.
    pub(crate) fn fixed(memory: DeviceMemory) -> Self {
        Self { place: Place::Fixed(memory), written: None }
    }

    /// Of paged memory.
    pub(crate) fn paged(memory: Paged) -> Self {
        Self { place: Place::Paged(memory), written: None }
    }

    /// The address of a part, to read for as long as `holds` live. An empty part needs no hold.
    pub(crate) fn address(&self, part: Range<usize>, holds: &Holds) -> pager::Result<u64> {
        self.hold(part, Access::Read, holds)
    }

    /// The same, to write.
    pub(crate) fn address_mut(&mut self, part: Range<usize>, holds: &Holds) -> pager::Result<u64> {
        self.written = None;
        self.hold(part, Access::Write, holds)
    }

    fn hold(&self, part: Range<usize>, access: Access, holds: &Holds) -> pager::Result<u64> {
        match &self.place {
            Place::Fixed(memory) => Ok(memory.address + part.start as u64),
            Place::Paged(allocation) => {
                if !part.is_empty() {
                    let hold = allocation.hold(part.clone(), access)?;
                    holds.0.borrow_mut().push(hold);
                }
                Ok(allocation.region().device().at(part.start))
            }
        }
    }

    /// The host has written all of it: ids, positions and labels, which kernels check before they use them as indices,
    /// are then checked without asking the device for them.
    pub(crate) fn remember(&mut self, bytes: &[u8]) {
        self.written = Some(bytes.to_vec());
    }

    /// All of it, where the host wrote it last.
    pub(crate) fn remembered(&self) -> Option<&[u8]> {
        self.written.as_deref()
    }

    /// Whether it is this driver's memory: another device has addresses of its own.
    pub(crate) fn belongs_to(&self, driver: &Arc<dyn Driver>) -> bool {
        let own = match &self.place {
            Place::Fixed(memory) => &memory.driver,
            Place::Paged(allocation) => allocation.region().device().driver(),
        };
        Arc::ptr_eq(own, driver)
    }
}

impl Storage for BufferMemory {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
