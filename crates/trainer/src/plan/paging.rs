//! Under a memory limit: what leaves memory, in which order, and the least limit under which a run works.
//!
//! Buffers of a page or more can leave; a kernel needs all that it touches in memory at once. So a run needs, at the
//! least, the program, the kernels' working memory and the small buffers, and beside them the largest set of pages that
//! one call of a kernel reads and writes (AdamW goes through its tensors piece by piece), the pager's own books, the
//! part of a file that is being written, and [`RESERVE`].
//!
//! All of it depends on the size of a page: the larger, the fewer buffers are large enough to leave; the smaller, the
//! more pages to keep the books of. So a page is the largest of [`PAGES`] of which the limit is some thousands, under
//! which the run works, and that lets most of the optimiser's states leave.

use super::account::Account;
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

/// Bytes of a page, each twice the last.
pub const PAGES: [u64; 7] = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

/// A limit has so many pages at the least, but of the least pages.
const PAGES_OF_A_LIMIT: u64 = 8192;

/// What is said of a limit is whole MiB.
const MIB: u64 = 1 << 20;

/// The pager's own: the order in which pages were used, its lists and its threads, and what small frames go through if
/// they go to the disk directly; and for each page its place, its last use and its checksum.
const BOOKS: (u64, u64) = (4 << 20, 32);

/// What the program may take beyond its estimate, which was measured on others than this one.
const BEYOND: u64 = 2 << 20;

/// The least memory that a run works in, with pages of one size.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Floor {
    /// Bytes of a page.
    pub page: u64,
    /// The program, small buffers, the kernels' working memory, what a start decomposes a matrix in, the pager's books,
    /// a part of a file on its way, and [`RESERVE`].
    pub fixed: u64,
    /// The pager's books among it.
    #[serde(skip)]
    books: u64,
    /// The most bytes of large buffers' pages that one call of a kernel touches.
    pub working_set: u64,
    /// The kernel.
    pub kernel: &'static str,
    /// The tensor of the model that it works on, where it works on one.
    pub tensor: Option<String>,
    /// The part of the model that it belongs to, as `model.layers.3.mlp`: that of the last tensor that it or a call
    /// before it touched. (Each part of a layer begins and ends with its tensors, on the way back too.)
    pub layer: Option<String>,
}

impl Floor {
    /// Of pages of the size of that number, with `addresses` bytes of them in all.
    pub(super) fn new(record: &Record, fixed: u64, size: usize, addresses: u64) -> Self {
        let page = PAGES[size];
        let books = BOOKS.0 + BOOKS.1 * addresses.div_ceil(page);
        let fixed = fixed.saturating_add(RESERVE + BEYOND + rankfold_files::PART as u64 + books);
        let Some(call) = &record.largest[size] else {
            return Self { page, fixed, books, working_set: 0, kernel: "none", tensor: None, layer: None };
        };
        let pieces = call.pieces.iter().map(|piece| &record.pieces[*piece]);
        // A layer's weight is larger than its adapter.
        let named = pieces.filter(|piece| piece.name.is_some()).max_by_key(|piece| piece.bytes);
        let tensor = named.and_then(|piece| piece.name.clone());
        let near = tensor.as_deref().or_else(|| record.pieces[call.near?].name.as_deref());
        let layer = near.map(part_of_the_model);
        Self { page, fixed, books, working_set: call.bytes, kernel: call.kernel, tensor, layer }
    }

    /// The least limit, in whole MiB.
    pub fn bytes(&self) -> u64 {
        let of_pages = if self.page == PAGES[0] { 0 } else { self.page * PAGES_OF_A_LIMIT };
        whole(self.fixed.saturating_add(self.working_set).max(of_pages))
    }

    /// What needs most, in words.
    pub fn needs(&self) -> String {
        let Self { kernel, tensor, layer, .. } = self;
        match (tensor, layer) {
            (Some(tensor), _) => format!("{kernel} of {tensor}"),
            (None, Some(layer)) => format!("{kernel} in {layer}"),
            (None, None) => (*kernel).to_owned(),
        }
    }
}

/// Of a tensor within a layer of the model, the layer with the part of it; else the tensor's module.
fn part_of_the_model(tensor: &str) -> String {
    let names: Vec<&str> = tensor.trim_start_matches("base_model.model.").split('.').collect();
    let names = match names.iter().position(|name| *name == "layers") {
        Some(layers) => &names[..names.len().min(layers + 3)],
        None => names.strip_suffix(&["weight"]).unwrap_or(&names),
    };
    names.join(".")
}

fn whole(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(MIB).unwrap_or(u64::MAX)
}

/// Those of all sizes of pages that let nine tenths of the optimiser's states leave that the least pages let leave.
pub(super) fn usable(mut accounts: Vec<Account>) -> Vec<Account> {
    let states = |account: &Account| account.peak().pageable[Category::Optimizer];
    let most = accounts.first().map_or(0, states);
    accounts.retain(|account| states(account) >= most - most / 10);
    accounts
}

/// The floor of the least limit.
pub(super) fn least(accounts: &[Account]) -> &Floor {
    let floors = accounts.iter().map(|account| &account.floor);
    floors.min_by_key(|floor| floor.bytes()).expect("pages of one size at the least")
}

/// The run's peak under a limit.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Paging {
    /// The limit.
    pub limit: u64,
    /// Bytes of a page.
    pub page: u64,
    /// What stays in memory.
    pub resident: Bytes,
    /// What is in the file.
    pub paged: Bytes,
}

impl Plan {
    /// What of the run's peak is paged under `limit` bytes, of which [`RESERVE`] stays free: first what the pool keeps
    /// for reuse is given back, then categories leave, the least often used first, and no more of them than must.
    ///
    /// Errors: a limit below the least one.
    pub fn under(&self, limit: u64) -> Result<Paging> {
        let account = self.account(limit)?;
        let (mut resident, mut paged) = (self.peak().bytes, Bytes::default());
        let mut excess = resident.sum().saturating_add(RESERVE).saturating_sub(limit);
        let returned = excess.min(resident[Category::Pool]);
        resident[Category::Pool] -= returned;
        excess -= returned;
        for category in ORDER {
            let leaves = excess.min(account.peak().pageable[category]);
            paged[category] = leaves;
            resident[category] -= leaves;
            excess -= leaves;
        }
        Ok(Paging { limit, page: account.floor.page, resident, paged })
    }

    /// Bytes of a page under `limit`, in a process that takes `taken` bytes before the run begins.
    ///
    /// Errors: a limit below the least one; one that is too low beside what is taken.
    pub fn page(&self, limit: u64, taken: u64) -> Result<u64> {
        self.account(limit)?;
        let own = |floor: &Floor| RESERVE + floor.books;
        let beside = |floor: &Floor| whole(taken.saturating_add(own(floor)).saturating_add(floor.working_set));
        let floors = || self.accounts.iter().map(|account| &account.floor);
        if let Some(floor) = floors().rev().find(|floor| floor.bytes().max(beside(floor)) <= limit) {
            return Ok(floor.page);
        }
        let least = floors().map(|floor| floor.bytes().max(beside(floor))).min().unwrap_or(u64::MAX);
        Err(Error::MemoryTaken { limit, taken, least, needs: self.floor.needs() })
    }

    /// The run with the largest pages that serve it under `limit`.
    fn account(&self, limit: u64) -> Result<&Account> {
        let found = self.accounts.iter().rev().find(|account| account.floor.bytes() <= limit);
        let (least, needs) = (self.floor.bytes(), self.floor.needs());
        found.ok_or(Error::MemoryLimit { limit, least, needs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_their_books_are_the_pagers() {
        let sizes = std::iter::successors(Some(*rankfold_pager::PAGES.start()), |page| Some(2 * page));
        assert!(sizes.take_while(|page| rankfold_pager::PAGES.contains(page)).eq(PAGES.map(|page| page as usize)));
        assert_eq!(BOOKS, ((2 << 20) + rankfold_pager::STAGE as u64, rankfold_pager::BOOKS as u64));
    }

    #[test]
    fn a_tensor_is_a_part_of_the_model() {
        for (tensor, part) in [
            ("model.layers.3.mlp.up_proj", "model.layers.3.mlp"),
            ("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight", "model.layers.12.self_attn"),
            ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm"),
            ("model.embed_tokens.weight", "model.embed_tokens"),
            ("prompt_embeddings", "prompt_embeddings"),
        ] {
            assert_eq!(part_of_the_model(tensor), part);
        }
    }
}
