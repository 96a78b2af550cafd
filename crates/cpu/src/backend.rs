//! The backend: an instruction set, threads, and the pool that its buffers come from.

use crate::gemm::Gemm;
use crate::scratch;
use crate::simd::Isa;
use crate::storage::{MemoryFigures, Paging, Pool};
use crate::threads::Threads;
use rankfold_backend::Compute;
use rankfold_pager::Pager;
use std::sync::Arc;

/// The CPU backend: an instruction set, threads, and a pool of memory.
#[derive(Debug)]
pub struct CpuBackend {
    pub(crate) isa: Isa,
    pub(crate) threads: Threads,
    pub(crate) pool: Arc<Pool>,
}

impl CpuBackend {
    /// On the fastest instruction set of this machine, with `threads` threads (all available cores where `None`).
    pub fn new(threads: Option<usize>) -> Self {
        // Portable is always there.
        Self::with_isa(Isa::available().first().copied().unwrap_or(Isa::PORTABLE), threads)
    }

    /// On one of [`Isa::available`], as every [`Isa`] is.
    pub fn with_isa(isa: Isa, threads: Option<usize>) -> Self {
        Self { isa, threads: Threads::new(threads), pool: Arc::default() }
    }

    /// With the memory of its buffers on a pager, but for those of less than a page: each kernel holds what it touches
    /// while it runs, the rest may leave. Buffers that were made before stay where they are.
    pub fn on_pager(self, pager: Pager) -> Self {
        let page = pager.page();
        self.on_pager_from(pager, page)
    }

    /// The same for buffers of `from` bytes and more.
    pub fn on_pager_from(self, pager: Pager, from: usize) -> Self {
        Self { pool: Arc::new(Pool::paged(Paging { pager, from })), ..self }
    }

    /// The instruction set that its kernels run on.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How many threads work at once.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// The bytes that its buffers, its pool and the kernels' working memory take.
    pub fn memory(&self) -> MemoryFigures {
        MemoryFigures { scratch: scratch::held(), ..self.pool.figures() }
    }

    /// Products in `compute`.
    pub(crate) fn gemm(&self, compute: Compute) -> Gemm<'_> {
        Gemm { threads: &self.threads, isa: self.isa, compute }
    }
}
