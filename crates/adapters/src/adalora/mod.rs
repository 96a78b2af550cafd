//! AdaLoRA (Zhang et al. 2023): a budget of triplets, spent where they are worth most.
//!
//! An update is B E A, E diagonal: triplet i is column i of B, E_i, and row i of A. After each step every triplet gets
//! a score ([`Allocator`]); every so many steps those that the budget of the step ([`AdaLora::budget`]) does not reach
//! are masked, which sets their E_i to zero; and [`orthogonality`] keeps the triplets of a factor apart.
//!
//! Masking is momentary: between two of them the optimiser revives what it still has a gradient for. With
//! [`Prune::Mask`], PEFT's arithmetic, that goes on to the last masking, whose choice stands; every tensor keeps its
//! size until the run's end. With [`Prune::Shrink`] triplets really go ([`Cut`]): all that the last masking chose, at
//! once, and before it those that were masked without a break for so long that their score has forgotten them.
//!
//! - `schedule`, `fields`: the hyper-parameters and the budget, and their names in PEFT's configuration;
//! - `sensitivity`: what an element is worth;
//! - `allocator`: scores, masks, and when a triplet goes;
//! - `cut`: smaller tensors of larger ones.

mod allocator;
mod cut;
mod fields;
mod schedule;
mod sensitivity;

pub use allocator::{Allocation, Allocator, AllocatorRecord};
pub use cut::{Cut, Gather};
pub use schedule::{AdaLora, Budget, Prune};

use crate::lora::Part;
use crate::{Linear, Result};
use rankfold_autograd::{Tape, Tensor};
use rankfold_backend::params::Triplets;

/// The mean of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F, or their squares, over the triplets of every layer that has some, with
/// its value; `None` where no layer has.
pub fn orthogonality<'a>(
    tape: &Tape,
    layers: impl IntoIterator<Item = &'a Linear>,
    squared: bool,
) -> Result<Option<(Tensor, f64)>> {
    let mut matrices = Vec::new();
    for lora in layers.into_iter().filter_map(Linear::adapter) {
        if let Part::Triplets { .. } = lora.part() {
            matrices.push((lora.a().tensor(), Triplets::Rows));
            matrices.push((lora.b().tensor(), Triplets::Columns));
        }
    }
    match matrices.is_empty() {
        true => Ok(None),
        false => Ok(Some(tape.orthogonality(&matrices, squared)?)),
    }
}
