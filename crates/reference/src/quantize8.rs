//! Blockwise 8-bit quantisation with a dynamic map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization"), and with it double quantisation (Dettmers et al. 2023, QLoRA, §3).
//!
//! Block by block: absmax = max |x|, v = x / absmax as in 4 bits, code = the index of the map's nearest value, a tie
//! to the lower index; back: x ≈ map[code] · absmax. f32 arithmetic, but for the midpoints between neighbours:
//! the sum of two f32 values of the maps is exact in f64, and so is the decision.
//!
//! Double quantisation subtracts from the scales their mean, so that the map's sign is used, and quantises the
//! rest: 32 bits a block become 8, and 32 every 256 blocks.

use crate::operands::Kernel;
use crate::quantize4::{absmax, check_finite, normalised};
use rankfold_backend::params::expect;
use rankfold_backend::{DynamicMap, NESTED_BLOCK, Result, View, ViewMut, check_block};

/// Codes u8 [elements] and absmax f32 [⌈elements/block⌉] of x f32 [elements].
pub(crate) fn quantize_8bit(
    map: DynamicMap,
    block: usize,
    x: View,
    mut codes: ViewMut,
    mut absmax: ViewMut,
) -> Result<()> {
    let kernel = Kernel("quantize_8bit");
    check_block(block)?;
    expect(kernel.0, "codes", codes.len(), x.len())?;
    expect(kernel.0, "absmax", absmax.len(), x.len().div_ceil(block))?;
    let x = kernel.elements("x", x)?;
    let codes = kernel.elements_mut("codes", &mut codes)?;
    let absmax = kernel.elements_mut("absmax", &mut absmax)?;
    check_finite(x)?;
    encode(map, block, x, codes, absmax);
    Ok(())
}

fn encode(map: DynamicMap, block: usize, x: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    let midpoints: Vec<f64> =
        map.values().windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect();
    let blocks = x.chunks(block).zip(codes.chunks_mut(block)).zip(scales);
    for ((block, codes), scale) in blocks {
        *scale = absmax(block);
        for (x, code) in block.iter().zip(codes) {
            let v = f64::from(normalised(*x, *scale));
            *code = midpoints.partition_point(|&midpoint| v > midpoint) as u8;
        }
    }
}

/// map[code_i] · absmax_(i / block).
pub(crate) fn decode(map: DynamicMap, block: usize, codes: &[u8], absmax: &[f32]) -> Vec<f32> {
    codes.iter().enumerate().map(|(i, &code)| map.values()[usize::from(code)] * absmax[i / block]).collect()
}

/// out f32 [elements] from codes and absmax.
pub(crate) fn dequantize_8bit(
    map: DynamicMap,
    block: usize,
    codes: View,
    absmax: View,
    mut out: ViewMut,
) -> Result<()> {
    let kernel = Kernel("dequantize_8bit");
    check_block(block)?;
    expect(kernel.0, "absmax", absmax.len(), codes.len().div_ceil(block))?;
    expect(kernel.0, "out", out.len(), codes.len())?;
    let (codes, absmax) = (kernel.elements("codes", codes)?, kernel.elements("absmax", absmax)?);
    kernel.elements_mut("out", &mut out)?.copy_from_slice(&decode(map, block, codes, absmax));
    Ok(())
}

/// Scales f32 [blocks] into codes u8 [blocks] and nested scales f32 [⌈blocks/256⌉]; returns their mean.
pub(crate) fn quantize_scales(absmax: View, mut codes: ViewMut, mut nested: ViewMut) -> Result<f32> {
    let kernel = Kernel("quantize_scales");
    expect(kernel.0, "codes", codes.len(), absmax.len())?;
    expect(kernel.0, "nested", nested.len(), absmax.len().div_ceil(NESTED_BLOCK))?;
    let absmax = kernel.elements::<f32>("absmax", absmax)?;
    let codes = kernel.elements_mut("codes", &mut codes)?;
    let nested = kernel.elements_mut("nested", &mut nested)?;
    check_finite(absmax)?;
    let sum: f64 = absmax.iter().map(|&scale| f64::from(scale)).sum();
    // A weight without elements has no scales and no mean; max(1) gives it 0.
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    let centred: Vec<f32> = absmax.iter().map(|scale| scale - offset).collect();
    // Scales of both signs near f32's limit can overflow here; an absmax has one sign.
    check_finite(&centred)?;
    encode(DynamicMap::Signed, NESTED_BLOCK, &centred, codes, nested);
    Ok(offset)
}
