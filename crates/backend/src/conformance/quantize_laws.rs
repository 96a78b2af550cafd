//! What 4-bit codes and scales mean, as laws that need no oracle.
//!
//! A block's absmax is a, v = w/a in [−1, 1], q the value of v's code, ŵ = q·a; G is half the widest gap of the
//! format's values and u = 2⁻²⁴, the relative error of a rounding.
//!
//! **Plain scales.** The reciprocal and the product round v by 2u, the threshold is off by u/2 at most, and ŵ rounds
//! once, by u·a at most where it is denormal too: |ŵ − w| ≤ a·(G + 3.5u) ≤ a·(G + 2⁻²²), for 2⁻¹²⁶ ≤ a ≤ 2¹²⁶. Above,
//! up to the largest f32, 1/a is denormal: it rounds by 2⁻¹⁵⁰, which is up to 4u of itself, and the bound is
//! a·(G + 6.5u) ≤ a·(G + 2⁻²¹). Below 2⁻¹²⁶ see [`denormal`].
//!
//! **Double quantisation** replaces a by a' = map\[c\]·n + m: m the mean of the scales, n the largest |a − m| of 256.
//! With g the most that a number in \[−1, 1\] is from its map value ([`DynamicMap::worst_error`]),
//!
//!   |a' − a| ≤ n·g + roundings:  a − m (u·n), its quotient by n (2u·n), map·n (u·n), the sum (u·(n + |m|)),
//!
//! so |a' − a| ≤ Δ = n·g + (n + |m|)·2⁻²¹, with room for second order. And |ŵ' − w| ≤ |q·a − w| + |q|·|a' − a| + the
//! rounding of ŵ', u·|q|·(n + |m|): together
//!
//!   |ŵ' − w| ≤ a·(G + 2⁻²²) + |q|·Δ,
//!
//! 5u·n + u·|m| of the 8u of Δ being used by the first, and 2u by the last. Above 2¹²⁶ the quotients by a and by n round
//! by 3u more, and both powers of two double. This wants n = 0 or n ≥ 2⁻¹²⁶: so it is where a = 0 or a ≥ 2⁻¹⁰² in every
//! block, scales then differing by 2⁻¹²⁵ or not at all (a smaller n has its reciprocal cut at 10³⁸: |a' − a| ≤ n is all
//! that is left). And a' must not overflow, which is an error ([`Error::Scale`]): a·(1 + g) plus roundings is an f32
//! where a ≤ 0.99·2¹²⁸, g being below 0.0071.

use super::draw::Draw;
use super::harness::*;
use super::quantize::{lengths, put};
use crate::{Backend, DType, DynamicMap, Error, Format, NESTED_BLOCK, Quantized, Scales};
use proptest::prelude::*;
use proptest::sample::select;
use std::ops::RangeInclusive;

/// The scales for which the bound holds, and [`idempotent`], which is of plain ones.
fn range(double: bool) -> RangeInclusive<f32> {
    if double { 2f32.powi(-102)..=0.99 * f32::MAX } else { f32::MIN_POSITIVE..=f32::MAX }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    format: Format,
    block: usize,
    len: usize,
    double: bool,
    /// All weights are multiplied by two to this power.
    exponent: i32,
    seed: u64,
}

fn cases(formats: &[Format]) -> impl Strategy<Value = Case> {
    let (formats, exponents) = (select(formats.to_vec()), prop_oneof![Just(0), -80..=80]);
    (formats, lengths(), any::<bool>(), exponents, any::<u64>())
        .prop_map(|(format, (block, len), double, exponent, seed)| Case { format, block, len, double, exponent, seed })
}

/// Normal draws, each block at a scale of its own, some with an outlier, some zero: 0 or from 2⁻¹⁵ to 2¹⁰ in size.
fn draw_weights(case: &Case) -> Vec<f32> {
    let mut draw = Draw::new(case.seed);
    let mut w = draw.normal(case.len, 1.0);
    for block in w.chunks_mut(case.block) {
        let (outlier, scale) = (draw.below(block.len()), 2f32.powi(draw.below(7) as i32 - 3));
        match draw.below(8) {
            0 => block.fill(0.0),
            1 => block[outlier] = 30.0 * draw.sign(),
            _ => {}
        }
        block.iter_mut().for_each(|w| *w *= scale);
    }
    scaled(&w, case.exponent)
}

fn scaled(w: &[f32], exponent: i32) -> Vec<f32> {
    // In f64, since 2 to the power may not be an f32 where the product is.
    w.iter().map(|w| (f64::from(*w) * 2f64.powi(exponent)) as f32).collect()
}

/// Of every size that f32 has, and often at the ends.
fn wide_cases() -> impl Strategy<Value = Case> {
    let exponents = prop_oneof![2 => -138..=128, 1 => -138..=-96, 1 => 112..=128];
    (cases(&Format::ALL), exponents).prop_map(|(case, exponent)| Case { exponent, ..case })
}

/// `draw_weights`, each block zero or with an absmax in `range`, of which the ends are met.
fn draw_weights_in(range: RangeInclusive<f32>, case: &Case) -> Vec<f32> {
    let mut w = draw_weights(case);
    for block in w.chunks_mut(case.block) {
        let absmax = absmaxes(block, case.block)[0];
        let largest = block.iter().position(|w| w.abs() == absmax).expect("a block of the absmax");
        if absmax < range.start() / 1024.0 {
            block.fill(0.0);
        } else if absmax < *range.start() {
            block[largest] = range.start().copysign(block[largest]);
        }
        block.iter_mut().for_each(|w| *w = w.clamp(-range.end(), *range.end()));
    }
    w
}

/// A weight's parts on the host.
struct Made {
    /// A code an element.
    codes: Vec<u8>,
    /// The scales that blocks are decoded with.
    absmax: Vec<f32>,
    /// Scale codes, nested scales and the mean, with double quantisation.
    nested: Option<(Vec<u8>, Vec<f32>, f32)>,
    /// Decoded.
    back: Vec<f32>,
}

fn make(backend: &dyn Backend, case: &Case, w: &[f32]) -> TestCaseResult<Made> {
    let placed = Desk::new(backend, case.seed).put(w)?;
    let q = Quantized::quantize(backend, placed.view(), [1, case.len], case.format, case.block, case.double)?;
    let mut out = backend.alloc(DType::F32, case.len)?;
    backend.dequantize_4bit(&q, out.view_mut())?;
    let bytes = backend.download::<u8>(q.codes.view())?;
    let mut codes: Vec<u8> = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).collect();
    prop_assert!(codes[case.len..].iter().all(|&code| code == case.format.zero_code()), "the padding is not 0's code");
    codes.truncate(case.len);
    let (absmax, nested) = match &q.scales {
        Scales::Plain(absmax) => (backend.download(absmax.view())?, None),
        Scales::Nested { codes, absmax, offset } => {
            let (codes, nested) = (backend.download::<u8>(codes.view())?, backend.download::<f32>(absmax.view())?);
            let map = DynamicMap::Signed.values();
            let scale = |(b, &code): (usize, &u8)| map[usize::from(code)] * nested[b / NESTED_BLOCK] + offset;
            (codes.iter().enumerate().map(scale).collect(), Some((codes, nested, *offset)))
        }
    };
    Ok(Made { codes, absmax, nested, back: backend.download(out.view())? })
}

/// max |w| of each block.
fn absmaxes(w: &[f32], block: usize) -> Vec<f32> {
    w.chunks(block).map(|block| block.iter().fold(0f32, |max, w| max.max(w.abs()))).collect()
}

/// Both bounds above, for every element.
pub fn worst_case(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(256, &wide_cases(), |case| {
        let w = draw_weights_in(range(case.double), &case);
        let (made, exact) = (make(candidate, &case, &w)?, absmaxes(&w, case.block));
        let doubled = |divisor: f32| if divisor > 2f32.powi(126) { 2.0 } else { 1.0 };
        let gap = |a: f32| f64::from(case.format.worst_error()) + doubled(a) * 2f64.powi(-22);
        let moved = |b: usize| match &made.nested {
            None => 0.0,
            Some((_, nested, mean)) => {
                let rounding = doubled(nested[b / NESTED_BLOCK]) * 2f64.powi(-21);
                let n = f64::from(nested[b / NESTED_BLOCK]);
                n * f64::from(DynamicMap::Signed.worst_error()) + (n + f64::from(mean.abs())) * rounding
            }
        };
        for (b, (a, found)) in exact.iter().zip(&made.absmax).enumerate() {
            let error = (f64::from(*found) - f64::from(*a)).abs();
            prop_assert!(error <= moved(b), "the scale of block {b} is {found}, its absmax {a}");
        }
        for (i, (w, back)) in w.iter().zip(&made.back).enumerate() {
            let b = i / case.block;
            let value = f64::from(case.format.values()[usize::from(made.codes[i])].abs());
            let bound = f64::from(exact[b]) * gap(exact[b]) + value * moved(b);
            let error = (f64::from(*w) - f64::from(*back)).abs();
            prop_assert!(error <= bound, "{w} came back as {back}, absmax {}, bound {bound}", exact[b]);
        }
        Ok(())
    })
}

/// No other code's value is nearer to v than the code's own by more than 2⁻²⁴: thresholds are midpoints rounded to
/// f32, which moves them by at most 2⁻²⁵. And Int4's code 0 is not used.
pub fn nearest(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(64, &cases(&Format::ALL), |case| {
        let w = draw_weights(&case);
        let (made, exact) = (make(candidate, &case, &w)?, absmaxes(&w, case.block));
        for (i, (&w, &code)) in w.iter().zip(&made.codes).enumerate() {
            let v = f64::from((w * (1.0 / exact[i / case.block].max(1e-38))).clamp(-1.0, 1.0));
            let distance = |value: f32| (f64::from(value) - v).abs();
            let least = case.format.values().map(distance).into_iter().fold(f64::INFINITY, f64::min);
            let found = distance(case.format.values()[usize::from(code)]);
            prop_assert!(found <= least + 2f64.powi(-24), "v = {v} has code {code}, off by {found}, not by {least}");
            prop_assert!(case.format != Format::Int4 || code != 0, "code 0 of int4");
        }
        Ok(())
    })
}

/// Quantising what was decoded gives the same values, scales and codes (FP4's code 8, which decodes to 0, becomes 0's
/// own), for every absmax from 2⁻¹²⁶ to the largest f32: the largest of a block has a value of ±1, so it decodes to
/// ±absmax itself; and q·a·(1/a) is within 6u of q (1/a rounds by 4u at most, the products by u each), which is half a
/// gap from the next threshold.
pub fn idempotent(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(128, &wide_cases(), |case| {
        let case = Case { double: false, ..case };
        let w = draw_weights_in(range(false), &case);
        let once = make(candidate, &case, &w)?;
        let twice = make(candidate, &case, &once.back)?;
        same("absmax", &twice.absmax, &once.absmax)?;
        same("the values", &twice.back, &once.back)?;
        let kept = |&code: &u8| if case.format == Format::Fp4 && code == 8 { 0 } else { code };
        same("codes", &twice.codes, &once.codes.iter().map(kept).collect::<Vec<_>>())
    })
}

/// 2ᵏ·w has the codes of w and 2ᵏ times its scales, nested ones too, while nothing leaves the normal range: every
/// step multiplies, adds or compares numbers that all carry the power.
pub fn equivariant(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(64, &cases(&Format::ALL), |case| {
        let unscaled = Case { exponent: 0, ..case };
        let w = draw_weights(&unscaled);
        let one = make(candidate, &unscaled, &w)?;
        let power = make(candidate, &case, &scaled(&w, case.exponent))?;
        same("codes", &power.codes, &one.codes)?;
        same("the scales", &power.absmax, &scaled(&one.absmax, case.exponent))?;
        same("the values", &power.back, &scaled(&one.back, case.exponent))?;
        let (Some(power), Some(one)) = (&power.nested, &one.nested) else { return Ok(()) };
        same("scale codes", &power.0, &one.0)?;
        same("nested scales", &power.1, &scaled(&one.1, case.exponent))?;
        same("the mean", &[power.2], &scaled(&[one.2], case.exponent))
    })
}

/// −w has w's scales and the mirrored codes, so that its values are −ŵ, in the formats whose values are symmetric
/// (NF4's are not). An element on a threshold is passed over: a tie takes the lower value on both sides of 0.
pub fn symmetric(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(64, &cases(&[Format::Fp4, Format::Int4]), |case| {
        let w = draw_weights(&case);
        let one = make(candidate, &case, &w)?;
        let other = make(candidate, &case, &w.iter().map(|w| -w).collect::<Vec<_>>())?;
        same("the scales", &other.absmax, &one.absmax)?;
        let (thresholds, exact) = (case.format.thresholds().between, absmaxes(&w, case.block));
        for (i, &w) in w.iter().enumerate() {
            let v = w * (1.0 / exact[i / case.block].max(1e-38));
            if thresholds.iter().any(|t| *t != 0.0 && t.abs() == v.abs()) {
                continue;
            }
            let (code, mirrored) = (one.codes[i], other.codes[i]);
            let expected = match case.format {
                Format::Int4 => 16 - code,
                // Two codes of 0, for v ≤ 0 and for v > 0; 0 itself is not mirrored.
                _ if v == 0.0 => code,
                _ => code ^ 8,
            };
            prop_assert_eq!(mirrored, expected, "the code of −({}), whose own is {}", w, code);
            prop_assert_eq!(other.back[i], -one.back[i], "the value of −({})", w);
        }
        Ok(())
    })
}

/// Within a block w ≤ w' gives ŵ ≤ ŵ', with plain scales (a nested one may come out negative).
pub fn monotone(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(64, &cases(&Format::ALL), |case| {
        let case = Case { double: false, ..case };
        let mut w = draw_weights(&case);
        w.chunks_mut(case.block).for_each(|block| block.sort_by(f32::total_cmp));
        let made = make(candidate, &case, &w)?;
        for (w, back) in w.chunks(case.block).zip(made.back.chunks(case.block)) {
            for (w, back) in w.windows(2).zip(back.windows(2)) {
                prop_assert!(back[0] <= back[1], "{} ≤ {} came back as {} and {}", w[0], w[1], back[0], back[1]);
            }
        }
        Ok(())
    })
}

/// Denormals and zeros of both signs. absmax is stored as it is, denormal or not, and never as −0; −0 has the code of
/// 0. Below 10⁻³⁸ the reciprocal is cut, so that v is too small: ŵ has w's sign and is at most absmax, hence
/// |ŵ − w| ≤ absmax, and that is all that is promised.
pub fn denormal(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    check(64, &cases(&Format::ALL), |case| {
        let case = Case { double: false, ..case };
        let mut draw = Draw::new(case.seed);
        let w: Vec<f32> = (0..case.len)
            .map(|_| match draw.below(4) {
                0 => 0.0 * draw.sign(),
                // Every size of denormal.
                _ => draw.sign() * f32::from_bits(draw.below(1 << 23) as u32 >> draw.below(23)),
            })
            .collect();
        let (made, exact) = (make(candidate, &case, &w)?, absmaxes(&w, case.block));
        same("absmax", &made.absmax, &exact)?;
        for (i, (&w, &back)) in w.iter().zip(&made.back).enumerate() {
            let absmax = exact[i / case.block];
            prop_assert!(back.abs() <= absmax && (back == 0.0 || back.signum() == w.signum()), "{w} became {back}");
            prop_assert!(w != 0.0 || made.codes[i] == case.format.zero_code(), "{w} has code {}", made.codes[i]);
        }
        Ok(())
    })
}

/// The error names the first element that is NaN or infinite, wherever it is and in whatever type.
pub fn not_finite(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    let lens = prop_oneof![1usize..300, Just(70_001)];
    let dtypes = select(vec![DType::F32, DType::Bf16, DType::F16]);
    check(64, &(lens, dtypes, any::<u64>()), |(len, dtype, seed)| {
        let mut draw = Draw::new(seed);
        let mut w = draw.normal(len, 1.0);
        let places = [draw.below(len), draw.below(len)];
        for place in places {
            w[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][draw.below(3)];
        }
        let desk = Desk::new(candidate, seed);
        let placed = put(&desk, dtype, &w)?;
        let answer = Quantized::quantize(candidate, placed.view(), [1, len], Format::Nf4, 64, false);
        let first = places[0].min(places[1]);
        let names_it = matches!(answer, Err(Error::NonFinite { index, .. }) if index == first);
        prop_assert!(names_it, "element {first} is {}, the answer {answer:?}", w[first]);
        Ok(())
    })
}

/// A matrix of any shape (none, one and an odd number of elements; rows that are no multiple of the block) is what
/// the oracle makes of it, there and back, from and to each type.
pub fn any_shape(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call(backend: &dyn Backend, case: &Case, shape: [usize; 2], dtype: DType) -> TestCaseResult<Outputs<u8>> {
        let w = put(&Desk::new(backend, case.seed), dtype, &draw_weights(case))?;
        let q = Quantized::quantize(backend, w.view(), shape, case.format, case.block, case.double)?;
        let mut out = backend.alloc(dtype, q.elements())?;
        backend.dequantize_4bit(&q, out.view_mut())?;
        let mut back = vec![0; out.bytes()];
        backend.read(out.view(), &mut back)?;
        let bytes = |x: Vec<f32>| bytemuck::cast_slice(&x).to_vec();
        let scales = match &q.scales {
            Scales::Plain(absmax) => bytes(backend.download(absmax.view())?),
            Scales::Nested { codes, absmax, offset } => {
                let absmax = bytes(backend.download(absmax.view())?);
                [backend.download(codes.view())?, absmax, bytes(vec![*offset])].concat()
            }
        };
        Ok(vec![backend.download(q.codes.view())?, scales, back])
    }
    let side = || select(vec![0usize, 1, 2, 3, 31, 32, 33, 63, 65, 100]);
    let dtypes = select(vec![DType::F32, DType::Bf16, DType::F16]);
    check(128, &(cases(&Format::ALL), side(), side(), dtypes), |(case, rows, columns, dtype)| {
        let case = Case { len: rows * columns, exponent: 0, ..case };
        let found = twice(|| call(candidate, &case, [rows, columns], dtype))?;
        let expected = call(oracle, &case, [rows, columns], dtype)?;
        for (what, (found, expected)) in ["codes", "scales", "values"].into_iter().zip(found.iter().zip(&expected)) {
            same(&format!("the bytes of the {what}"), found, expected)?;
        }
        Ok(())
    })
}
