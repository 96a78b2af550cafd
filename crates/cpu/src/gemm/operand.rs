//! What a product reads: an f32 matrix on the left, any stored weight on the right.
//!
//! Both are slices of the whole matrix, stored row-major with no gaps, and a flag that says whether the product sees
//! it as it is stored or transposed.

use crate::quantize4::ScaleSlice;
use crate::slices::Floats;
use rankfold_backend::Format;

/// A weight's elements, row-major [outputs, inputs].
#[derive(Clone, Copy, Debug)]
pub(crate) enum WeightSlice<'a> {
    /// f32, bf16 or f16.
    Dense(Floats<'a>),
    /// 4 bits.
    Quantized(QuantSlice<'a>),
}

/// [`rankfold_backend::Quantized`], already checked, as slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantSlice<'a> {
    /// Two codes a byte, the first in the high nibble.
    pub codes: &'a [u8],
    /// One scale a block.
    pub scales: ScaleSlice<'a>,
    /// What the codes mean.
    pub format: Format,
    /// Elements a block of the flattened matrix: a power of two from 32 to 4096.
    pub block: usize,
}

/// The left operand [m, k]: activations, gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<'a> {
    pub(super) data: &'a [f32],
    /// Elements from one stored row to the next.
    pub(super) stride: usize,
    /// Stored as [k, m].
    pub(super) transposed: bool,
    /// Its panels, where they were packed before: see [`super::Gemm::with_left`].
    pub(super) panels: Option<&'a [f32]>,
}

impl<'a> Left<'a> {
    /// Stored as [m, k].
    pub(crate) fn rows(data: &'a [f32], k: usize) -> Self {
        Self { data, stride: k, transposed: false, panels: None }
    }

    /// Stored as [k, m].
    pub(crate) fn transposed(data: &'a [f32], m: usize) -> Self {
        Self { data, stride: m, transposed: true, panels: None }
    }
}

/// The right operand [k, n]: a weight, or whatever else the left one is multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right<'a> {
    pub(super) data: WeightSlice<'a>,
    /// Elements from one stored row to the next.
    pub(super) stride: usize,
    /// Stored as [n, k].
    pub(super) transposed: bool,
}

impl<'a> Right<'a> {
    /// Stored as [k, n].
    pub(crate) fn rows(data: WeightSlice<'a>, n: usize) -> Self {
        Self { data, stride: n, transposed: false }
    }

    /// Stored as [n, k].
    pub(crate) fn transposed(data: WeightSlice<'a>, k: usize) -> Self {
        Self { data, stride: k, transposed: true }
    }
}

impl<'a> From<&'a [f32]> for WeightSlice<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::Dense(Floats::F32(data))
    }
}

/// One product of a sum of products: left [m, k] · right [k, n].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term<'a> {
    /// [m, k]
    pub left: Left<'a>,
    /// [k, n]
    pub right: Right<'a>,
    /// The length of the sums.
    pub k: usize,
}

impl Term<'_> {
    /// That the operands are as long as their dimensions say: what the packing's pointers rely on.
    pub(super) fn assert_lengths(&self, m: usize, n: usize) {
        assert_eq!(self.left.data.len(), m * self.k, "the left operand");
        assert_eq!(self.left.stride, if self.left.transposed { m } else { self.k }, "the left operand's rows");
        assert_eq!(self.right.stride, if self.right.transposed { self.k } else { n }, "the right operand's rows");
        let elements = n * self.k;
        match self.right.data {
            WeightSlice::Dense(Floats::F32(data)) => assert_eq!(data.len(), elements, "the right operand"),
            WeightSlice::Dense(Floats::Bf16(data)) => assert_eq!(data.len(), elements, "the right operand"),
            WeightSlice::Dense(Floats::F16(data)) => assert_eq!(data.len(), elements, "the right operand"),
            WeightSlice::Quantized(q) => {
                assert_eq!(q.codes.len(), elements.div_ceil(2), "the right operand's codes");
                assert!(q.block.is_power_of_two() && q.block >= 32, "the right operand's block");
            }
        }
    }
}
