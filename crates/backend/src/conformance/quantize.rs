//! Quantisation, in 4 and in 8 bits: equal to the bit, both ways.

use super::draw::{Draw, abs};
use super::harness::*;
use crate::{Backend, DType, DynamicMap, Format, NESTED_BLOCK, Quantized, Scales};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    format: Format,
    block: usize,
    len: usize,
    dtype: DType,
    seed: u64,
}

/// Elements of several tasks of any backend, and in small blocks of several groups of 256 scales.
const MANY: usize = 70_000;

/// Whole blocks and ragged ones, none, a few and many.
pub(super) fn lengths() -> impl Strategy<Value = (usize, usize)> {
    let blocks = select(vec![32, 64, 128, 256, 512, 1024, 2048, 4096]);
    let few = (blocks.clone(), 0..5usize, select(vec![0, 1, 2, 7, 8, 15, 17, 31]), any::<bool>()).prop_map(
        |(block, whole, more, minus)| {
            let len = whole * block;
            (block, if minus { len.saturating_sub(more) } else { len + more })
        },
    );
    prop_oneof![15 => few, 1 => (blocks, MANY..MANY + 700)]
}

fn cases() -> impl Strategy<Value = Case> {
    let formats = select(Format::ALL.to_vec());
    let dtypes = select(vec![DType::F32, DType::F32, DType::Bf16, DType::F16]);
    (formats, lengths(), dtypes, any::<u64>()).prop_map(|(format, (block, len), dtype, seed)| Case {
        format,
        block,
        len,
        dtype,
        seed,
    })
}

/// Blocks of every kind that is hard: an outlier, all zero, tiny, huge, an absmax whose reciprocal overflows or (above
/// 2¹²⁶) is denormal, elements of every size beside each other, any finite bits of the type; and values at, one ulp
/// above and one ulp below each `threshold`, under an absmax that is a power of two.
fn draw_blocks(draw: &mut Draw, case: &Case, thresholds: &[f32]) -> Vec<f32> {
    let mut values = draw.normal(case.len, 0.02);
    for block in values.chunks_mut(case.block) {
        let outlier = draw.below(block.len());
        match draw.below(12) {
            0 => block.fill(0.0),
            1 => block.fill(-0.0),
            2 => block[outlier] = 30.0 * draw.sign(),
            3 => block.iter_mut().for_each(|x| *x *= 1e-28),
            4 => block.iter_mut().for_each(|x| *x *= 1e38),
            5 => block.iter_mut().for_each(|x| *x *= 1e-37),
            6 => {
                let exponents = [draw.below(9) as i32 - 4, 127, 126, -126];
                let absmax = 2f32.powi(exponents[draw.below(exponents.len())]);
                for x in &mut *block {
                    let threshold = thresholds[draw.below(thresholds.len())];
                    *x = absmax * [threshold, threshold.next_up(), threshold.next_down()][draw.below(3)];
                }
                block[outlier] = absmax * draw.sign();
            }
            7 => {
                // The largest finite number, or one of [2¹²⁶, 2¹²⁸); the others are smaller by up to 2⁻²⁰.
                let (spread, any) = (draw.below(21), f32::from_bits((253 << 23) + draw.below(2 << 23) as u32));
                let absmax = if draw.once_in(2) { f32::MAX } else { any };
                for x in &mut *block {
                    let part = 1.0 - draw.below(1 << 23) as f32 * 2f32.powi(-23);
                    *x = absmax * part * draw.sign() * 2f32.powi(-(draw.below(spread + 1) as i32));
                }
                block[outlier] = absmax * draw.sign();
            }
            8 => block.iter_mut().for_each(|x| *x *= 2f32.powi(-(draw.below(140) as i32))),
            9 => block.copy_from_slice(&draw.finite(case.dtype, block.len())),
            _ => {}
        }
    }
    values
}

/// Values in one of the three types that weights come in: what is finite stays so.
pub(super) fn put(desk: &Desk, dtype: DType, w: &[f32]) -> TestCaseResult<Placed> {
    // Huge blocks overflow the halves: they become as large as those go.
    let clamped = |max: f32| w.iter().map(move |&w| if w.is_finite() { w.clamp(-max, max) } else { w });
    Ok(match dtype {
        DType::F16 => desk.put(&clamped(f16::MAX.to_f32()).map(f16::from_f32).collect::<Vec<_>>())?,
        DType::Bf16 => desk.put(&clamped(bf16::MAX.to_f32()).map(bf16::from_f32).collect::<Vec<_>>())?,
        _ => desk.put(w)?,
    })
}

/// Codes and absmax, for all formats, blocks and input types.
pub fn quantize_4bit(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call(backend: &dyn Backend, case: &Case, w: &[f32]) -> TestCaseResult<(Vec<u8>, Vec<f32>)> {
        let desk = Desk::new(backend, case.seed);
        let w = put(&desk, case.dtype, w)?;
        let mut codes = desk.blank(DType::U8, case.len.div_ceil(2))?;
        let mut absmax = desk.blank(DType::F32, case.len.div_ceil(case.block))?;
        backend.quantize_4bit(case.format, case.block, w.view(), codes.view_mut(), absmax.view_mut())?;
        Ok((desk.take(&codes)?, desk.take(&absmax)?))
    }
    check(256, &cases(), |case| {
        let thresholds = case.format.thresholds();
        let w = draw_blocks(&mut Draw::new(case.seed), &case, &thresholds.between);
        let (codes, absmax) = twice(|| call(candidate, &case, &w))?;
        let (expected_codes, expected_absmax) = call(oracle, &case, &w)?;
        same("absmax", &absmax, &expected_absmax)?;
        same("codes", &codes, &expected_codes)
    })
}

/// From any codes and any scales, plain and nested, to each float type.
pub fn dequantize_4bit(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    struct Stored {
        codes: Vec<u8>,
        absmax: Vec<f32>,
        nested: Option<(Vec<u8>, f32)>,
    }
    fn call(backend: &dyn Backend, case: &Case, stored: &Stored) -> TestCaseResult<Vec<u16>> {
        let desk = Desk::new(backend, case.seed);
        let absmax = backend.upload(&stored.absmax)?;
        let q = Quantized {
            codes: backend.upload(&stored.codes)?,
            scales: match &stored.nested {
                None => Scales::Plain(absmax),
                Some((codes, offset)) => Scales::Nested { codes: backend.upload(codes)?, absmax, offset: *offset },
            },
            format: case.format,
            block: case.block,
            shape: [1, case.len],
        };
        let mut out = desk.blank(case.dtype, case.len)?;
        backend.dequantize_4bit(&q, out.view_mut())?;
        Ok(match case.dtype {
            DType::F32 => bytemuck::cast_slice(&desk.take::<f32>(&out)?).to_vec(),
            DType::Bf16 => bytemuck::cast_slice(&desk.take::<bf16>(&out)?).to_vec(),
            _ => bytemuck::cast_slice(&desk.take::<f16>(&out)?).to_vec(),
        })
    }
    check(256, &(cases(), any::<bool>()), |(case, double)| {
        let mut draw = Draw::new(case.seed);
        let blocks = case.len.div_ceil(case.block);
        let codes = draw.bytes(case.len.div_ceil(2));
        let (absmax, nested) = if double {
            let offset = 0.05 + 0.01 * draw.gauss() as f32;
            (draw.normal(blocks.div_ceil(NESTED_BLOCK), 0.3), Some((draw.bytes(blocks), offset)))
        } else {
            let absmax = if draw.once_in(2) { draw.normal(blocks, 0.05) } else { draw.finite(DType::F32, blocks) };
            (abs(&absmax), None)
        };
        let stored = Stored { codes, absmax, nested };
        let found = twice(|| Ok(vec![call(candidate, &case, &stored)?]))?;
        same("the halves of out", &found[0], &call(oracle, &case, &stored)?)
    })
}

/// Codes, nested scales and offset, over more than one nested block.
pub fn quantize_scales(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    /// The codes; and the nested scales, the offset after them.
    fn call(backend: &dyn Backend, seed: u64, absmax: &[f32]) -> TestCaseResult<(Vec<u8>, Vec<f32>)> {
        let desk = Desk::new(backend, seed);
        let placed = desk.put(absmax)?;
        let mut codes = desk.blank(DType::U8, absmax.len())?;
        let mut nested = desk.blank(DType::F32, absmax.len().div_ceil(NESTED_BLOCK))?;
        let offset = backend.quantize_scales(placed.view(), codes.view_mut(), nested.view_mut())?;
        let mut scales = desk.take(&nested)?;
        scales.push(offset);
        Ok((desk.take(&codes)?, scales))
    }
    let lens = select(vec![0, 1, 2, 3, 31, 64, 255, 256, 257, 511, 512, 1000, 4097]);
    check(128, &(lens, any::<u64>()), |(len, seed)| {
        let mut draw = Draw::new(seed);
        let absmax = match draw.below(4) {
            0 => draw.finite(DType::F32, len),
            size => draw.normal(len, [0.1, 1e-21, 1e19][size - 1]),
        };
        let absmax = abs(&absmax);
        let (codes, scales) = twice(|| call(candidate, seed, &absmax))?;
        let (expected_codes, expected_scales) = call(oracle, seed, &absmax)?;
        same("the nested scales, then the offset,", &scales, &expected_scales)?;
        same("codes", &codes, &expected_codes)
    })
}

fn maps() -> impl Strategy<Value = DynamicMap> {
    select(vec![DynamicMap::Signed, DynamicMap::Unsigned])
}

/// Codes and absmax with both maps.
pub fn quantize_8bit(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call(backend: &dyn Backend, map: DynamicMap, case: &Case, x: &[f32]) -> TestCaseResult<(Vec<u8>, Vec<f32>)> {
        let desk = Desk::new(backend, case.seed);
        let placed = desk.put(x)?;
        let mut codes = desk.blank(DType::U8, x.len())?;
        let mut absmax = desk.blank(DType::F32, x.len().div_ceil(case.block))?;
        backend.quantize_8bit(map, case.block, placed.view(), codes.view_mut(), absmax.view_mut())?;
        Ok((desk.take(&codes)?, desk.take(&absmax)?))
    }
    check(256, &(maps(), cases()), |(map, case)| {
        let case = Case { dtype: DType::F32, ..case };
        let midpoints: Vec<f32> = map.values().windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).collect();
        let mut x = draw_blocks(&mut Draw::new(case.seed), &case, &midpoints);
        if map == DynamicMap::Unsigned {
            x.iter_mut().for_each(|x| *x = x.abs());
        }
        let (codes, absmax) = twice(|| call(candidate, map, &case, &x))?;
        let (expected_codes, expected_absmax) = call(oracle, map, &case, &x)?;
        same("absmax", &absmax, &expected_absmax)?;
        same("codes", &codes, &expected_codes)
    })
}

/// From any codes and scales.
pub fn dequantize_8bit(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call(
        backend: &dyn Backend,
        map: DynamicMap,
        case: &Case,
        codes: &[u8],
        absmax: &[f32],
    ) -> TestCaseResult<Outputs<f32>> {
        let desk = Desk::new(backend, case.seed);
        let (codes, absmax) = (desk.put(codes)?, desk.put(absmax)?);
        let mut out = desk.blank(DType::F32, case.len)?;
        backend.dequantize_8bit(map, case.block, codes.view(), absmax.view(), out.view_mut())?;
        Ok(vec![desk.take(&out)?])
    }
    check(128, &(maps(), cases()), |(map, case)| {
        let mut draw = Draw::new(case.seed);
        let (codes, absmax) = (draw.bytes(case.len), draw.scaled(case.len.div_ceil(case.block)));
        let found = twice(|| call(candidate, map, &case, &codes, &absmax))?;
        same("out", &found[0], &call(oracle, map, &case, &codes, &absmax)?[0])
    })
}
