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
use rankfold_backend::check_block;
use rankfold_backend::params::expect;
use rankfold_backend::{DType, DynamicMap, Error, Format, NESTED_BLOCK, Quantized, Result, Scales, View, ViewMut};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, buffer};
    use half::bf16;
    use proptest::prelude::*;
    use rankfold_backend::Element;

    fn quantize(format: Format, block: usize, w: &[impl Element]) -> Result<Quantized> {
        Quantized::quantize(BACKEND, BACKEND.upload(w)?.view(), [1, w.len()], format, block, false)
    }

    fn parts(q: &Quantized) -> (Vec<u8>, Vec<f32>) {
        let Scales::Plain(absmax) = &q.scales else { panic!("plain scales were asked for") };
        (BACKEND.download(q.codes.view()).unwrap(), BACKEND.download(absmax.view()).unwrap())
    }

    fn decoded(q: &Quantized) -> Vec<f32> {
        let mut out = BACKEND.alloc(DType::F32, q.elements()).unwrap();
        BACKEND.dequantize_4bit(q, out.view_mut()).unwrap();
        BACKEND.download(out.view()).unwrap()
    }

    #[test]
    fn a_zero_block_has_absmax_0_and_the_code_of_0() {
        for (format, byte) in [(Format::Nf4, 0x77), (Format::Fp4, 0x00), (Format::Int4, 0x88)] {
            let q = quantize(format, 32, &[0.0f32; 64]).unwrap();
            assert_eq!(parts(&q), (vec![byte; 32], vec![0.0; 2]));
            assert_eq!(decoded(&q), [0.0; 64]);
        }
    }

    #[test]
    fn a_short_last_block_has_its_own_scale_and_an_odd_count_is_padded() {
        let mut w = vec![1.0f32; 33];
        w[32] = -0.5;
        let (codes, absmax) = parts(&quantize(Format::Nf4, 32, &w).unwrap());
        assert_eq!(absmax, [1.0, 0.5]);
        assert_eq!((codes[..16].to_vec(), codes[16]), (vec![0xff; 16], 0x07));
        let none = quantize(Format::Nf4, 32, &[0.0f32; 0]).unwrap();
        assert_eq!(parts(&none), (vec![], vec![]));
    }

    #[test]
    fn a_tie_takes_the_lower_value_and_one_ulp_more_the_upper() {
        for format in Format::ALL {
            let thresholds = format.thresholds();
            for (i, &between) in thresholds.between.iter().enumerate() {
                // The 1 makes the scale 1, so that v is w.
                let (codes, _) = parts(&quantize(format, 32, &[1.0, 1.0, between, between.next_up()]).unwrap());
                assert_eq!((codes[1] >> 4, codes[1] & 15), (thresholds.codes[i], thresholds.codes[i + 1]));
            }
        }
    }

    #[test]
    fn what_cannot_be_quantised_is_named() {
        let mut w = vec![0.5f32; 40];
        w[35] = f32::INFINITY;
        w[37] = f32::NAN;
        let error = quantize(Format::Nf4, 32, &w).unwrap_err();
        assert_eq!(error, Error::NonFinite { index: 35, value: f64::INFINITY });
        assert_eq!(quantize(Format::Nf4, 48, &w).unwrap_err(), Error::Block { block: 48 });
        let w = buffer(&[0.5; 32]);
        let error = Quantized::quantize(BACKEND, w.view(), [1, 32], Format::Nf4, 32, false).unwrap_err();
        let expected = "f32, bf16 or f16";
        assert_eq!(error, Error::DType { kernel: "quantize_4bit", tensor: "w", expected, found: DType::F64 });
    }

    /// 4 bits a code, 8 a block, 32 every 256 blocks; the tensor's one mean apart.
    #[test]
    fn double_quantised_bits_a_parameter_are_4_126953125() {
        let w = BACKEND.filled(DType::Bf16, 1 << 20, 0.5).unwrap();
        let bits = |block, double| {
            let q = Quantized::quantize(BACKEND, w.view(), [1 << 10, 1 << 10], Format::Nf4, block, double).unwrap();
            let mean = if double { size_of::<f32>() } else { 0 };
            (q.bytes() - mean) as f64 * 8.0 / q.elements() as f64
        };
        assert_eq!(bits(64, true), 4.126953125);
        assert_eq!(bits(64, false), 4.5);
    }

    #[test]
    fn a_bf16_weight_has_the_codes_of_its_values() {
        let halves: Vec<bf16> = (0..64).map(|i| bf16::from_f32((i as f32 - 20.0) / 7.0)).collect();
        let singles: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
        let (q, same) = (quantize(Format::Fp4, 32, &halves).unwrap(), quantize(Format::Fp4, 32, &singles).unwrap());
        assert_eq!(parts(&q), parts(&same));
        let mut out = BACKEND.alloc(DType::Bf16, 64).unwrap();
        BACKEND.dequantize_4bit(&q, out.view_mut()).unwrap();
        let rounded: Vec<bf16> = decoded(&q).into_iter().map(bf16::from_f32).collect();
        assert_eq!(BACKEND.download::<bf16>(out.view()).unwrap(), rounded);
    }

    #[test]
    fn a_nested_scale_may_come_out_negative() {
        let scales = Scales::Nested {
            codes: BACKEND.upload(&[0u8]).unwrap(),
            absmax: BACKEND.upload(&[2.0f32]).unwrap(),
            offset: 0.5,
        };
        let codes = BACKEND.upload(&[0xf7u8]).unwrap();
        let q = Quantized { codes, scales, format: Format::Nf4, block: 64, shape: [1, 2] };
        let least = DynamicMap::Signed.values()[0];
        assert_eq!(decoded(&q), [least * 2.0 + 0.5, 0.0]);
        assert!(decoded(&q)[0] < 0.0);
    }

    /// Of 256 scales 40 are 0, the others c: with p = 40 / 256 the mean is (1 − p)·c, a centred c is p·c, the nested
    /// scale (1 − p)·c, and the map rounds p / (1 − p) up by 0.006: the sum is 1.005·c, while f32 ends at 1.004 times
    /// bf16's largest number.
    #[test]
    fn a_scale_that_double_quantisation_makes_infinite_is_refused_with_its_block() {
        let quantize = |largest: f32| {
            let mut w = vec![bf16::from_f32(largest); 256 * 32];
            w[..40 * 32].fill(bf16::ZERO);
            let w = BACKEND.upload(&w).unwrap();
            Quantized::quantize(BACKEND, w.view(), [256, 32], Format::Nf4, 32, true)
        };
        let error = quantize(bf16::MAX.to_f32()).unwrap_err();
        assert_eq!(error, Error::Scale { block: 40, value: f32::INFINITY });
        assert!(quantize(bf16::MAX.to_f32() / 2.0).is_ok());
    }

    proptest! {
        /// |w − ŵ| is at most half the widest gap of the format, times absmax; the f32 arithmetic (reciprocal,
        /// product, midpoint, product back) rounds by 2⁻²⁴ four times: absmax·2⁻²².
        #[test]
        fn the_error_stays_under_half_the_widest_gap(
            w in prop::collection::vec(-10.0f32..10.0, 1..200),
            exponent in -100i32..100,
            format in prop::sample::select(Format::ALL.to_vec()),
        ) {
            let w: Vec<f32> = w.into_iter().map(|w| w * 2f32.powi(exponent)).collect();
            let q = quantize(format, 32, &w).unwrap();
            let ((_, absmax), back) = (parts(&q), decoded(&q));
            for (i, (w, back)) in w.iter().zip(back).enumerate() {
                let bound = f64::from(absmax[i / 32]) * (f64::from(format.worst_error()) + 2f64.powi(-22));
                prop_assert!(f64::from(w - back).abs() <= bound, "{w} became {back}");
            }
        }

        /// A decoded tensor is its own quantisation: values and scales stay (FP4's two zeros aside, codes too). The
        /// exponents keep absmax normal, so that each value times its reciprocal is within 2 ulp of the code's own.
        #[test]
        fn quantising_again_changes_nothing(
            w in prop::collection::vec(-10.0f32..10.0, 1..200),
            exponent in -100i32..100,
            format in prop::sample::select(Format::ALL.to_vec()),
        ) {
            let w: Vec<f32> = w.into_iter().map(|w| w * 2f32.powi(exponent)).collect();
            let once = quantize(format, 32, &w).unwrap();
            let twice = quantize(format, 32, &decoded(&once)).unwrap();
            prop_assert_eq!(decoded(&once), decoded(&twice));
            prop_assert_eq!(parts(&once).1, parts(&twice).1);
        }
    }
}
