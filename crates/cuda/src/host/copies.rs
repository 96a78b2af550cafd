//! Asynchronous copies to shared memory (`cp.async`): 16 bytes each, in committed groups.
//!
//! When a copy lands is the hardware's choice: here a coin's, at once or when it is waited for. Landing at once shows
//! what overwrites data that is still read; landing late shows what is read too early.

use super::calls::RawSite;
use std::collections::VecDeque;

#[derive(Debug)]
struct Copy {
    to: *mut u8,
    from: *const u8,
    valid: usize,
    landed: bool,
    site: RawSite,
}

/// A copy that has been waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landed {
    pub(super) to: *mut u8,
    pub(super) from: *const u8,
    pub(super) valid: usize,
    pub(super) site: RawSite,
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

    /// Lands the next copy of a group that is too many where at most `pending` may be on their way; none where it is not.
    pub(super) fn land(&mut self, pending: usize) -> Option<Landed> {
        while self.groups.len() > pending {
            if let Some(mut copy) = self.groups.front_mut()?.pop() {
                // SAFETY: promised at `issue`.
                unsafe { copy.land() };
                let Copy { to, from, valid, site, .. } = copy;
                return Some(Landed { to, from, valid, site });
            }
            self.groups.pop_front();
        }
        None
    }
}
