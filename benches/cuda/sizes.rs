//! What is measured: on a GPU, and on the host in its place, where it only has to run.

use half::bf16;
use rankfold_backend::{Backend, Buffer, DType, Result, philox};
use std::time::Duration;

/// Problem sizes, and how long each is measured.
pub struct Sizes {
    /// Of the copy that the others are compared with.
    pub copy_bytes: usize,
    /// Sides of the dense products that are the limit of operations; the last counts.
    pub sides: &'static [usize],
    /// Elements of what is quantised.
    pub elements: &'static [usize],
    /// [outputs, inputs] of the weights in 4 bits.
    pub weights: &'static [[usize; 2]],
    /// Rows of a product.
    pub tokens: &'static [usize],
    /// Bytes of weights that calls take in turn: more than a cache holds.
    pub turns_bytes: usize,
    /// Queries and keys of attention, and its heads, each of so many elements.
    pub positions: usize,
    pub heads: usize,
    pub head_dims: &'static [usize],
    /// Elements of the kernels that go through them one by one, and of a row of theirs.
    pub stream: usize,
    pub width: usize,
    /// [rows, vocabulary] of the logits.
    pub logits: [usize; 2],
    /// Rounds, and the time of each; of no time, a single call.
    pub rounds: usize,
    pub round: Duration,
}

impl Sizes {
    /// Those of models of 7 billion parameters; streams of 256 MiB, several times any cache.
    pub fn gpu() -> Self {
        Self {
            copy_bytes: 1 << 30,
            sides: &[4096, 8192],
            elements: &[64 << 20, 256 << 20],
            weights: &[[4096, 4096], [11008, 4096]],
            tokens: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
            turns_bytes: 256 << 20,
            positions: 2048,
            heads: 32,
            head_dims: &[64, 128],
            stream: 64 << 20,
            width: 4096,
            logits: [2048, 32000],
            rounds: 7,
            round: Duration::from_millis(5),
        }
    }

    /// So small that the host's fibres go through all of it in seconds.
    pub fn host() -> Self {
        Self {
            copy_bytes: 1 << 16,
            sides: &[64],
            elements: &[1 << 12],
            weights: &[[96, 64]],
            tokens: &[1, 4, 20],
            turns_bytes: 1 << 13,
            positions: 40,
            heads: 2,
            head_dims: &[64],
            stream: 1 << 12,
            width: 64,
            logits: [4, 500],
            rounds: 3,
            round: Duration::ZERO,
        }
    }
}

/// Numbers in [−1, 1), as many as are wanted: a few drawn ones over and over.
///
/// Zeros would not do: a device that has nothing to switch runs faster.
pub struct Numbers {
    drawn: Vec<f32>,
}

impl Numbers {
    /// More than a block of any kernel sees.
    const DRAWN: u64 = 1 << 20;

    pub fn new() -> Self {
        Self { drawn: (0..Self::DRAWN).map(|i| 2.0 * philox::unit(philox::word(1, 0, i)) - 1.0).collect() }
    }

    /// The drawn ones' bytes in f32 or bf16.
    pub fn bytes(&self, dtype: DType) -> Vec<u8> {
        match dtype {
            DType::Bf16 => self.drawn.iter().flat_map(|x| bf16::from_f32(*x).to_ne_bytes()).collect(),
            _ => bytemuck::cast_slice(&self.drawn).to_vec(),
        }
    }

    /// A buffer of them, beginning with the `from`-th.
    pub fn f32(&self, b: &dyn Backend, len: usize, from: usize) -> Result<Buffer> {
        let mut out = b.alloc(DType::F32, len)?;
        let piece = len.min(self.drawn.len());
        let turned: Vec<f32> = self.drawn.iter().cycle().skip(from % self.drawn.len()).take(piece).copied().collect();
        let piece = b.upload(&turned)?;
        for begin in (0..len).step_by(turned.len().max(1)) {
            let part = turned.len().min(len - begin);
            b.copy(piece.slice(0, part)?, out.slice_mut(begin, part)?)?;
        }
        Ok(out)
    }

    /// The same in another float type.
    pub fn typed(&self, b: &dyn Backend, dtype: DType, len: usize, from: usize) -> Result<Buffer> {
        let numbers = self.f32(b, len, from)?;
        let mut out = b.alloc(dtype, len)?;
        b.cast(numbers.view(), out.view_mut())?;
        Ok(out)
    }
}

/// 67108864 as "64 Mi".
pub fn count(n: usize) -> String {
    if n.is_multiple_of(1 << 20) { format!("{} Mi", n >> 20) } else { n.to_string() }
}
