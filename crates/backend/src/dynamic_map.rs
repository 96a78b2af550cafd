//! The dynamic 8-bit maps (Dettmers 2022, "8-bit Optimizers via Block-wise Quantization", §2.1).
//!
//! A signed code has a sign, a decimal exponent i − 6 and a linear fraction: for i = 0 … 6 the 2^i midpoints of
//! linspace(0.1, 1, 2^i + 1) times 10^(i−6), their negatives, and 0 and 1: 256 values. The unsigned map spends the
//! sign's bit on the fraction: 2^(i+1) midpoints.

use crate::format::linspace_f32;
use std::sync::LazyLock;

/// Elements of a block of scales in double quantisation.
pub const NESTED_BLOCK: usize = 256;

/// Which of the two 8-bit maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynamicMap {
    /// For values of both signs: moments, centred scales.
    Signed,
    /// For values that are never negative: second moments.
    Unsigned,
}

impl DynamicMap {
    /// The 256 values in ascending order; a code is an index into them.
    pub fn values(self) -> &'static [f32; 256] {
        static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| derive(DynamicMap::Signed));
        static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| derive(DynamicMap::Unsigned));
        match self {
            Self::Signed => &SIGNED,
            Self::Unsigned => &UNSIGNED,
        }
    }

    /// The most that a number of the map's range is from its nearest value: half the widest gap. The signed map has
    /// no −1, which lies as far below its first value.
    pub fn worst_error(self) -> f32 {
        let values = self.values();
        let below = if self == Self::Signed { values[0] + 1.0 } else { 0.0 };
        values.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(below, f32::max)
    }
}

fn derive(map: DynamicMap) -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for exponent in 0..7 {
        let midpoints = 1 << (exponent + usize::from(map == DynamicMap::Unsigned));
        let edges = linspace_f32(0.1, 1.0, midpoints + 1);
        for pair in edges.windows(2) {
            // The mean in f32, the power of ten rounded to f32 first: the order that gives the published bits.
            let value = (10f64.powi(exponent as i32 - 6) as f32) * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if map == DynamicMap::Signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2·127 signed, 2 + 254 unsigned: 256 values")
}
