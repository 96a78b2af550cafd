//! Asynchronous copies to shared memory (`cp.async`): 16 bytes each, in committed groups.
//!
//! When a copy lands is the hardware's choice: here a coin's, at once or when it is waited for. Landing at once shows
//! what overwrites data that is still read; landing late shows what is read too early.

use super::calls::RawSite;
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug)]
struct Copy {
    to: *mut u8,
    from: *const u8,
    valid: usize,
    landed: bool,
    site: RawSite,
}

impl Copy {
    /// # Safety
    /// 16 bytes to write at `to`, `valid` to read at `from`.
    unsafe fn land(&mut self) {
        if !self.landed {
            // SAFETY: the caller's; the two are shared and global memory.
            unsafe {
                std::ptr::copy_nonoverlapping(self.from, self.to, self.valid);
                std::ptr::write_bytes(self.to.add(self.valid), 0, 16 - self.valid);
            }
            self.landed = true;
        }
    }
}

/// The copies of one thread that are on their way: those not yet committed, and groups from the oldest.
#[derive(Debug, Default)]
pub(super) struct Copies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Copies {
    /// Nothing is on its way.
    pub(super) fn begin(&mut self) {
        self.open.clear();
        self.groups.clear();
    }

    /// A copy sets off, and lands where `now`.
    ///
    /// # Safety
    /// 16 bytes to write at `to` and `valid`, at most 16, to read at `from`, until it is waited for.
    pub(super) unsafe fn issue(&mut self, to: *mut u8, from: *const u8, valid: usize, now: bool, site: RawSite) {
        let mut copy = Copy { to, from, valid: valid.min(16), landed: false, site };
        if now {
            // SAFETY: the caller's.
            unsafe { copy.land() };
        }
        self.open.push(copy);
    }

    /// What set off since the last time becomes a group, an empty one too.
    pub(super) fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Lands groups until at most `pending` are on their way; where they went.
    pub(super) fn wait(&mut self, pending: usize) -> Vec<(*mut u8, RawSite)> {
        let mut landed = Vec::new();
        while self.groups.len() > pending {
            for mut copy in self.groups.pop_front().unwrap_or_default() {
                // SAFETY: promised at `issue`.
                unsafe { copy.land() };
                landed.push((copy.to, copy.site));
            }
        }
        landed
    }
}
