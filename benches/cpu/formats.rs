//! Formats: f32 and bf16 into 4 bits, with double quantisation, and back; into 8 bits and back; f32 and bf16 into each
//! other.

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::{Backend, DType, DynamicMap, Format, Quantized, Result};

const BLOCK: usize = 64;
const BLOCK_8BIT: usize = 256;
const FLOATS: [(&str, DType); 2] = [("f32", DType::F32), ("bf16", DType::Bf16)];

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let n = size.parameters;
    let shape = [n / size.width, size.width];
    // Codes, and a byte a block; the scales of these are next to nothing.
    let coded = n / 2 + n / BLOCK;
    for (name, dtype) in FLOATS {
        let float = n * dtype.size();
        let cost = Cost { read: float, written: coded, products: None };
        meter.measure(&format!("quantise {name} to nf4"), cost, || {
            let w = numbers.typed(b, dtype, n)?;
            Ok(move || Quantized::quantize(b, w.view(), shape, Format::Nf4, BLOCK, true).map(drop))
        });
        let cost = Cost { read: coded, written: float, products: None };
        meter.measure(&format!("dequantise nf4 to {name}"), cost, || {
            let w = numbers.f32(b, n)?;
            let codes = Quantized::quantize(b, w.view(), shape, Format::Nf4, BLOCK, true)?;
            let mut out = b.alloc(dtype, n)?;
            Ok(move || b.dequantize_4bit(&codes, out.view_mut()))
        });
    }

    let (float, coded) = (n * size_of::<f32>(), n + size_of::<f32>() * n / BLOCK_8BIT);
    meter.measure("quantise f32 to 8 bits", Cost { read: float, written: coded, products: None }, || {
        let w = numbers.f32(b, n)?;
        let (mut codes, mut absmax) = (b.alloc(DType::U8, n)?, b.alloc(DType::F32, n / BLOCK_8BIT)?);
        Ok(move || b.quantize_8bit(DynamicMap::Signed, BLOCK_8BIT, w.view(), codes.view_mut(), absmax.view_mut()))
    });
    meter.measure("dequantise 8 bits to f32", Cost { read: coded, written: float, products: None }, || {
        let (codes, absmax) = (b.filled(DType::U8, n, 200.0)?, b.filled(DType::F32, n / BLOCK_8BIT, 1.0)?);
        let mut out = b.alloc(DType::F32, n)?;
        Ok(move || b.dequantize_8bit(DynamicMap::Signed, BLOCK_8BIT, codes.view(), absmax.view(), out.view_mut()))
    });

    let [(_, f32), (_, bf16)] = FLOATS;
    for (name, from, to) in [("cast f32 to bf16", f32, bf16), ("cast bf16 to f32", bf16, f32)] {
        let cost = Cost { read: n * from.size(), written: n * to.size(), products: None };
        meter.measure(name, cost, || {
            let (x, mut out) = (numbers.typed(b, from, n)?, b.alloc(to, n)?);
            Ok(move || b.cast(x.view(), out.view_mut()))
        });
    }
    Ok(())
}
