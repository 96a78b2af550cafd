//! Random shapes and values.
//!
//! Shapes are proptest strategies, so that a failing case shrinks to a small one; values are expanded from one seed
//! of the case, since shrinking ten thousand numbers shows nothing.

use crate::{DType, philox};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// One, primes, and the multiples of 8, 16, 32 and 64 with their neighbours: where tiles, lanes and blocks end.
const SIZES: [usize; 44] = [
    1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 61, 63, 64, 65, 79, 80, 81, 97, 127, 128, 129,
    191, 192, 193, 255, 256, 257, 383, 384, 385, 509, 511, 512, 513, 1023, 1025,
];

/// A dimension from 1 to `max`.
pub fn size(max: usize) -> impl Strategy<Value = usize> {
    select(SIZES.iter().copied().filter(|&size| size <= max).collect::<Vec<_>>())
}

/// A dimension from 0 to `max`.
pub fn size_or_zero(max: usize) -> impl Strategy<Value = usize> {
    select([0].into_iter().chain(SIZES.iter().copied().filter(|&size| size <= max)).collect::<Vec<_>>())
}

/// The length of a vector; the longest are what a backend splits over threads.
pub fn length() -> impl Strategy<Value = usize> {
    prop_oneof![4 => size_or_zero(1025), 1 => select(vec![4095, 4096, 4097, 16_411, 65_537])]
}

/// Which values an elementwise kernel is given.
#[derive(Clone, Copy, Debug)]
pub enum Values {
    /// Normal draws.
    Normal,
    /// Normal draws, ±1e18, denormals and zeros of both signs.
    Wide,
    /// Those with NaN and both infinities among them, but none of the huge ones: where they meet an infinity, only
    /// the exponent range of the accumulator decides between infinity and NaN.
    NonFinite,
}

/// Any of the three.
pub fn values() -> impl Strategy<Value = Values> {
    select(vec![Values::Normal, Values::Wide, Values::NonFinite])
}

/// A stream of values from one seed.
pub struct Draw {
    seed: u64,
    position: u64,
}

impl Draw {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    fn word(&mut self) -> u32 {
        self.position += 1;
        philox::word(self.seed, 0, self.position)
    }

    /// A number in 0 … n − 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// `n` random bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.word() as u8).collect()
    }

    /// One draw of N(0, 1) (Box & Muller 1958).
    pub fn gauss(&mut self) -> f64 {
        let [radius, angle] = [self.word(), self.word()].map(|word| (f64::from(word) + 0.5) / 4_294_967_296.0);
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    /// `n` draws of N(0, σ²), one in sixteen of them zero.
    ///
    /// Below 2⁻¹²·σ they are zero as well, so that no product of a few of them is denormal and the bounds of sums of
    /// products need no term for that.
    pub fn normal(&mut self, n: usize, sigma: f64) -> Vec<f32> {
        (0..n)
            .map(|_| {
                let value = self.gauss();
                if value.abs() < 1.0 / 4096.0 || self.once_in(16) { 0.0 } else { (value * sigma) as f32 }
            })
            .collect()
    }

    /// `n` draws at a scale of their own: 2⁻⁴ to 2⁴.
    pub fn scaled(&mut self, n: usize) -> Vec<f32> {
        let sigma = 2f64.powi(self.below(9) as i32 - 4);
        self.normal(n, sigma)
    }

    /// `n` powers of two from 1/4 to 4, of both signs: a product with them is exact in every float type.
    pub fn powers_of_two(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.sign() * 2f32.powi(self.below(5) as i32 - 2)).collect()
    }

    /// `n` numbers of a float type, any finite bit pattern of it as likely as another.
    pub fn finite(&mut self, dtype: DType, n: usize) -> Vec<f32> {
        let mut one = || loop {
            let bits = self.word();
            let value = match dtype {
                DType::F16 => f16::from_bits(bits as u16).to_f32(),
                DType::Bf16 => bf16::from_bits(bits as u16).to_f32(),
                _ => f32::from_bits(bits),
            };
            if value.is_finite() {
                return value;
            }
        };
        (0..n).map(|_| one()).collect()
    }

    /// 1 or −1.
    pub fn sign(&mut self) -> f32 {
        if self.once_in(2) { 1.0 } else { -1.0 }
    }

    /// `n` values of a kind.
    pub fn values(&mut self, kind: Values, n: usize) -> Vec<f32> {
        let odd: &[f32] = match kind {
            Values::Normal => return self.scaled(n),
            Values::Wide => &[0.0, -0.0, 1e18, -1e18, 3e-39, -1e-42, 1e-45, f32::MIN_POSITIVE, 1e-20, -1e10],
            Values::NonFinite => &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40],
        };
        (0..n).map(|_| if self.once_in(3) { odd[self.below(odd.len())] } else { self.gauss() as f32 }).collect()
    }

    /// `n` values that are hard to round to bf16 or to f16: numbers of those types, the midpoints between
    /// neighbours, and the f32 on either side of both.
    pub fn hard_to_round(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| {
                let bits = self.word() as u16;
                let pair = if self.once_in(2) {
                    [bits, bits.wrapping_add(1)].map(|bits| bf16::from_bits(bits).to_f32())
                } else {
                    [bits, bits.wrapping_add(1)].map(|bits| f16::from_bits(bits).to_f32())
                };
                let value = if self.once_in(3) { pair[0] } else { pair[0] / 2.0 + pair[1] / 2.0 };
                match self.below(3) {
                    0 => value,
                    1 => value.next_up(),
                    _ => value.next_down(),
                }
            })
            .collect()
    }
}

/// |x| of every element.
pub fn abs(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| value.abs()).collect()
}
