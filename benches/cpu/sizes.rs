//! The sizes, and the numbers that fill them.

use crate::dense::draw;
use crate::machine;
use rankfold_backend::{Backend, Buffer, DType, Result};

/// Everything at one size.
pub struct Size {
    pub name: &'static str,
    /// What a kernel touches, about: the limits of memory are measured on so much.
    pub bytes: usize,
    /// Activations.
    pub tokens: usize,
    pub width: usize,
    /// Of attention: sequences, tokens of each, heads, heads of keys, elements of a head.
    pub attention: [usize; 5],
    /// Of a linear layer: [outputs, inputs].
    pub weight: [usize; 2],
    /// Of the embedding and the head.
    pub vocab: usize,
    /// Tokens whose logits there are at once.
    pub chunk: usize,
    /// Of a tensor that is trained, or quantised.
    pub parameters: usize,
}

pub const SIZES: [Size; 3] = [
    Size {
        name: "cache",
        bytes: 256 << 10,
        tokens: 64,
        width: 256,
        attention: [1, 64, 4, 2, 64],
        weight: [256, 256],
        vocab: 512,
        chunk: 64,
        parameters: 256 * 256,
    },
    Size {
        name: "model",
        bytes: 8 << 20,
        tokens: 1024,
        width: 512,
        attention: [4, 256, 8, 4, 64],
        weight: [1408, 512],
        vocab: 8192,
        chunk: 512,
        parameters: 1408 * 512,
    },
    Size {
        name: "memory",
        bytes: machine::MEMORY,
        tokens: 8192,
        width: 2048,
        attention: [1, 2048, 32, 8, 64],
        weight: [8192, 8192],
        vocab: 49152,
        chunk: 1024,
        parameters: 8192 * 2048,
    },
];

impl Size {
    /// Elements of activations.
    pub fn elements(&self) -> usize {
        self.tokens * self.width
    }
}

/// Numbers in [−1, 1), as many as are wanted: a few drawn ones over and over.
pub struct Numbers {
    drawn: Vec<f32>,
}

impl Numbers {
    /// More than a block of any kernel sees.
    const DRAWN: usize = 1 << 20;

    pub fn new() -> Self {
        Self { drawn: draw(Self::DRAWN, 1) }
    }

    /// A buffer of them.
    pub fn f32(&self, b: &dyn Backend, len: usize) -> Result<Buffer> {
        let mut out = b.alloc(DType::F32, len)?;
        let piece = b.upload(&self.drawn[..len.min(Self::DRAWN)])?;
        for begin in (0..len).step_by(Self::DRAWN) {
            let part = Self::DRAWN.min(len - begin);
            b.copy(piece.slice(0, part)?, out.slice_mut(begin, part)?)?;
        }
        Ok(out)
    }

    /// The same in another float type.
    pub fn typed(&self, b: &dyn Backend, dtype: DType, len: usize) -> Result<Buffer> {
        let numbers = self.f32(b, len)?;
        let mut out = b.alloc(dtype, len)?;
        b.cast(numbers.view(), out.view_mut())?;
        Ok(out)
    }
}
