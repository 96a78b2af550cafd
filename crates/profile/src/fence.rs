//! When what was asked of a backend is done.
//!
//! A backend may return before its kernels have run, but they run in the order of their calls, and what is read has
//! been written: a read of one element waits for all of them. One whose memory is the host's own computes in the call
//! itself, and there is nothing to wait for.

use rankfold_backend::{Backend, Buffer, Result};

/// One element of a backend's memory, where that is not the host's.
#[derive(Debug)]
pub(crate) struct Fence(Option<Buffer>);

impl Fence {
    pub fn new(backend: &dyn Backend) -> Result<Self> {
        let mut element = backend.upload(&[0u8])?;
        let is_the_hosts = backend.host_bytes_mut(&mut element)?.is_some();
        Ok(Self((!is_the_hosts).then_some(element)))
    }

    /// Until every call so far is done.
    pub fn wait(&self, backend: &dyn Backend) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |element| backend.read(element.view(), &mut [0]))
    }
}
