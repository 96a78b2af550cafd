//! Host memory behind buffers: a `block` of the system's memory or of a pager's, on loan from the `pool`.

mod block;
mod pool;
#[cfg(test)]
mod tests;

pub use pool::MemoryFigures;

pub(crate) use block::{Holds, Paging};
pub(crate) use pool::Pool;

use block::Block;
use rankfold_backend::{HostBytes, Storage};
use rankfold_pager::Result;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Every block starts at a multiple of it: a cache line, an AVX-512 vector.
const ALIGN: usize = 64;

/// The storage of a [`rankfold_backend::Buffer`].
pub(crate) struct HostMemory {
    /// `None` only while it is dropped.
    block: Option<Block>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl HostMemory {
    fn block(&self) -> &Block {
        self.block.as_ref().expect("a block until it is dropped")
    }

    fn block_mut(&mut self) -> &mut Block {
        self.block.as_mut().expect("a block until it is dropped")
    }

    /// A part of its bytes, lent against holds that keep it in place; the first byte of all is aligned to [`ALIGN`].
    pub(crate) fn bytes<'s>(&'s self, part: Range<usize>, holds: &'s Holds) -> Result<&'s [u8]> {
        self.block().bytes(part, holds)
    }

    /// The same, to write.
    pub(crate) fn bytes_mut<'s>(&'s mut self, part: Range<usize>, holds: &'s Holds) -> Result<&'s mut [u8]> {
        self.block_mut().bytes_mut(part, holds)
    }

    /// All bytes asked for, held while they are lent.
    pub(crate) fn host_bytes(&mut self) -> Result<HostBytes<'_>> {
        let bytes = self.bytes;
        self.block_mut().host_bytes(0..bytes)
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.put(block);
        }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Storage for HostMemory {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
