//! Blockwise 4-bit quantisation (Dettmers et al. 2023, QLoRA, §3), to the contract's bits.
//!
//! A block is read twice, the second time from the first-level cache: once for its absmax, once to scale it by the
//! reciprocal 1/max(absmax, 10⁻³⁸) and to encode. The clamp to [−1, 1] is left out: it cannot change a code, since
//! every threshold lies inside. Back, nibbles are looked up in registers and multiplied by their block's scale.
//!
//! Both ways are bound by memory: 4 bytes of f32 (2 of a half) and ½ byte of code an element.

use crate::simd::{ENCODED, Float, Isa, Kernel, Simd};
use crate::slices::{Floats, FloatsMut};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::{DynamicMap, Error, Format, NESTED_BLOCK, Result};

/// Elements of a task: a multiple of every block.
const CHUNK: usize = 1 << 15;

/// The decision rule as two tables of 16: thresholds padded with +∞, codes as the bits of f32s.
fn tables(format: Format) -> ([f32; 16], [f32; 16]) {
    let order = format.thresholds();
    let (mut thresholds, mut codes) = ([f32::INFINITY; 16], [0.0; 16]);
    thresholds[..order.between.len()].copy_from_slice(&order.between);
    for (entry, code) in codes.iter_mut().zip(order.codes) {
        *entry = f32::from_bits(code.into());
    }
    (thresholds, codes)
}

/// Codes and absmax of w; an error for the first element that is not finite.
pub(crate) fn quantize_4bit(
    threads: &Threads,
    isa: Isa,
    format: Format,
    block: usize,
    w: Floats,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    match w {
        Floats::F32(w) => quantize(threads, isa, format, block, w, codes, absmax),
        Floats::Bf16(w) => quantize(threads, isa, format, block, w, codes, absmax),
        Floats::F16(w) => quantize(threads, isa, format, block, w, codes, absmax),
    }
}

fn quantize<T: Float>(
    threads: &Threads,
    isa: Isa,
    format: Format,
    block: usize,
    w: &[T],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let (thresholds, order) = tables(format);
    let (codes, absmax) = (Disjoint::new(codes), Disjoint::new(absmax));
    let found = threads.map(w.len().div_ceil(CHUNK), |task| {
        let (start, end) = (task * CHUNK, w.len().min((task + 1) * CHUNK));
        // SAFETY: CHUNK is even and a multiple of the block, so no two tasks share a byte or a scale.
        let outputs =
            unsafe { (codes.get(start / 2..end.div_ceil(2)), absmax.get(start / block..end.div_ceil(block))) };
        let (codes, absmax) = outputs;
        isa.run(Encode { thresholds, order, block, w: &w[start..end], codes, absmax }).map(|i| start + i)
    });
    match found.into_iter().flatten().next() {
        Some(index) => Err(Error::NonFinite { index, value: w[index].to_f32().into() }),
        None => Ok(()),
    }
}

/// Whole blocks but for the last of all; returns the first element that is not finite.
struct Encode<'a, T> {
    thresholds: [f32; 16],
    order: [f32; 16],
    block: usize,
    w: &'a [T],
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<T: Float> Kernel for Encode<'_, T> {
    type Output = Option<usize>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Option<usize> {
        assert!(self.block.is_multiple_of(S::LANES) && self.codes.len() == self.w.len().div_ceil(2));
        // SAFETY: the caller's machine has S.
        let (thresholds, order) = unsafe { (S::table(&self.thresholds), S::table(&self.order)) };
        let blocks = self.w.chunks(self.block).zip(self.codes.chunks_mut(self.block / 2)).zip(self.absmax);
        for (b, ((w, codes), absmax)) in blocks.enumerate() {
            // SAFETY: the caller's machine has S.
            let Some(max) = (unsafe { finite_absmax::<S, T>(w) }) else {
                return w.iter().position(|w| !w.to_f32().is_finite()).map(|i| b * self.block + i);
            };
            *absmax = max;
            // The least divisor keeps a zero block's reciprocal finite.
            let reciprocal = 1.0 / max.max(1e-38);
            let whole = w.len() / S::LANES * S::LANES;
            // SAFETY: LANES elements from each i, and half as many bytes; at the end, what is left of both, 16 lanes
            // encoding to 8 bytes at most.
            unsafe {
                let reciprocal = S::splat(reciprocal);
                let many = w.len() / ENCODED * ENCODED;
                for i in (0..many).step_by(ENCODED) {
                    let mut v = [reciprocal; 4];
                    for (j, v) in v.iter_mut().take(ENCODED / S::LANES).enumerate() {
                        *v = S::mul(T::load::<S>(w.as_ptr().add(i + j * S::LANES)), reciprocal);
                    }
                    S::encode_many(thresholds, order, v, codes.as_mut_ptr().add(i / 2));
                }
                for i in (many..whole).step_by(S::LANES) {
                    let v = S::mul(T::load::<S>(w.as_ptr().add(i)), reciprocal);
                    S::encode_nibbles(thresholds, order, v, codes.as_mut_ptr().add(i / 2));
                }
                if whole < w.len() {
                    // The lanes beyond the end are 0: an odd count is padded with the code of 0.
                    let v = S::mul(T::load_part::<S>(w.as_ptr().add(whole), w.len() - whole), reciprocal);
                    let mut bytes = [0u8; 8];
                    S::encode_nibbles(thresholds, order, v, bytes.as_mut_ptr());
                    let rest = &mut codes[whole / 2..];
                    rest.copy_from_slice(&bytes[..rest.len()]);
                }
            }
        }
        None
    }
}

/// max |w|, `None` where an element is NaN or infinite.
#[inline(always)]
unsafe fn finite_absmax<S: Simd, T: Float>(w: &[T]) -> Option<f32> {
    // SAFETY: elements i … i + n − 1 of w.
    unsafe {
        // 0 · x is 0 where x is finite and NaN elsewhere; the maximum alone would lose a NaN. Two of each, so that
        // they wait less for each other.
        let (mut maxima, mut checks) = ([S::splat(0.0); 2], [S::splat(0.0); 2]);
        let whole = w.len() / (2 * S::LANES) * (2 * S::LANES);
        for i in (0..whole).step_by(2 * S::LANES) {
            for (j, (max, check)) in maxima.iter_mut().zip(&mut checks).enumerate() {
                let x = T::load::<S>(w.as_ptr().add(i + j * S::LANES));
                *max = S::max(S::abs(x), *max);
                *check = S::fma(x, S::splat(0.0), *check);
            }
        }
        let (mut max, mut check) = (S::max(maxima[0], maxima[1]), S::add(checks[0], checks[1]));
        for i in (whole..w.len()).step_by(S::LANES) {
            let x = T::load_part::<S>(w.as_ptr().add(i), S::LANES.min(w.len() - i));
            max = S::max(S::abs(x), max);
            check = S::fma(x, S::splat(0.0), check);
        }
        (S::sum(check) == 0.0).then(|| S::max_lane(max))
    }
}

/// The scales of a quantised weight's blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ScaleSlice<'a> {
    /// One f32 a block.
    Plain(&'a [f32]),
    /// map[code]·absmax + offset, rounded after the multiply and again after the add.
    Nested {
        /// A code a block.
        codes: &'a [u8],
        /// A scale every 256 blocks.
        absmax: &'a [f32],
        /// The mean of the scales.
        offset: f32,
        /// The signed dynamic map.
        map: &'static [f32; 256],
    },
}

impl<'a> ScaleSlice<'a> {
    /// Double quantisation's scales.
    pub(crate) fn nested(codes: &'a [u8], absmax: &'a [f32], offset: f32) -> Self {
        Self::Nested { codes, absmax, offset, map: DynamicMap::Signed.values() }
    }

    /// The scale of a block.
    #[inline(always)]
    pub(crate) fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested { codes, absmax, offset, map } => {
                map[usize::from(codes[block])] * absmax[block / NESTED_BLOCK] + offset
            }
        }
    }
}

/// out_i = values[code_i] · scale_(i / block), rounded to out's type.
pub(crate) fn dequantize_4bit(
    threads: &Threads,
    isa: Isa,
    format: Format,
    block: usize,
    codes: &[u8],
    scales: ScaleSlice,
    out: FloatsMut,
) {
    match out {
        FloatsMut::F32(out) => dequantize(threads, isa, format, block, codes, scales, out),
        FloatsMut::Bf16(out) => dequantize(threads, isa, format, block, codes, scales, out),
        FloatsMut::F16(out) => dequantize(threads, isa, format, block, codes, scales, out),
    }
}

fn dequantize<T: Float>(
    threads: &Threads,
    isa: Isa,
    format: Format,
    block: usize,
    codes: &[u8],
    scales: ScaleSlice,
    out: &mut [T],
) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        let codes = &codes[range.start / 2..range.end.div_ceil(2)];
        let first = range.start / block;
        // SAFETY: the ranges of two tasks do not overlap.
        let out = unsafe { out.get(range) };
        isa.run(Decode { values: format.values(), block, codes, scales, first, out });
    });
}

/// Whole blocks from number `first` on, but for the last of all.
struct Decode<'a, T> {
    values: &'static [f32; 16],
    block: usize,
    codes: &'a [u8],
    scales: ScaleSlice<'a>,
    first: usize,
    out: &'a mut [T],
}

impl<T: Float> Kernel for Decode<'_, T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert!(self.block.is_multiple_of(S::LANES) && self.codes.len() == self.out.len().div_ceil(2));
        // SAFETY: the caller's machine has S.
        let values = unsafe { S::table(self.values) };
        let blocks = self.out.chunks_mut(self.block).zip(self.codes.chunks(self.block / 2));
        for (b, (out, codes)) in blocks.enumerate() {
            let whole = out.len() / S::LANES * S::LANES;
            // SAFETY: LANES elements from each i, and half as many bytes; at the end, what is left of both, 16 lanes
            // needing 8 bytes at most.
            unsafe {
                let scale = S::splat(self.scales.get(self.first + b));
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::lookup_nibbles(values, codes.as_ptr().add(i / 2));
                    T::store::<S>(out.as_mut_ptr().add(i), S::mul(v, scale));
                }
                if whole < out.len() {
                    let (rest, mut bytes) = (&codes[whole / 2..], [0u8; 8]);
                    bytes[..rest.len()].copy_from_slice(rest);
                    let v = S::mul(S::lookup_nibbles(values, bytes.as_ptr()), scale);
                    T::store_part::<S>(out.as_mut_ptr().add(whole), v, out.len() - whole);
                }
            }
        }
    }
}
