//! Under a memory limit: what leaves memory, in which order, and the least limit under which a run works.
//!
//! Buffers of a page, 64 KiB, or more can leave; a kernel needs all that it touches in memory at once. So a run needs, at the
//! least, the program, the kernels' working memory and the small buffers, and beside them the largest set of buffers
//! that one call of a kernel reads and writes (AdamW goes through its tensors piece by piece), the pager's own books, and
//! [`RESERVE`].

use super::ledger::Record;
use super::{Bytes, Category, Plan};
use crate::{Error, Result};

/// What leaves first comes first: moments are wanted once a step, weights twice (or three times, with checkpointing),
/// activations once more each, but soon.
const ORDER: [Category; 10] = [
    Category::Optimizer,
    Category::Codes,
    Category::Scales,
    Category::Dense,
    Category::Saved,
    Category::Weights,
    Category::Gradients,
    Category::Adapters,
    Category::Head,
    Category::Working,
];

/// Kept free under a limit: what may be taken between two looks at the process's memory, by small buffers, by files as
/// they are read and written, by kernels whose working memory grows.
pub const RESERVE: u64 = 8 << 20;

/// The pager's own: the order in which pages were used (2 MiB), its entries, and what the system keeps for its addresses.
const BOOKS: u64 = 4 << 20;

/// The least memory that a run works in.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Floor {
    /// The program, small buffers, the kernels' working memory, the pager's books, and [`RESERVE`].
    pub fixed: u64,
    /// The most bytes of large buffers that one call of a kernel touches.
    pub working_set: u64,
    /// The kernel.
    pub kernel: &'static str,
    /// The tensor of the model that it works on, where it works on one.
    pub tensor: Option<String>,
}

impl Floor {
    pub(super) fn new(record: &Record, fixed: u64) -> Self {
        let fixed = fixed.saturating_add(RESERVE + BOOKS);
        let Some(call) = &record.largest else {
            return Self { fixed, working_set: 0, kernel: "none", tensor: None };
        };
        let pieces = call.pieces.iter().map(|piece| &record.pieces[*piece]);
        // A layer's weight is larger than its adapter.
        let named = pieces.filter(|piece| piece.name.is_some()).max_by_key(|piece| piece.bytes);
        let tensor = named.and_then(|piece| piece.name.clone());
        Self { fixed, working_set: call.bytes, kernel: call.kernel, tensor }
    }

    /// The least limit.
    pub fn bytes(&self) -> u64 {
        self.fixed.saturating_add(self.working_set)
    }
}

/// The run's peak under a limit.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Paging {
    /// The limit.
    pub limit: u64,
    /// What stays in memory.
    pub resident: Bytes,
    /// What is in the file.
    pub paged: Bytes,
}

impl Plan {
    /// What of the run's peak is paged under `limit` bytes: first what the pool keeps for reuse is given back, then
    /// categories leave, the least often used first, and no more of them than must.
    ///
    /// Errors: a limit below the least one.
    pub fn under(&self, limit: u64) -> Result<Paging> {
        let Floor { kernel, tensor, .. } = &self.floor;
        let least = self.floor.bytes();
        if limit < least {
            let needs = tensor.as_ref().map_or_else(|| (*kernel).to_owned(), |tensor| format!("{kernel} of {tensor}"));
            return Err(Error::MemoryLimit { limit, least, needs });
        }
        let (mut resident, mut paged) = (self.peak().bytes, Bytes::default());
        let mut excess = resident.sum().saturating_sub(limit);
        let returned = excess.min(resident[Category::Pool]);
        resident[Category::Pool] -= returned;
        excess -= returned;
        for category in ORDER {
            let leaves = excess.min(self.peak().pageable[category]);
            paged[category] = leaves;
            resident[category] -= leaves;
            excess -= leaves;
        }
        Ok(Paging { limit, resident, paged })
    }
}
