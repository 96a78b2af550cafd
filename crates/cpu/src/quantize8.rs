//! Blockwise 8-bit quantisation with a dynamic map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization"), and with it double quantisation (Dettmers et al. 2023, QLoRA, §3), to the contract's bits.
//!
//! absmax = max |x|, v = x · (1/max(absmax, 10⁻³⁸)); the code is the number of midpoints between neighbouring map
//! values that v exceeds. Midpoints are exact in f64; v is an f32, so v exceeds a midpoint where it exceeds the
//! largest f32 that is not above it, and the search stays in f32.
//!
//! The search is a lookup: the leading bits of v (sign, exponent, six bits of the mantissa) name an interval that
//! holds two midpoints at most, since the map is nowhere denser than 64 values in [0.1, 1]. A table gives how many
//! lie below the interval; two comparisons give the rest.

use crate::scratch;
use crate::threads::{Disjoint, Threads};
use rankfold_backend::{DynamicMap, Error, NESTED_BLOCK, Result};
use std::sync::LazyLock;

/// Elements of a task, at least.
const CHUNK: usize = 1 << 14;

/// Bits of an f32 that do not choose its interval.
const DROPPED: u32 = 17;

/// How a map's codes are found.
pub(crate) struct Search {
    /// The midpoints, each rounded down to an f32, and two that nothing exceeds.
    thresholds: [f32; 257],
    /// The least code in each interval.
    first: Vec<u8>,
}

impl Search {
    fn new(map: DynamicMap) -> Self {
        let mut thresholds = [f32::INFINITY; 257];
        for (threshold, pair) in thresholds.iter_mut().zip(map.values().windows(2)) {
            let midpoint = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
            let nearest = midpoint as f32;
            *threshold = if f64::from(nearest) > midpoint { nearest.next_down() } else { nearest };
        }
        let intervals = 0..1u32 << (u32::BITS - DROPPED);
        let first = intervals.map(|interval| {
            let [a, b] = ends(interval);
            thresholds.partition_point(|threshold| a.min(b) > *threshold) as u8
        });
        Self { thresholds, first: first.collect() }
    }

    pub(crate) fn of(map: DynamicMap) -> &'static Self {
        static SIGNED: LazyLock<Search> = LazyLock::new(|| Search::new(DynamicMap::Signed));
        static UNSIGNED: LazyLock<Search> = LazyLock::new(|| Search::new(DynamicMap::Unsigned));
        match map {
            DynamicMap::Signed => &SIGNED,
            DynamicMap::Unsigned => &UNSIGNED,
        }
    }

    /// How many midpoints v exceeds.
    #[inline(always)]
    fn code(&self, v: f32) -> u8 {
        let first = self.first[(v.to_bits() >> DROPPED) as usize];
        let [below, above] = [self.thresholds[usize::from(first)], self.thresholds[usize::from(first) + 1]];
        first + u8::from(v > below) + u8::from(v > above)
    }

    /// The codes of a block.
    #[inline(always)]
    pub(crate) fn encode(&self, x: &[f32], absmax: f32, codes: &mut [u8]) {
        let reciprocal = 1.0 / absmax.max(1e-38);
        for (x, code) in x.iter().zip(codes) {
            // No clamp: what a product exceeds 1 by changes no code.
            *code = self.code(x * reciprocal);
        }
    }
}

/// The f32s at both ends of an interval, in the order of their bits.
fn ends(interval: u32) -> [f32; 2] {
    [interval << DROPPED, interval << DROPPED | ((1 << DROPPED) - 1)].map(f32::from_bits)
}

/// max |x|, not finite where an element is not: without the sign, f32s are ordered as their bits are, NaN above all.
#[inline(always)]
pub(crate) fn absmax(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |max: u32, x| max.max(x.to_bits() & !(1 << 31))))
}

/// Codes and absmax of x; an error for the first element that is not finite.
pub(crate) fn quantize_8bit(
    threads: &Threads,
    map: DynamicMap,
    block: usize,
    x: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let search = Search::of(map);
    let chunk = CHUNK.max(block);
    let (codes, absmax) = (Disjoint::new(codes), Disjoint::new(absmax));
    let found = threads.map(x.len().div_ceil(chunk), |task| {
        let (start, end) = (task * chunk, x.len().min((task + 1) * chunk));
        // SAFETY: a chunk is a multiple of the block, so no two tasks share a code or a scale.
        let (codes, absmax) = unsafe { (codes.get(start..end), absmax.get(start / block..end.div_ceil(block))) };
        for ((part, codes), scale) in x[start..end].chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
            *scale = self::absmax(part);
            if !scale.is_finite() {
                return (start..end).find(|i| !x[*i].is_finite());
            }
            search.encode(part, *scale, codes);
        }
        None
    });
    match found.into_iter().flatten().next() {
        Some(index) => Err(Error::NonFinite { index, value: x[index].into() }),
        None => Ok(()),
    }
}

/// The mean of the scales, and what they differ from it by, quantised in 8 bits.
pub(crate) fn quantize_scales(threads: &Threads, absmax: &[f32], codes: &mut [u8], nested: &mut [f32]) -> Result<f32> {
    if let Some(index) = absmax.iter().position(|scale| !scale.is_finite()) {
        return Err(Error::NonFinite { index, value: absmax[index].into() });
    }
    let sum: f64 = absmax.iter().map(|scale| f64::from(*scale)).sum();
    // A weight without elements has no scales and no mean: max(1) gives it 0.
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    scratch::with(absmax.len(), |centred| {
        for (centred, scale) in centred.iter_mut().zip(absmax) {
            *centred = scale - offset;
        }
        quantize_8bit(threads, DynamicMap::Signed, NESTED_BLOCK, centred, codes, nested)
    })?;
    Ok(offset)
}

/// out_i = map[code_i] · absmax_(i / block)
pub(crate) fn dequantize_8bit(
    threads: &Threads,
    map: DynamicMap,
    block: usize,
    codes: &[u8],
    absmax: &[f32],
    out: &mut [f32],
) {
    let (len, values, out) = (out.len(), map.values(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK.max(block), |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        let out = unsafe { out.get(range.clone()) };
        let blocks = out.chunks_mut(block).zip(codes[range.clone()].chunks(block));
        for ((out, codes), absmax) in blocks.zip(&absmax[range.start / block..]) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = values[usize::from(*code)] * absmax;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At every midpoint, and one f32 to either side of it.
    #[test]
    fn codes_are_those_of_the_exact_midpoints() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let search = Search::of(map);
            let midpoints: Vec<f64> =
                map.values().windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect();
            for midpoint in &midpoints {
                let near = *midpoint as f32;
                for v in [near.next_down(), near, near.next_up(), -1.0, -0.0, 0.0, 1.0, 1.0f32.next_up(), f32::MIN] {
                    let expected = midpoints.partition_point(|m| f64::from(v) > *m);
                    assert_eq!(usize::from(search.code(v)), expected, "{v}");
                }
            }
        }
    }

    /// Codes grow with v, so that they are right in all of an interval where they are at both ends.
    #[test]
    fn no_interval_holds_more_than_two_midpoints() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let Search { thresholds, first } = Search::of(map);
            for interval in 0..first.len() as u32 {
                let counts = ends(interval).map(|v| thresholds.partition_point(|threshold| v > *threshold));
                if ends(interval).iter().all(|v| v.is_finite()) {
                    assert!(counts[0].abs_diff(counts[1]) <= 2, "{:?}: {counts:?}", ends(interval));
                }
            }
        }
    }
}
