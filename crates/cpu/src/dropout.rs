//! Dropout (Srivastava et al. 2014), inverted: y_i = x_i / (1 − p) where kept, 0 where dropped.
//!
//! Element i is kept where the Philox word at position i of the stream is at least p·2³². The generator makes four
//! words from one counter; here [`GROUPS`] counters go through the ten rounds side by side, each word in a 64-bit
//! lane, so that the compiler finds the 32 × 32 → 64-bit multiplication of every instruction set.

use crate::elementwise::CHUNK;
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Dropout;

/// Counters in flight: 32 words.
pub(crate) const GROUPS: usize = 8;

const LOW: u64 = 0xFFFF_FFFF;

/// y = dropout(x), elements numbered from 0.
pub(crate) fn dropout(threads: &Threads, isa: Isa, p: &Dropout, x: &[f32], y: &mut [f32]) {
    let (len, y) = (y.len(), Disjoint::new(y));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Drop { p, start: range.start, x: &x[range.clone()], y: unsafe { y.get(range) } });
    });
}

/// Dropout of elements `start`, `start` + 1, …, `start` a multiple of 4.
struct Drop<'a> {
    p: &'a Dropout,
    start: usize,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Drop<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (threshold, keep_scale) = (u64::from(self.p.threshold()), self.p.keep_scale());
        let parts = self.x.chunks(4 * GROUPS).zip(self.y.chunks_mut(4 * GROUPS));
        for (part, (x, y)) in parts.enumerate() {
            let words = words(self.p.seed, self.p.stream, (self.start / 4 + part * GROUPS) as u64);
            for (i, (x, y)) in x.iter().zip(y).enumerate() {
                *y = if words[i % 4][i / 4] >= threshold { x * keep_scale } else { 0.0 };
            }
        }
    }
}

/// Word j of group `first` + i, as `[j][i]`: Philox4x32-10, as `rankfold_backend::philox` has it.
#[inline(always)]
pub(crate) fn words(seed: u64, stream: u64, first: u64) -> [[u64; GROUPS]; 4] {
    let groups: [u64; GROUPS] = std::array::from_fn(|i| first + i as u64);
    let (mut c0, mut c1) = (groups.map(|group| group & LOW), groups.map(|group| group >> 32));
    let (mut c2, mut c3) = ([stream & LOW; GROUPS], [stream >> 32; GROUPS]);
    let mut key = [seed & LOW, seed >> 32];
    for _ in 0..10 {
        for (((c0, c1), c2), c3) in c0.iter_mut().zip(&mut c1).zip(&mut c2).zip(&mut c3) {
            let (p0, p1) = (0xD251_1F53 * (*c0 & LOW), 0xCD9E_8D57 * (*c2 & LOW));
            (*c0, *c2) = ((p1 >> 32) ^ *c1 ^ key[0], (p0 >> 32) ^ *c3 ^ key[1]);
            (*c1, *c3) = (p1 & LOW, p0 & LOW);
        }
        key = [(key[0] + 0x9E37_79B9) & LOW, (key[1] + 0xBB67_AE85) & LOW];
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rankfold_backend::philox;

    #[test]
    fn words_are_philoxs() {
        let (seed, stream) = (0xFEDC_BA98_7654_3210, 0x0123_4567_89AB_CDEF);
        for first in [0, 1, u64::from(u32::MAX) - 3, 1 << 40] {
            let words = words(seed, stream, first);
            for (i, group) in (first..).take(GROUPS).enumerate() {
                assert_eq!(words.map(|word| word[i] as u32), philox::words(seed, stream, group));
            }
        }
    }
}
