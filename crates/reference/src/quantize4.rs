//! Blockwise 4-bit quantisation (Dettmers & Zettlemoyer 2023; Dettmers et al. 2023, QLoRA, eq. 1 and §3).
//!
//! Block by block of the flattened tensor: absmax = max |w|, v = w / absmax in [−1, 1], code = the format's value
//! nearest to v; back: w ≈ value[code] · absmax. This is f32 arithmetic, defined to the bit:
//! - v = w · r with the reciprocal r = 1/max(absmax, 10⁻³⁸), then clamped (the product may round past 1);
//! - v takes the upper of two neighbours where it exceeds their midpoint, so a tie takes the lower value.
//!
//! w [elements] f32, bf16 or f16; codes u8 [⌈elements/2⌉], the first of a pair in the high nibble;
//! absmax f32 [⌈elements/block⌉].

use crate::operands::Kernel;
use crate::quantize8;
use rankfold_backend::params::expect;
use rankfold_backend::{DType, DynamicMap, Error, Format, NESTED_BLOCK, Quantized, Result, Scales, View, ViewMut};
use rankfold_backend::check_block;

/// max |x|, as it is.
pub(crate) fn absmax(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |max, x| f32::max(max, x.abs()))
}

/// x scaled into [−1, 1] by its block's absmax.
pub(crate) fn normalised(x: f32, absmax: f32) -> f32 {
    // The least divisor keeps a zero block's reciprocal finite: its elements are 0 whatever they are divided by.
    let reciprocal = 1.0 / f32::max(absmax, 1e-38);
    (x * reciprocal).clamp(-1.0, 1.0)
}

/// The first element that is NaN or infinite, as an error.
pub(crate) fn check_finite(x: &[f32]) -> Result<()> {
    match x.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(Error::NonFinite { index, value: f64::from(x[index]) }),
        None => Ok(()),
    }
}

/// Codes and absmax of w.
pub(crate) fn quantize_4bit(
    format: Format,
    block: usize,
    w: View,
    mut codes: ViewMut,
    mut absmax_out: ViewMut,
) -> Result<()> {
    let kernel = Kernel("quantize_4bit");
    check_block(block)?;
    expect(kernel.0, "codes", codes.len(), w.len().div_ceil(2))?;
    expect(kernel.0, "absmax", absmax_out.len(), w.len().div_ceil(block))?;
    if w.dtype() == DType::F64 {
        return Err(kernel.dtype_error("w", "f32, bf16 or f16", w));
    }
    // Each of the three types is exact in f32.
    let w: Vec<f32> = kernel.floats("w", w)?.into_iter().map(|w| w as f32).collect();
    let codes = kernel.elements_mut::<u8>("codes", &mut codes)?;
    let scales = kernel.elements_mut::<f32>("absmax", &mut absmax_out)?;
    check_finite(&w)?;

    let thresholds = format.thresholds();
    let code = |v: f32| thresholds.codes[thresholds.between.iter().filter(|&&threshold| v > threshold).count()];
    let mut nibbles = Vec::with_capacity(w.len() + 1);
    for (block, scale) in w.chunks(block).zip(scales) {
        *scale = absmax(block);
        nibbles.extend(block.iter().map(|&w| code(normalised(w, *scale))));
    }
    if w.len() % 2 == 1 {
        nibbles.push(format.zero_code());
    }
    for (byte, pair) in codes.iter_mut().zip(nibbles.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(())
}

/// One scale a block; nested scales (double quantisation, QLoRA §3) are map[code]·absmax + offset, rounded after
/// the multiply and again after the add.
fn scales(kernel: Kernel, scales: &Scales) -> Result<Vec<f32>> {
    match scales {
        Scales::Plain(absmax) => Ok(kernel.elements::<f32>("absmax", absmax.view())?.to_vec()),
        Scales::Nested { codes, absmax, offset } => {
            let codes = kernel.elements("scale codes", codes.view())?;
            let absmax = kernel.elements("nested absmax", absmax.view())?;
            let centred = quantize8::decode(DynamicMap::Signed, NESTED_BLOCK, codes, absmax);
            Ok(centred.into_iter().map(|scale| scale + offset).collect())
        }
    }
}

/// The elements of a quantised weight whose lengths have been checked.
pub(crate) fn decode(kernel: Kernel, q: &Quantized) -> Result<Vec<f32>> {
    let codes = kernel.elements::<u8>("codes", q.codes.view())?;
    let scales = scales(kernel, &q.scales)?;
    let nibble = |i: usize| if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
    let value = |i: usize| q.format.values()[usize::from(nibble(i))];
    Ok((0..q.elements()).map(|i| value(i) * scales[i / q.block]).collect())
}

/// out_i = values[code_i] · absmax_(i / block), in f32 and then rounded to out's type.
pub(crate) fn dequantize_4bit(q: &Quantized, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("dequantize_4bit");
    q.check()?;
    expect(kernel.0, "out", out.len(), q.elements())?;
    let w = decode(kernel, q)?;
    kernel.floats_mut("out", &mut out)?.store(w.into_iter().map(f64::from));
    Ok(())
}
