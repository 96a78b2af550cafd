//! A GPU's memory by frames (CUDA's virtual memory management), and the copies that page it.
//!
//! Copies go through page-locked memory, in halves that take turns: while one is on its way, the other is filled or
//! emptied. The host's own pages could be locked for no longer than a copy, as they leave for a file: each copy would
//! pay for locking and unlocking them. Each direction has a stream of its own beside that of the kernels, so that pages
//! come and go while kernels run: pages come to frames that no kernel knows of, and those that go are waited for up to
//! the kernels launched before. Frames go when all of those have run.

use super::{GpuDriver, check};
use crate::{Driver, Error, PagedMemory, Result};
use cudarc::driver::sys::{
    self, CUevent, CUmemAccess_flags, CUmemAccessDesc_st, CUmemAllocationGranularity_flags, CUmemAllocationProp,
    CUmemAllocationType, CUmemLocation_st, CUmemLocationType, CUresult, CUstream,
};
use std::ptr;
use std::sync::{Mutex, PoisonError};

/// Bytes of each half of the page-locked memory.
const HALF: usize = 4 << 20;

/// One direction of the way between host and device.
pub(super) struct Link {
    stream: CUstream,
    /// Two halves.
    locked: *mut u8,
    /// That the copy to or from a half is done.
    done: [CUevent; 2],
    /// The kernels that were launched before.
    before: CUevent,
}

/// A direction's link, made when it is first used.
pub(super) type Way = Mutex<Option<Link>>;

impl Link {
    fn new() -> Result<Self> {
        let none = ptr::null_mut();
        let mut link = Self { stream: ptr::null_mut(), locked: ptr::null_mut(), done: [none; 2], before: none };
        // The timing of events is not asked for.
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: places for handles and an address; what was made before an error is given back by `drop`.
        unsafe {
            check("cuStreamCreate", sys::cuStreamCreate(&mut link.stream, 1))?;
            for event in link.done.iter_mut().chain([&mut link.before]) {
                check("cuEventCreate", sys::cuEventCreate(event, flags))?;
            }
            check("cuMemHostAlloc", sys::cuMemHostAlloc((&raw mut link.locked).cast(), 2 * HALF, 0))?;
        }
        Ok(link)
    }

    /// A half, for `bytes` bytes.
    fn half(&self, nth: usize) -> *mut u8 {
        // SAFETY: within the two halves.
        unsafe { self.locked.add(nth % 2 * HALF) }
    }

    fn record(&self, nth: usize) -> Result<()> {
        // SAFETY: handles of this link.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.done[nth % 2], self.stream) })
    }

    fn wait(&self, nth: usize) -> Result<()> {
        // SAFETY: an event of this link; one that was never recorded is done.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.done[nth % 2]) })
    }

    /// Everything on this way is done, whatever came of it.
    fn settle(&self, outcome: Result<()>) -> Result<()> {
        // SAFETY: this link's stream.
        outcome.and(check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) }))
    }

    fn bring(&self, bytes: &[u8], to: u64) -> Result<()> {
        for (nth, part) in bytes.chunks(HALF).enumerate() {
            self.wait(nth)?;
            let at = to + (nth * HALF) as u64;
            // SAFETY: a half that no copy reads any more; room on the device is the caller's.
            unsafe {
                ptr::copy_nonoverlapping(part.as_ptr(), self.half(nth), part.len());
                let outcome = sys::cuMemcpyHtoDAsync_v2(at, self.half(nth).cast(), part.len(), self.stream);
                check("cuMemcpyHtoDAsync", outcome)?;
            }
            self.record(nth)?;
        }
        Ok(())
    }

    fn fetch(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let mut parts: Vec<&mut [u8]> = bytes.chunks_mut(HALF).collect();
        for nth in 0..=parts.len() {
            if let Some(part) = parts.get(nth) {
                let at = from + (nth * HALF) as u64;
                // SAFETY: a half that was emptied two turns ago; the device's bytes are the caller's.
                let outcome = unsafe { sys::cuMemcpyDtoHAsync_v2(self.half(nth).cast(), at, part.len(), self.stream) };
                check("cuMemcpyDtoHAsync", outcome)?;
                self.record(nth)?;
            }
            if let Some(part) = nth.checked_sub(1).and_then(|nth| parts.get_mut(nth)) {
                self.wait(nth - 1)?;
                // SAFETY: a half that was copied to, at least as long as the part.
                unsafe { ptr::copy_nonoverlapping(self.half(nth - 1), part.as_mut_ptr(), part.len()) };
            }
        }
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: what this link made, each given back once, after its copies; the context is this thread's, as its
        // driver sees to. An error here is one of an earlier call.
        unsafe {
            if !self.stream.is_null() {
                let _ = sys::cuStreamSynchronize(self.stream);
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            for event in self.done.into_iter().chain([self.before]).filter(|event| !event.is_null()) {
                let _ = sys::cuEventDestroy_v2(event);
            }
            if !self.locked.is_null() {
                let _ = sys::cuMemFreeHost(self.locked.cast());
            }
        }
    }
}

impl GpuDriver {
    /// Run on a way's link, made where there is none.
    fn on(&self, way: &Way, run: impl FnOnce(&Link) -> Result<()>) -> Result<()> {
        self.enter()?;
        let mut way = way.lock().unwrap_or_else(PoisonError::into_inner);
        if way.is_none() {
            *way = Some(Link::new()?);
        }
        let link = way.as_ref().expect("it was made above");
        link.settle(run(link))
    }

    fn location(&self) -> CUmemLocation_st {
        CUmemLocation_st { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.device }
    }

    /// What frames are: the device's own memory.
    fn properties(&self) -> CUmemAllocationProp {
        // SAFETY: a plain structure, of which all bytes 0 stand for nothing asked for.
        let nothing: CUmemAllocationProp = unsafe { std::mem::zeroed() };
        let type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        CUmemAllocationProp { type_, location: self.location(), ..nothing }
    }

    /// Memory behind one frame's addresses, which nobody may touch yet.
    fn map_frame(&self, address: u64, frame: usize) -> Result<()> {
        let (properties, mut handle) = (self.properties(), 0);
        // SAFETY: a place for a handle, and what to make.
        let mut create = || unsafe { sys::cuMemCreate(&mut handle, frame, &properties, 0) };
        let mut outcome = create();
        if outcome == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.trim()?;
            outcome = create();
        }
        if outcome == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { asked: frame, free: self.free_memory() });
        }
        check("cuMemCreate", outcome)?;
        // SAFETY: reserved addresses with nothing behind them; the memory lives as long as it is mapped.
        unsafe {
            let mapped = check("cuMemMap", sys::cuMemMap(address, frame, 0, handle, 0));
            let released = check("cuMemRelease", sys::cuMemRelease(handle));
            mapped.and(released)
        }
    }

    fn unmap_frames(&self, address: u64, bytes: usize, frame: usize) {
        for at in (0..bytes).step_by(frame) {
            // SAFETY: one mapping as it was made, which nothing that still runs touches. An error here is one of an
            // earlier call, which the next call reports.
            let _ = unsafe { sys::cuMemUnmap(address + at as u64, frame) };
        }
    }
}

impl PagedMemory for GpuDriver {
    fn frame(&self) -> Result<usize> {
        self.enter()?;
        let (mut frame, least) = (0, CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM);
        // SAFETY: a number to write to.
        let outcome = unsafe { sys::cuMemGetAllocationGranularity(&mut frame, &self.properties(), least) };
        check("cuMemGetAllocationGranularity", outcome)?;
        Ok(frame)
    }

    fn reserve(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: a place for an address.
        check("cuMemAddressReserve", unsafe { sys::cuMemAddressReserve(&mut address, bytes, 0, 0, 0) })?;
        Ok(address)
    }

    fn unreserve(&self, address: u64, bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: addresses that `reserve` gave, with nothing behind them.
            let _ = unsafe { sys::cuMemAddressFree(address, bytes) };
        }
    }

    fn map(&self, address: u64, bytes: usize) -> Result<()> {
        let frame = self.frame()?;
        for at in (0..bytes).step_by(frame) {
            self.map_frame(address + at as u64, frame).inspect_err(|_| self.unmap_frames(address, at, frame))?;
        }
        let flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = CUmemAccessDesc_st { location: self.location(), flags };
        // SAFETY: what was mapped above.
        let outcome = unsafe { sys::cuMemSetAccess(address, bytes, &access, 1) };
        check("cuMemSetAccess", outcome).inspect_err(|_| self.unmap_frames(address, bytes, frame))
    }

    fn unmap(&self, address: u64, bytes: usize) {
        // A device that fails runs nothing more: its frames may go.
        let _ = self.synchronize();
        if let Ok(frame) = self.frame() {
            self.unmap_frames(address, bytes, frame);
        }
    }

    fn page_in(&self, bytes: &[u8], to: u64) -> Result<()> {
        self.on(&self.page_in, |link| link.bring(bytes, to))
    }

    fn page_out(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.on(&self.page_out, |link| {
            // SAFETY: an event of the link and two streams of this driver.
            unsafe {
                check("cuEventRecord", sys::cuEventRecord(link.before, self.stream))?;
                check("cuStreamWaitEvent", sys::cuStreamWaitEvent(link.stream, link.before, 0))?;
            }
            link.fetch(from, bytes)
        })
    }
}
