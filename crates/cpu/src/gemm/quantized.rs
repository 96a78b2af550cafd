//! Packing 4-bit weights: decoded in registers on their way into a panel, and nowhere else.
//!
//! Element i of the flattened weight is values[code_i] · scale_(i / block). A vector of LANES elements is one lookup
//! and one multiply where its codes start on a byte and share a block: always so where rows are multiples of LANES
//! (blocks are). Otherwise some vectors are put together element by element.

use super::operand::QuantSlice;
use super::pack::{Elements, LINE, MAX_LANES};
use crate::simd::Simd;

/// Reads vectors of a quantised weight.
pub(super) struct Decoder<'a, S: Simd> {
    data: QuantSlice<'a>,
    table: S::Table,
    /// log₂ of the block.
    shift: u32,
}

impl<'a, S: Simd> Decoder<'a, S> {
    /// # Safety
    /// The machine has S.
    #[inline(always)]
    pub(super) unsafe fn new(data: QuantSlice<'a>) -> Self {
        // SAFETY: the caller's.
        Self { data, table: unsafe { S::table(data.format.values()) }, shift: data.block.trailing_zeros() }
    }

    /// A vector that no single lookup gives.
    #[inline(never)]
    fn ragged(&self, first: usize, n: usize) -> [f32; MAX_LANES] {
        let mut elements = [0.0; MAX_LANES];
        for (i, out) in (first..first + n).zip(&mut elements) {
            let byte = self.data.codes[i / 2];
            let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *out = self.data.format.values()[usize::from(code)] * self.data.scales.get(i >> self.shift);
        }
        elements
    }
}

impl<S: Simd> Elements<S> for Decoder<'_, S> {
    #[inline(always)]
    fn run(&self, first: usize) -> usize {
        self.data.block - (first & (self.data.block - 1))
    }

    #[inline(always)]
    unsafe fn factor(&self, first: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::splat(self.data.scales.get(first >> self.shift)) }
    }

    #[inline(always)]
    fn whole(stride: usize) -> bool {
        // Blocks are multiples of LANES.
        stride.is_multiple_of(S::LANES)
    }

    #[inline(always)]
    unsafe fn within(&self, first: usize, factor: S::V) -> S::V {
        // SAFETY: LANES elements from an even one on, LANES / 2 bytes.
        unsafe { S::mul(S::lookup_nibbles(self.table, self.data.codes.as_ptr().add(first / 2)), factor) }
    }

    #[inline(always)]
    fn line() -> usize {
        2 * LINE
    }

    #[inline(always)]
    unsafe fn prefetch(&self, first: usize, n: usize) {
        for i in (first..first + n).step_by(Self::line()) {
            // SAFETY: the caller's.
            unsafe { S::prefetch(self.data.codes.as_ptr().wrapping_add(i / 2)) }
        }
    }

    #[inline(always)]
    unsafe fn vector(&self, first: usize, n: usize) -> S::V {
        let block = first >> self.shift;
        // SAFETY: the elements exist, LANES of them in the first case; MAX_LANES in the second.
        unsafe {
            if n == S::LANES && first.is_multiple_of(2) && (first + n - 1) >> self.shift == block {
                self.within(first, self.factor(first))
            } else {
                S::load(self.ragged(first, n).as_ptr())
            }
        }
    }
}
