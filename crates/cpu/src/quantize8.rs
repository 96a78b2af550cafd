//! Blockwise 8-bit quantisation with a dynamic map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization"), and with it double quantisation (Dettmers et al. 2023, QLoRA, §3), to the contract's bits.
//!
//! absmax = max |x|, v = x · (1/max(absmax, 10⁻³⁸)); the code is the number of midpoints between neighbouring map
//! values that v exceeds, found in eight steps without a branch. Midpoints are exact in f64; v is an f32, so v exceeds
//! a midpoint where it exceeds the largest f32 that is not above it, and the search stays in f32.

use crate::scratch;
use crate::threads::{Disjoint, Threads};
use rankfold_backend::{DynamicMap, Error, NESTED_BLOCK, Result};

/// Elements of a task, at least.
const CHUNK: usize = 1 << 14;

/// The midpoints, each rounded down to an f32, and one that nothing exceeds.
fn thresholds(map: DynamicMap) -> [f32; 256] {
    let mut thresholds = [f32::INFINITY; 256];
    for (threshold, pair) in thresholds.iter_mut().zip(map.values().windows(2)) {
        let midpoint = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
        let nearest = midpoint as f32;
        *threshold = if f64::from(nearest) > midpoint { nearest.next_down() } else { nearest };
    }
    thresholds
}

/// How many thresholds v exceeds.
#[inline(always)]
fn code(thresholds: &[f32; 256], v: f32) -> u8 {
    let mut below = 0usize;
    for step in [128, 64, 32, 16, 8, 4, 2, 1] {
        below += if v > thresholds[below + step - 1] { step } else { 0 };
    }
    below as u8
}

fn check_finite(x: &[f32]) -> Result<()> {
    match x.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(Error::NonFinite { index, value: x[index].into() }),
        None => Ok(()),
    }
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
    check_finite(x)?;
    let thresholds = thresholds(map);
    let chunk = CHUNK.max(block);
    let (codes, absmax) = (Disjoint::new(codes), Disjoint::new(absmax));
    threads.run_chunks(x.len(), chunk, |range| {
        // SAFETY: a chunk is a multiple of the block, so no two tasks share a code or a scale.
        let (codes, absmax) =
            unsafe { (codes.get(range.clone()), absmax.get(range.start / block..range.end.div_ceil(block))) };
        for ((x, codes), absmax) in x[range].chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
            *absmax = x.iter().fold(0.0, |max, x| max.max(x.abs()));
            let reciprocal = 1.0 / absmax.max(1e-38);
            for (x, c) in x.iter().zip(codes) {
                // No clamp: what a product exceeds 1 by changes no code.
                *c = code(&thresholds, x * reciprocal);
            }
        }
    });
    Ok(())
}

/// The mean of the scales, and what they differ from it by, quantised in 8 bits.
pub(crate) fn quantize_scales(threads: &Threads, absmax: &[f32], codes: &mut [u8], nested: &mut [f32]) -> Result<f32> {
    check_finite(absmax)?;
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
            let thresholds = thresholds(map);
            let midpoints: Vec<f64> =
                map.values().windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect();
            for midpoint in &midpoints {
                let near = *midpoint as f32;
                for v in [near.next_down(), near, near.next_up(), -1.0, 0.0, 1.0] {
                    let expected = midpoints.partition_point(|m| f64::from(v) > *m);
                    assert_eq!(usize::from(code(&thresholds, v)), expected, "{v}");
                }
            }
        }
    }
}
