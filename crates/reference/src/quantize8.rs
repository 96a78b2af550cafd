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
use crate::thresholds;
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

/// Codes, and absmax into `scales`, of finite elements.
pub(crate) fn encode(map: DynamicMap, block: usize, x: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    let midpoints = thresholds::eight_bits(map);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::BACKEND;
    use proptest::prelude::*;
    use rankfold_backend::{DType, Error};

    fn quantize(map: DynamicMap, block: usize, x: &[f32]) -> Result<(Vec<u8>, Vec<f32>)> {
        let x = BACKEND.upload(x)?;
        let mut codes = BACKEND.alloc(DType::U8, x.len())?;
        let mut absmax = BACKEND.alloc(DType::F32, x.len().div_ceil(block))?;
        BACKEND.quantize_8bit(map, block, x.view(), codes.view_mut(), absmax.view_mut())?;
        Ok((BACKEND.download(codes.view())?, BACKEND.download(absmax.view())?))
    }

    fn quantize_scales(absmax: &[f32]) -> Result<(f32, Vec<u8>, Vec<f32>)> {
        let absmax = BACKEND.upload(absmax)?;
        let mut codes = BACKEND.alloc(DType::U8, absmax.len())?;
        let mut nested = BACKEND.alloc(DType::F32, absmax.len().div_ceil(NESTED_BLOCK))?;
        let offset = BACKEND.quantize_scales(absmax.view(), codes.view_mut(), nested.view_mut())?;
        Ok((offset, BACKEND.download(codes.view())?, BACKEND.download(nested.view())?))
    }

    #[test]
    fn the_maps_values_keep_their_codes() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let (codes, absmax) = quantize(map, 256, map.values()).unwrap();
            assert_eq!((codes, absmax), ((0..=255).collect(), vec![1.0]));
        }
    }

    /// Some midpoints are no f32; the nearest f32 on either side of each must still go to its own side.
    #[test]
    fn the_decision_is_exact_one_ulp_beside_every_midpoint() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            for (lower, pair) in map.values().windows(2).enumerate() {
                let exact = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
                let near = exact as f32;
                for v in [near.next_down(), near, near.next_up()] {
                    let expected = lower + usize::from(f64::from(v) > exact);
                    let (codes, _) = quantize(map, 32, &[1.0, v]).unwrap();
                    assert_eq!(usize::from(codes[1]), expected, "{v} beside {exact}");
                }
            }
        }
    }

    #[test]
    fn a_zero_block_has_absmax_0_and_decodes_to_zeros() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let (codes, absmax) = quantize(map, 32, &[0.0; 40]).unwrap();
            assert_eq!(absmax, [0.0; 2]);
            assert!(codes.iter().all(|&code| map.values()[usize::from(code)] == 0.0));
        }
    }

    #[test]
    fn what_cannot_be_quantised_is_named() {
        let error = quantize(DynamicMap::Signed, 32, &[0.0, f32::NEG_INFINITY]).unwrap_err();
        assert_eq!(error, Error::NonFinite { index: 1, value: f64::NEG_INFINITY });
        assert_eq!(quantize(DynamicMap::Signed, 100, &[0.0]).unwrap_err(), Error::Block { block: 100 });
        assert!(quantize_scales(&[1.0, f32::INFINITY]).is_err());
    }

    #[test]
    fn scales_are_centred_on_their_mean() {
        let (offset, codes, nested) = quantize_scales(&[1.0, 2.0, 3.0]).unwrap();
        let signed = DynamicMap::Signed.values();
        assert_eq!((offset, nested), (2.0, vec![1.0]));
        // −1 is not in the map: its nearest is the first value.
        let restored: Vec<f32> = codes.iter().map(|&code| signed[usize::from(code)] + offset).collect();
        assert_eq!(restored, [2.0 + signed[0], 2.0, 3.0]);
        assert_eq!(quantize_scales(&[]).unwrap(), (0.0, vec![], vec![]));
    }

    proptest! {
        #[test]
        fn every_code_is_the_nearest(
            x in prop::collection::vec(-1.0f32..1.0, 1..100),
            scale in prop::sample::select(vec![1.0f32, 1e-3, 1e-6]),
            map in prop::sample::select(vec![DynamicMap::Signed, DynamicMap::Unsigned]),
        ) {
            // A first element of 1 makes v = x, and the scale reaches the map's small values.
            let x: Vec<f32> = [1.0].into_iter().chain(x.into_iter().map(|x| x * scale)).collect();
            let (codes, _) = quantize(map, 128, &x).unwrap();
            for (x, code) in x.iter().zip(codes) {
                let distance = |code: usize| (f64::from(map.values()[code]) - f64::from(*x)).abs();
                let nearest = (1..256).fold(0, |best, c| if distance(c) < distance(best) { c } else { best });
                prop_assert_eq!(usize::from(code), nearest, "for {}", x);
            }
        }
    }
}
