//! Which kernel a product with a 4-bit weight is given, by its number of tokens.

/// The most tokens of each kind of product.
///
/// Up to `few`, one launch decodes in registers and is bound by the weight's bytes. Up to `tensor`, in bf16, tensor cores
/// multiply tiles that are decoded as they are needed. Beyond, the weight is decoded once and cuBLASLt multiplies: that
/// moves 2½ bytes a weight more, whatever the number of tokens.
///
/// `benches/cuda.rs` measures all three over the number of tokens; these are the crossovers before any GPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crossover {
    /// Of `kernels/linear_few.cu`, at most 4.
    pub few: usize,
    /// Of `kernels/linear_mma.cu`.
    pub tensor: usize,
}

impl Default for Crossover {
    fn default() -> Self {
        Self { few: 4, tensor: 1024 }
    }
}
