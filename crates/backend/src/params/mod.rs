//! The kernels' parameters: named dimensions, and the checks that every backend runs first.
//!
//! A check looks at lengths only; element types are the backend's own business.

mod activation;
mod adamw;
mod attention;
mod dropout;
mod hard_concrete;
mod importance;
mod products;
mod rms_norm;
mod rope;
mod rows;
mod tokens;

pub use activation::Activation;
pub use adamw::{AdamW, MOMENT_BLOCK, Moment};
pub use attention::{Attention, AttentionGrads, AttentionSaved};
pub use dropout::Dropout;
pub use hard_concrete::HardConcrete;
pub use importance::{Importance, Triplets};
pub use products::{Layout, Linear, LinearGrads, LowRank, MatMul, Weight};
pub use rms_norm::RmsNorm;
pub use rope::Rope;
pub use rows::Rows;
pub use tokens::{CrossEntropy, Embedding, IGNORED};

use crate::{Error, Result};

/// In which precision the inputs of a product are taken. Sums are the backend's accumulators in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Inputs as they are.
    F32,
    /// Both inputs rounded to bf16 (nearest even), as QLoRA's compute type means it.
    Bf16,
}

/// The product of dimensions; what does not fit comes out as a length that no view has, `usize::MAX`.
pub fn elements(dimensions: &[usize]) -> usize {
    match dimensions.contains(&0) {
        true => 0,
        false => dimensions.iter().fold(1, |product: usize, n| product.saturating_mul(*n)),
    }
}

/// That a view of `kernel` has the expected number of elements.
pub fn expect(kernel: &'static str, tensor: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { kernel, tensor, expected, found }) }
}

/// [`expect`] of a view that may be absent.
pub fn expect_some(kernel: &'static str, tensor: &'static str, found: Option<usize>, expected: usize) -> Result<()> {
    found.map_or(Ok(()), |found| expect(kernel, tensor, found, expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_that_does_not_fit_is_no_length() {
        // 3 · this wraps to 2.
        assert_eq!(elements(&[3, usize::MAX / 3 + 1]), usize::MAX);
        assert_eq!(elements(&[usize::MAX, 2, 0]), 0);
        assert_eq!(elements(&[5, 7, 2]), 70);
        assert_eq!(elements(&[]), 1);
    }
}
