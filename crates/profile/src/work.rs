//! What a call must do: floating-point operations of the contract's formula, and bytes of its operands.
//!
//! An addition, a multiplication, a division, a root, an exponential are one operation each, whatever they cost. Every
//! operand is read once and every result written once; what is added to is both. So a kernel that reads anything twice
//! is seen to be slow, and one whose operands were in a cache to be faster than memory.

use rankfold_backend::params::Moment;
use rankfold_backend::{Compute, LowRank, Quantized, View, ViewMut, Weight};

/// The work of one call, or of several together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Work {
    pub flops: f64,
    pub bytes: f64,
    /// What the inputs of its products are rounded to.
    pub compute: Compute,
}

impl Work {
    /// So many operations in f32, on operands that are read and that are written.
    pub fn new(flops: f64, read: &[&dyn Operand], written: &[&dyn Operand]) -> Self {
        let bytes = read.iter().chain(written).fold(0.0, |sum, operand| sum + operand.size());
        Self { flops, bytes, compute: Compute::F32 }
    }

    /// So many operations for each element of a result.
    pub fn each(flops: f64, result: &ViewMut, read: &[&dyn Operand], written: &[&dyn Operand]) -> Self {
        Self::new(flops * count(result.len()), read, written)
    }

    /// The same, of products in `compute`.
    pub fn of(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }
}

/// A dimension or a length. Parameters of a call that its backend will refuse may be any: as f64 no product of them
/// overflows.
pub(crate) fn count(n: usize) -> f64 {
    n as f64
}

/// Something that a kernel reads or writes.
pub(crate) trait Operand {
    /// Bytes of it.
    fn size(&self) -> f64;
}

impl Operand for View<'_> {
    fn size(&self) -> f64 {
        count(self.len() * self.dtype().size())
    }
}

impl Operand for ViewMut<'_> {
    fn size(&self) -> f64 {
        self.as_view().size()
    }
}

/// Codes and scales.
impl Operand for Quantized {
    fn size(&self) -> f64 {
        count(self.bytes())
    }
}

impl Operand for Weight<'_> {
    fn size(&self) -> f64 {
        match self {
            Weight::Dense(w) => w.size(),
            Weight::Quantized(q) => q.size(),
        }
    }
}

impl Operand for LowRank<'_> {
    fn size(&self) -> f64 {
        self.a.size() + self.b.size() + self.per_rank.size() + self.row_scale.size()
    }
}

impl Operand for Moment<'_> {
    fn size(&self) -> f64 {
        self.codes.size() + self.absmax.size()
    }
}

/// The host's.
impl Operand for [u8] {
    fn size(&self) -> f64 {
        count(self.len())
    }
}

impl<T: Operand + ?Sized> Operand for &T {
    fn size(&self) -> f64 {
        (**self).size()
    }
}

/// What is not there has no bytes.
impl<T: Operand> Operand for Option<T> {
    fn size(&self) -> f64 {
        self.as_ref().map_or(0.0, T::size)
    }
}
