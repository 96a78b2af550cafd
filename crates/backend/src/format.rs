//! The 4-bit formats: their values, their order, and where one code ends and the next begins.

use std::fmt;
use std::str::FromStr;

/// A 4-bit format: sixteen codes, each a value in [−1, 1] that a block's absmax scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// NormalFloat (Dettmers et al. 2023, QLoRA, §3): quantiles of N(0, 1).
    Nf4,
    /// E2M1 floating point, scaled so that the largest magnitude is 1.
    Fp4,
    /// Fifteen evenly spaced values, code c ∈ 1…15 ↦ (c − 8)/7; code 0 is unused.
    Int4,
}

/// The ascending order of a format's codes and the thresholds between neighbours.
#[derive(Debug)]
pub struct Thresholds {
    /// Codes by ascending value.
    pub codes: Vec<u8>,
    /// `between[i]` is the f32 midpoint of the values of `codes[i]` and `codes[i + 1]`: v takes the upper code
    /// where `v > between[i]`, so a tie takes the lower value.
    pub between: Vec<f32>,
}

/// `golden/codebooks` and the derivation in `rankfold-reference` hold the same bits.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = {
    let magnitude = [0.0, 1.0 / 192.0, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25];
    let mut values = [0.0f32; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = magnitude[i];
        values[i + 8] = if i == 0 { 0.0 } else { -magnitude[i] };
        i += 1;
    }
    values
};

const INT4: [f32; 16] = {
    // Code 0 is never written; it decodes as its neighbour so that no byte is without meaning.
    let mut values = [-1.0f32; 16];
    let mut c = 1;
    while c < 16 {
        values[c] = (c as f32 - 8.0) / 7.0;
        c += 1;
    }
    values
};

impl Format {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Nf4, Self::Fp4, Self::Int4];

    /// The value of each code.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
            Self::Int4 => &INT4,
        }
    }

    /// The code of value 0, which fills zero blocks and pads an odd count.
    pub const fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Fp4 => 0,
            Self::Int4 => 8,
        }
    }

    /// Half the widest gap between neighbouring values: the worst error of an element, as a part of its absmax.
    pub fn worst_error(self) -> f32 {
        let order = self.thresholds();
        let value = |i: usize| self.values()[usize::from(order.codes[i])];
        (1..order.codes.len()).map(|i| (value(i) - value(i - 1)) / 2.0).fold(0.0, f32::max)
    }

    /// The decision rule of the format.
    ///
    /// FP4's two zeros stand apart (code 0, then code 8), so that v in (0, 1/384] is code 8.
    pub fn thresholds(self) -> Thresholds {
        let codes: Vec<u8> = match self {
            Self::Nf4 => (0..16).collect(),
            Self::Fp4 => vec![11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
            Self::Int4 => (1..16).collect(),
        };
        let value = |i: usize| self.values()[usize::from(codes[i])];
        let between = (1..codes.len()).map(|i| (value(i - 1) + value(i)) * 0.5).collect();
        Thresholds { codes, between }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int4 => "int4",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|format| format.to_string() == name)
            .ok_or_else(|| format!("unknown 4-bit format '{name}': expected nf4, fp4 or int4"))
    }
}

/// `n` evenly spaced f32 values from `a` to `b`, in the published tables' own arithmetic: step = (b − a)/(n − 1),
/// the first half counted from `a`, the rest from `b`, each by one fused multiply-add.
pub fn linspace_f32(a: f32, b: f32, n: usize) -> Vec<f32> {
    if n == 1 {
        return vec![a];
    }
    let step = (b - a) / (n - 1) as f32;
    (0..n).map(|i| if i < n / 2 { step.mul_add(i as f32, a) } else { (-step).mul_add((n - 1 - i) as f32, b) }).collect()
}
