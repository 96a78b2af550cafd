//! What memory a run will take, before the run: from the configuration alone, for a model of any shape.
//!
//! The plan is not a second description of the step, which would drift from the first. It **is** the step: the model
//! is built without values on a backend that counts and computes nothing, and one optimiser step and one evaluation go
//! through the very code that a run goes through. What that code allocates, keeps for backward and frees is what is
//! counted, a buffer at a time. So a block of width w, heads of q and kv columns, f columns of feed-forward and t
//! tokens is found to save, in f32,
//!
//! ```text
//! h before attention, h before the feed-forward, both norms' outputs    4 t w     (h is shared: a sum's output is the
//!                                                                                  next norm's input)
//! q and k after the rotation, v, attention's output                     t (2 q + 2 kv)
//! gate and up, from which their product is made again                   2 t f
//! 1/ρ of both norms, the log-sum-exp of every head                      2 t + t heads
//! ```
//!
//! and with checkpointing t w, its input; in bf16 half of either but for the last line (`tests/suite/plan.rs` holds the
//! counting to this, and to what the CPU backend then takes, to the byte).
//!
//! In reading order: [`Setup`], what a run is to its memory; [`Plan`], what was found; `replay.rs`, the step that is
//! counted; `counting.rs`, the backend; `ledger.rs`, its record; `account.rs`, peaks from the record, with the CPU
//! backend's habits, `pool.rs` and `scratch.rs`; [`paging`], what leaves under a limit.

mod account;
mod counting;
mod ledger;
pub mod paging;
mod pool;
mod replay;
mod scratch;
mod setup;
#[cfg(test)]
mod tests;

pub use paging::{Floor, PAGES, Paging, RESERVE};
pub use setup::{Machine, Setup, Stored};

use crate::Result;
use account::Account;
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::ops::{Index, IndexMut};

/// Bytes a parameter of full finetuning in 16 bits as the QLoRA paper counts it (Dettmers et al. 2023, §1: more than
/// 780 GB for 65 billion): weight and gradient in bf16, two moments in f32. Activations are not in it.
const PAPER_BYTES: u64 = 2 + 2 + 4 + 4;

/// What takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Category {
    /// The program itself, its data and tokenizer.
    Program,
    /// 4-bit codes of frozen weights.
    Codes,
    /// Their scales.
    Scales,
    /// Frozen weights as the file has them: embedding, head, norms, layers that are not quantised.
    Dense,
    /// Weights that are trained.
    Weights,
    /// Adapters.
    Adapters,
    /// Gradients of all that is trained.
    Gradients,
    /// The optimiser's moments.
    Optimizer,
    /// What forward saves for backward.
    Saved,
    /// The head: a chunk of logits, and dx, which is formed in forward.
    Head,
    /// What lives and dies within a pass: gradients between layers and, with checkpointing, a layer's activations.
    Working,
    /// The batch and the rotary tables.
    Batch,
    /// The kernels' own working memory.
    Scratch,
    /// Freed, and kept for the next allocation.
    Pool,
}

impl Category {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 14] = [
        Self::Program,
        Self::Codes,
        Self::Scales,
        Self::Dense,
        Self::Weights,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::Saved,
        Self::Head,
        Self::Working,
        Self::Batch,
        Self::Scratch,
        Self::Pool,
    ];

    /// As a table's row is called.
    pub fn title(self) -> &'static str {
        match self {
            Self::Program => "program, tokenizer, data",
            Self::Codes => "frozen: 4-bit codes",
            Self::Scales => "frozen: their scales",
            Self::Dense => "frozen: dense",
            Self::Weights => "trained weights",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimiser states",
            Self::Saved => "activations saved",
            Self::Head => "head: logits and dx",
            Self::Working => "working set of a layer",
            Self::Batch => "batch, rotary tables",
            Self::Scratch => "kernels' scratch",
            Self::Pool => "freed, kept for reuse",
        }
    }
}

/// Bytes by category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([u64; Category::ALL.len()]);

impl Bytes {
    /// All of it.
    pub fn sum(&self) -> u64 {
        self.0.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

impl Index<Category> for Bytes {
    type Output = u64;
    fn index(&self, category: Category) -> &u64 {
        &self.0[category as usize]
    }
}

impl IndexMut<Category> for Bytes {
    fn index_mut(&mut self, category: Category) -> &mut u64 {
        &mut self.0[category as usize]
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(Category::ALL.len() + 1))?;
        for category in Category::ALL {
            map.serialize_entry(&category, &self[category])?;
        }
        map.serialize_entry("sum", &self.sum())?;
        map.end()
    }
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Weights are read and quantised, adapters and moments made.
    Load,
    /// From tokens to the loss.
    Forward,
    /// Back.
    Backward,
    /// The optimiser's step.
    Update,
    /// A held-out loss.
    Evaluation,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::Load, Self::Forward, Self::Backward, Self::Update, Self::Evaluation];

    /// As a table's row is called.
    pub fn title(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Update => "update",
            Self::Evaluation => "evaluation",
        }
    }
}

/// The most that a phase takes.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Peak {
    /// Which.
    pub phase: Phase,
    /// What takes it when most is in use; beside that, what the pool has kept at its most.
    pub bytes: Bytes,
    /// What of it could be paged: buffers of at least a page, the least that there is.
    pub pageable: Bytes,
}

impl Peak {
    /// All of it but what is kept for reuse.
    pub fn in_use(&self) -> u64 {
        self.bytes.sum() - self.bytes[Category::Pool]
    }
}

/// Numbers in the model and its adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Parameters {
    /// Of the model without adapters, a tied head counted once.
    pub model: u64,
    /// Trained.
    pub trained: u64,
    /// Frozen.
    pub frozen: u64,
}

/// What memory a run takes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Plan {
    /// Parameters.
    pub parameters: Parameters,
    /// Whether a layer's activations are computed again in backward.
    pub checkpointing: bool,
    /// The largest moment of each phase.
    pub phases: Vec<Peak>,
    /// Full 16-bit finetuning of the model as the QLoRA paper counts it: 12 bytes a parameter, activations aside.
    pub full_16_bit_of_the_paper: u64,
    /// What the least memory limit must leave in memory.
    pub floor: Floor,
    /// The same run with pages of every size that serves it, the least first.
    #[serde(skip)]
    accounts: Vec<Account>,
}

impl Plan {
    /// Count a run.
    ///
    /// Errors: targets that match no layer, or hyper-parameters out of range; a 4-bit checkpoint that is to be trained
    /// whole; more tokens in a micro-batch than [`setup`](Setup) allows; more memory than can be counted.
    pub fn of(setup: &Setup) -> Result<Self> {
        setup.check()?;
        let replayed = replay::replay(setup)?;
        let accounts = (0..PAGES.len()).map(|size| account::account(&replayed.record, &setup.machine, size));
        let accounts = paging::usable(accounts.collect());
        let model = setup.config.parameters() as u64;
        let adapters = replayed.attached.as_ref().map_or(0, |attached| attached.parameters) as u64;
        let trained = replayed.trained as u64;
        Ok(Self {
            parameters: Parameters { model, trained, frozen: model + adapters - trained },
            checkpointing: setup.checkpointing,
            phases: accounts[0].phases.clone(),
            full_16_bit_of_the_paper: model.saturating_mul(PAPER_BYTES),
            floor: paging::least(&accounts).clone(),
            accounts,
        })
    }

    /// The run's peak: the largest phase's, and of several that are as large (the pool keeps what was freed) that of
    /// the one that uses most.
    pub fn peak(&self) -> &Peak {
        self.accounts[0].peak()
    }

    /// The most that a phase has in use; 0 where the run has no such phase.
    pub fn in_use(&self, phase: Phase) -> u64 {
        self.phases.iter().find(|peak| peak.phase == phase).map_or(0, Peak::in_use)
    }

    /// What stays in use at the peak while the optimiser's states are paged out.
    pub fn without_optimizer(&self) -> u64 {
        self.peak().in_use() - self.peak().pageable[Category::Optimizer]
    }
}
