//! 4 and 8 bits, there and back. Every call that quantises waits for its answer: whether a number was not finite.

use crate::meter::{Case, Meter};
use crate::sizes::{Numbers, Sizes, count};
use rankfold_backend::{Backend, DType, DynamicMap, Format, NESTED_BLOCK, Quantized, Result};
use rankfold_cuda::CudaBackend;

/// Elements of a block, in 4 bits and in 8.
const BLOCK: usize = 64;
const BLOCK_8BIT: usize = 256;

/// Bytes of an element's share in its block's scale: an f32, or a code and its share in the scale of scales.
fn scale_bytes(double: bool) -> f64 {
    (if double { 1.0 + 4.0 / NESTED_BLOCK as f64 } else { 4.0 }) / BLOCK as f64
}

pub fn measure(backend: &CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    for &n in sizes.elements {
        four_bits(backend, meter, numbers, n)?;
        eight_bits(backend, meter, numbers, n)?;
    }
    Ok(())
}

fn name(kernel: &str, dtype: DType, double: bool) -> String {
    format!("{kernel} {dtype}{}", if double { ", double" } else { "" })
}

fn four_bits(backend: &CudaBackend, meter: &mut Meter, numbers: &Numbers, n: usize) -> Result<()> {
    let (b, driver, blocks): (&dyn Backend, _, _) = (backend, backend.driver(), n / BLOCK);
    for dtype in [DType::F32, DType::Bf16] {
        let w = numbers.typed(b, dtype, n, 0)?;
        let (mut codes, mut absmax) = (b.alloc(DType::U8, n / 2)?, b.alloc(DType::F32, blocks)?);
        let (mut scale_codes, mut nested) =
            (b.alloc(DType::U8, blocks)?, b.alloc(DType::F32, blocks.div_ceil(NESTED_BLOCK))?);
        for double in [false, true] {
            let case = Case::new(name("quantize_4bit", dtype, double), count(n));
            let case = case.elements(n, dtype.size() as f64 + 0.5 + scale_bytes(double));
            meter.measure(driver, case, |_| {
                b.quantize_4bit(Format::Nf4, BLOCK, w.view(), codes.view_mut(), absmax.view_mut())?;
                if double {
                    b.quantize_scales(absmax.view(), scale_codes.view_mut(), nested.view_mut())?;
                }
                Ok(())
            });
        }
        if dtype == DType::F32 {
            let case = Case::new("quantize_scales", count(n)).elements(blocks, 5.0 + 4.0 / NESTED_BLOCK as f64);
            meter.measure(driver, case, |_| {
                b.quantize_scales(absmax.view(), scale_codes.view_mut(), nested.view_mut()).map(drop)
            });
        }
        let mut out = b.alloc(dtype, n)?;
        for double in [false, true] {
            let q = Quantized::quantize(b, w.view(), [blocks, BLOCK], Format::Nf4, BLOCK, double)?;
            let case = Case::new(name("dequantize_4bit", dtype, double), count(n));
            let case = case.elements(n, dtype.size() as f64 + 0.5 + scale_bytes(double));
            meter.measure(driver, case, |_| b.dequantize_4bit(&q, out.view_mut()));
        }
    }
    Ok(())
}

fn eight_bits(backend: &CudaBackend, meter: &mut Meter, numbers: &Numbers, n: usize) -> Result<()> {
    let (b, driver, map): (&dyn Backend, _, _) = (backend, backend.driver(), DynamicMap::Signed);
    let (x, mut out) = (numbers.f32(b, n, 0)?, b.alloc(DType::F32, n)?);
    let (mut codes, mut absmax) = (b.alloc(DType::U8, n)?, b.alloc(DType::F32, n.div_ceil(BLOCK_8BIT))?);
    let case = |kernel| Case::new(kernel, count(n)).elements(n, 5.0 + 4.0 / BLOCK_8BIT as f64);
    meter.measure(driver, case("quantize_8bit"), |_| {
        b.quantize_8bit(map, BLOCK_8BIT, x.view(), codes.view_mut(), absmax.view_mut())
    });
    meter.measure(driver, case("dequantize_8bit"), |_| {
        b.dequantize_8bit(map, BLOCK_8BIT, codes.view(), absmax.view(), out.view_mut())
    });
    Ok(())
}
