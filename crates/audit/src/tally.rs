//! Errors summed up: w against ŵ, weight by weight.
//!
//! With e = ŵ − w, formed in f64 where it is exact to a rounding: mean and largest |e|, mean |e|/(|w| + 10⁻⁸),
//! √(mean e²), the signal-to-noise ratio 10·log₁₀(Σw²/Σe²), how often each code is used, and the weight with the
//! largest |e| (the first of equals) with its bound. Sums are f64, chunk by chunk: 65536 terms of one sign and
//! then the chunks are off by less than 2⁻³⁵ of themselves for any tensor below 2³² weights.

use crate::certificate::Bound;
use crate::chunks;
use rankfold_backend::Format;

/// What keeps a relative error finite at w = 0; bitsandbytes' own tests use the same.
const RELATIVE_FLOOR: f64 = 1e-8;

/// Sums over the weights of a tensor, or of many.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    /// Weights.
    pub count: u64,
    /// Σ |e|
    pub sum_error: f64,
    /// Σ |e| / (|w| + 10⁻⁸)
    pub sum_relative: f64,
    /// Σ e²
    pub sum_square: f64,
    /// Σ w²
    pub sum_signal: f64,
    /// The largest part of its bound that any weight's error takes; above 1 the bound is broken.
    pub bound_used: f64,
    /// How many weights have each code.
    pub codes: [u64; 16],
    /// The weight with the largest error.
    pub worst: Option<Element>,
}

/// One weight and what became of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Element {
    /// Its place in the flattened tensor.
    pub index: usize,
    /// The weight.
    pub w: f32,
    /// What its code stands for.
    pub decoded: f32,
    /// decoded − w
    pub error: f64,
    /// What |error| cannot pass.
    pub bound: f64,
}

/// A tensor and its quantised self, flattened.
#[derive(Clone, Copy, Debug)]
pub struct Compared<'a> {
    /// What the codes mean.
    pub format: Format,
    /// Weights a block.
    pub block: usize,
    /// The weights.
    pub w: &'a [f32],
    /// What their codes stand for.
    pub decoded: &'a [f32],
    /// Two codes a byte, the first in the high nibble.
    pub codes: &'a [u8],
    /// A bound a block.
    pub bounds: &'a [Bound],
}

impl Tally {
    /// Over all weights of a tensor.
    pub fn of(compared: &Compared, threads: usize) -> Self {
        let parts = chunks::map(threads, compared.w.len(), |range| {
            let mut part = Self::default();
            for start in range.clone().step_by(compared.block) {
                part.add_block(compared, start, range.end.min(start + compared.block));
            }
            part
        });
        let mut total = Self::default();
        parts.iter().for_each(|part| total.add(part));
        total
    }

    /// The weights from `start` to `end`, which are of one block.
    fn add_block(&mut self, compared: &Compared, start: usize, end: usize) {
        let bound = compared.bounds[start / compared.block];
        let values = compared.format.values().map(|value| bound.of(value.into()));
        for index in start..end {
            let (w, decoded) = (compared.w[index], compared.decoded[index]);
            let code = usize::from((compared.codes[index / 2] >> (4 * (1 - index % 2))) & 15);
            let error = f64::from(decoded) - f64::from(w);
            let size = error.abs();
            self.sum_error += size;
            self.sum_relative += size / (f64::from(w).abs() + RELATIVE_FLOOR);
            self.sum_square += error * error;
            self.sum_signal += f64::from(w) * f64::from(w);
            self.codes[code] += 1;
            if size > 0.0 {
                self.bound_used = self.bound_used.max(size / values[code]);
            }
            if self.worst.is_none_or(|worst| size > worst.error.abs()) {
                self.worst = Some(Element { index, w, decoded, error, bound: values[code] });
            }
        }
        self.count += (end - start) as u64;
    }

    /// Of this and of another. The worst of equals is this one's; its index stays that of its own tensor.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_error += other.sum_error;
        self.sum_relative += other.sum_relative;
        self.sum_square += other.sum_square;
        self.sum_signal += other.sum_signal;
        self.bound_used = self.bound_used.max(other.bound_used);
        self.codes.iter_mut().zip(other.codes).for_each(|(count, more)| *count += more);
        if let Some(theirs) = other.worst
            && self.worst.is_none_or(|ours| theirs.error.abs() > ours.error.abs())
        {
            self.worst = Some(theirs);
        }
    }

    /// 10·log₁₀(Σw²/Σe²); none where the error or the signal is zero.
    pub fn snr_db(&self) -> Option<f64> {
        (self.sum_square > 0.0 && self.sum_signal > 0.0).then(|| 10.0 * (self.sum_signal / self.sum_square).log10())
    }

    /// −Σ p log₂ p over the codes, in bits: 4 where all sixteen are used alike.
    pub fn code_entropy(&self) -> f64 {
        let used = self.codes.iter().filter(|&&count| count > 0);
        let entropy: f64 = used.map(|&count| count as f64 / self.count as f64).map(|p| p * p.log2()).sum();
        // One code alone gives −0.
        entropy.abs()
    }
}
