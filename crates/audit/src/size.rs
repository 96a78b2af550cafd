//! Bits a parameter: what is stored, and how much of it is rounding up.
//!
//! Nominal: 4 + 32/block with plain scales, 4 + 8/block + 32/(256·block) with double quantisation. Stored is a little
//! more: an odd count pads half a byte, a short last block and a short last group of 256 scales each cost a whole
//! scale, and double quantisation keeps one offset (32 bits) a tensor.

use rankfold_backend::NESTED_BLOCK;
use serde::{Deserialize, Serialize};

/// Bits of one or of several quantised tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Weights.
    pub parameters: u64,
    /// All bits stored: codes, scales, offsets.
    pub bits: u64,
    /// Of those, the offsets of double quantisation.
    pub offset_bits: u64,
    /// Of those, what odd counts, short last blocks and short last groups of scales add to the nominal size.
    pub padding_bits: f64,
    /// The format's own figure, padding and offsets aside.
    pub nominal_bits_per_parameter: f64,
    /// `bits` a parameter.
    pub bits_per_parameter: f64,
}

impl Size {
    /// Of one tensor of `elements`.
    pub fn of(elements: usize, block: usize, double: bool) -> Self {
        let blocks = elements.div_ceil(block) as u64;
        let (scales, offset) = match double {
            false => (32 * blocks, 0),
            true => (8 * blocks + 32 * blocks.div_ceil(NESTED_BLOCK as u64), 32),
        };
        let bits = 8 * elements.div_ceil(2) as u64 + scales + offset;
        Self::new(elements as u64, bits, offset, nominal(block, double))
    }

    /// Of this and of another tensor, quantised alike.
    pub fn plus(&self, other: &Self) -> Self {
        let parameters = self.parameters + other.parameters;
        let offsets = self.offset_bits + other.offset_bits;
        Self::new(parameters, self.bits + other.bits, offsets, self.nominal_bits_per_parameter)
    }

    fn new(parameters: u64, bits: u64, offset_bits: u64, nominal: f64) -> Self {
        Self {
            parameters,
            bits,
            offset_bits,
            padding_bits: (bits - offset_bits) as f64 - nominal * parameters as f64,
            nominal_bits_per_parameter: nominal,
            bits_per_parameter: bits as f64 / parameters as f64,
        }
    }
}

/// Bits a parameter where nothing is rounded up.
fn nominal(block: usize, double: bool) -> f64 {
    let block = block as f64;
    if double { 4.0 + 8.0 / block + 32.0 / (block * NESTED_BLOCK as f64) } else { 4.0 + 32.0 / block }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_tensor_takes_the_nominal_bits_and_its_offset() {
        let double = Size::of(1024 * 1024, 64, true);
        assert_eq!(double.nominal_bits_per_parameter, 4.126953125);
        assert_eq!((double.bits - 32, double.offset_bits), (4_327_424, 32)); // 4.126953125 · 2²⁰
        assert_eq!(double.padding_bits, 0.0);
        assert_eq!(Size::of(1024 * 1024, 64, false).bits_per_parameter, 4.5);
    }

    #[test]
    fn what_is_rounded_up_is_stated() {
        // 65 weights: 33 bytes of codes, two blocks of 64 and their two scales.
        let size = Size::of(65, 64, false);
        assert_eq!((size.bits, size.padding_bits), (33 * 8 + 64, 328.0 - 4.5 * 65.0));
        let two = size.plus(&Size::of(63, 64, false));
        assert_eq!((two.parameters, two.bits, two.padding_bits), (128, 328 + 32 * 8 + 32, 616.0 - 4.5 * 128.0));
    }
}
