//! The pieces of work, and their sizes.

pub use crate::llama::{Failure, Step};
use crate::{model, optimiser, weights};
use rankfold_backend::{Backend, philox};
use rankfold_trainer::optimizer::Moments;
use std::sync::Arc;

/// The work with all its buffers on a backend.
pub type Make = Box<dyn Fn(Arc<dyn Backend>) -> Result<Step, Failure>>;

/// A piece of work.
pub struct Work {
    pub name: &'static str,
    pub make: Make,
}

/// How large everything is.
pub struct Sizes {
    /// Bytes of the file when the disk is measured.
    pub disk: usize,
    /// What may be in memory, over all bytes.
    pub shares: &'static [f64],
    /// Steps before those that count.
    pub warm_up: usize,
    /// Fewest and most rounds, and seconds after which there are enough.
    pub rounds: (usize, usize, f64),
    /// The same of the steps of a round, with a pager and without.
    pub steps: (usize, usize, f64),
    /// Tensors of the optimiser's, and elements of each.
    pub tensors: [usize; 2],
    /// Layers and width of a stack with weights in f32, and of one with weights in 4 bits.
    pub stacks: [[usize; 2]; 2],
    /// Few tokens and many.
    pub tokens: [usize; 2],
    /// Vocabulary, width, layers, heads, heads of keys, feed-forward of the model.
    pub model: [usize; 6],
    /// Rows of its batch, and tokens of a row.
    pub batch: [usize; 2],
}

impl Sizes {
    pub fn whole() -> Self {
        Self {
            disk: 512 << 20,
            shares: &[1.5, 1.0, 0.75, 0.5, 0.25, 0.1],
            warm_up: 3,
            rounds: (3, 7, 4.0),
            steps: (1, 5, 0.3),
            tensors: [16, 1 << 20],
            stacks: [[32, 1024], [24, 2048]],
            tokens: [64, 1024],
            model: [2048, 512, 6, 8, 8, 1408],
            batch: [2, 256],
        }
    }

    pub fn quick() -> Self {
        Self {
            disk: 16 << 20,
            shares: &[1.5, 0.5],
            warm_up: 2,
            rounds: (1, 2, 0.1),
            steps: (1, 2, 0.1),
            tensors: [8, 1 << 18],
            stacks: [[8, 512], [8, 1024]],
            tokens: [16, 64],
            model: [256, 256, 2, 4, 4, 704],
            batch: [1, 64],
        }
    }
}

/// What is measured, in its order.
pub fn all(sizes: &Sizes) -> Vec<Work> {
    let [dense, coded] = sizes.stacks;
    let [few, many] = sizes.tokens;
    let ([tensors, elements], model, batch) = (sizes.tensors, sizes.model, sizes.batch);
    let work = |name, make: Make| Work { name, make };
    vec![
        work("optimiser, 32 bits", Box::new(move |b| optimiser::make(b, Moments::F32, tensors, elements))),
        work("optimiser, 8 bits", Box::new(move |b| optimiser::make(b, Moments::Blockwise8, tensors, elements))),
        work("weights f32, few tokens", Box::new(move |b| weights::make(b, false, dense, few))),
        work("weights f32, many tokens", Box::new(move |b| weights::make(b, false, dense, many))),
        work("weights nf4, few tokens", Box::new(move |b| weights::make(b, true, coded, few))),
        work("weights nf4, many tokens", Box::new(move |b| weights::make(b, true, coded, many))),
        work("llama, full finetuning", Box::new(move |b| model::make(b, model, batch))),
    ]
}

/// `n` numbers in [−scale, scale).
pub fn draw(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| scale * (2.0 * philox::unit(philox::word(seed, 0, i)) - 1.0)).collect()
}
