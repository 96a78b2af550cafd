//! What the shim (`host/shim.h`) calls: each finds the running block, and suspends the fibre where it has to wait.

use super::block::{Fault, running, suspend};
use super::checker::Kind;
use super::copies::Landed;
use crate::Site;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;

/// A line as the compiler names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawSite {
    file: *const c_char,
    line: c_int,
}

// SAFETY: the file is a string literal of the program.
unsafe impl Send for RawSite {}

impl RawSite {
    /// The same number for the same line.
    pub(super) fn key(self) -> usize {
        self.file as usize ^ (self.line as usize) << 48
    }

    pub(super) fn resolve(self) -> Site {
        // SAFETY: a string literal of the kernel's unit.
        let file = unsafe { CStr::from_ptr(self.file) }.to_string_lossy();
        let name = Path::new(&*file).file_name().unwrap_or_default();
        Site { file: name.to_string_lossy().into_owned(), line: self.line.unsigned_abs() }
    }
}

/// `struct RfShared`: a shared array as its source declares it.
#[repr(C)]
#[derive(Debug)]
pub(super) struct SharedArray {
    pub(super) name: *const c_char,
    pub(super) bytes: usize,
    file: *const c_char,
    line: c_int,
}

/// What the last of some lanes does for all.
pub(super) type Op = unsafe extern "C" fn(*mut *mut c_void, c_uint);

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_barrier(file: *const c_char, line: c_int) {
    let block = running();
    // SAFETY: called by a fibre of the running block, of which the reference is gone before the fibre waits.
    unsafe {
        if (*block).barrier(RawSite { file, line }) {
            suspend(block);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_syncwarp(mask: c_uint, file: *const c_char, line: c_int) {
    let block = running();
    // SAFETY: as in rf_barrier.
    unsafe {
        if (*block).meet(mask, None, std::ptr::null_mut(), RawSite { file, line }) {
            suspend(block);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_warp(mask: c_uint, op: Op, slot: *mut c_void, file: *const c_char, line: c_int) {
    let block = running();
    // SAFETY: as in rf_barrier.
    unsafe {
        if (*block).meet(mask, Some(op), slot, RawSite { file, line }) {
            suspend(block);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_shared(array: *const SharedArray) -> *mut c_void {
    let block = running();
    // SAFETY: as in rf_barrier; a block that has to stop never resumes the fibre.
    unsafe {
        loop {
            if let Some(start) = (*block).place(array) {
                return start.cast();
            }
            suspend(block);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_dynamic() -> *mut c_void {
    // SAFETY: as in rf_barrier.
    unsafe { (*running()).shared.dynamic().cast() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_atomic(address: *const c_void, bytes: c_uint, file: *const c_char, line: c_int) {
    let site = RawSite { file, line };
    // SAFETY: as in rf_barrier.
    unsafe { touch(address as usize, bytes as usize, Kind::Atomic, super::checker::Where::Line(site)) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_atomic_write(address: *const c_void, bytes: c_uint, file: *const c_char, line: c_int) {
    let site = RawSite { file, line };
    // SAFETY: as in rf_barrier.
    unsafe { touch(address as usize, bytes as usize, Kind::AtomicWrite, super::checker::Where::Line(site)) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_touch(address: *const c_void, bytes: c_uint, file: *const c_char, line: c_int) {
    let site = RawSite { file, line };
    // SAFETY: as in rf_barrier.
    unsafe { touch(address as usize, bytes as usize, Kind::Read, super::checker::Where::Line(site)) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_access(address: usize, bytes: c_uint, write: bool, site: usize) {
    let kind = if write { Kind::Write } else { Kind::Read };
    // SAFETY: as in rf_barrier.
    unsafe { touch(address, bytes as usize, kind, super::checker::Where::Code(site)) };
}

/// Shows an access to the checker, and stops the block where it has something to say.
///
/// # Safety
/// Called on a fibre of the running block, or outside of one.
pub(super) unsafe fn touch(address: usize, bytes: usize, kind: Kind, site: super::checker::Where) {
    let block = running();
    // SAFETY: the running block and the checker that it began with; the references are gone before the fibre waits.
    unsafe {
        if block.is_null() || (*block).checker.is_null() {
            return;
        }
        let (checker, thread) = ((*block).checker, (*block).current);
        let own = |address| (&*block).owns_stack(address);
        let Err(finding) = (*checker).access(thread, address, bytes, kind, site, own) else { return };
        (*block).fail(Fault::Checked(finding));
        loop {
            suspend(block);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_cp_async(
    to: *mut c_void,
    from: *const c_void,
    valid: c_uint,
    file: *const c_char,
    line: c_int,
) {
    let site = RawSite { file, line };
    // SAFETY: as in rf_barrier; the source is read now or when the copy is waited for, as the checker is told both times.
    unsafe {
        touch(from as usize, valid as usize, Kind::Read, super::checker::Where::Line(site));
        touch(to as usize, 16, Kind::Fly, super::checker::Where::Line(site));
        let (copies, now) = (*running()).copies();
        copies.issue(to.cast(), from.cast(), valid as usize, now, site);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_cp_async_commit() {
    // SAFETY: as in rf_barrier.
    unsafe { (*running()).copies().0.commit() };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rf_cp_async_wait(pending: c_uint) {
    let block = running();
    // SAFETY: as in rf_barrier. A copy may have read its source until now.
    unsafe {
        while let Some(Landed { to, from, valid, site }) = (*block).copies().0.land(pending as usize) {
            touch(from as usize, valid, Kind::Read, super::checker::Where::Line(site));
            touch(to as usize, 16, Kind::Land, super::checker::Where::Line(site));
        }
    }
}
