//! 8 bits with a dynamic map, and double quantisation: the kernels of `kernels/quantize8.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use crate::ops::quantize4::{NonFinite, THREADS, TILE, blockwise, element};
use rankfold_backend::params::expect;
use rankfold_backend::{DType, DynamicMap, NESTED_BLOCK, Result, View, ViewMut, check_block};

/// Codes and absmax of x.
pub(crate) fn quantize_8bit(
    on: &CudaBackend,
    map: DynamicMap,
    block: usize,
    x: View,
    mut codes: ViewMut,
    mut absmax: ViewMut,
) -> Result<()> {
    let (call, n) = (&on.call("quantize_8bit"), x.len());
    check_block(block)?;
    expect(call.kernel, "codes", codes.len(), n)?;
    expect(call.kernel, "absmax", absmax.len(), n.div_ceil(block))?;
    let non_finite = NonFinite::new(call)?;
    let arguments = [
        call.f32("x", x)?,
        call.output("codes", DType::U8, &mut codes)?,
        call.f32_mut("absmax", &mut absmax)?,
        (n as u64).into(),
        block.ilog2().into(),
        on.tables.midpoints(map),
        non_finite.counter(),
    ];
    call.launch("quantize8_f32", blockwise(n, block), &arguments)?;
    non_finite.check(|index| element(on, x, index))
}

/// The mean of the scales, and what they differ from it by, quantised in 8 bits.
pub(crate) fn quantize_scales(on: &CudaBackend, absmax: View, mut codes: ViewMut, mut nested: ViewMut) -> Result<f32> {
    let (call, n) = (&on.call("quantize_scales"), absmax.len());
    expect(call.kernel, "codes", codes.len(), n)?;
    expect(call.kernel, "nested", nested.len(), n.div_ceil(NESTED_BLOCK))?;
    let scales = call.f32("absmax", absmax)?;
    let (codes, nested) = (call.output("codes", DType::U8, &mut codes)?, call.f32_mut("nested", &mut nested)?);
    let non_finite = NonFinite::new(call)?;

    let sum = call.scratch(DType::F64, 1)?;
    let arguments = [scales, (n as u64).into(), sum.output(), non_finite.counter()];
    call.launch("sum_in_order_f32", Grid::blocks(1, THREADS), &arguments)?;
    non_finite.check(|index| element(on, absmax, index))?;
    let mut total = 0f64;
    call.driver().download(sum.at(0), bytemuck::bytes_of_mut(&mut total))?;
    // A weight without elements has no scales and no mean: max(1) gives it 0.
    let mean = (total / n.max(1) as f64) as f32;

    let log_block = NESTED_BLOCK.ilog2().into();
    let midpoints = on.tables.midpoints(DynamicMap::Signed);
    let arguments = [scales, mean.into(), codes, nested, (n as u64).into(), log_block, midpoints, non_finite.counter()];
    call.launch("quantize_centred_f32", blockwise(n, NESTED_BLOCK), &arguments)?;
    non_finite.check(|index| Ok(f64::from(element(on, absmax, index)? as f32 - mean)))?;
    Ok(mean)
}

/// out_i = `map[code_i] · absmax_(i / block)`
pub(crate) fn dequantize_8bit(
    on: &CudaBackend,
    map: DynamicMap,
    block: usize,
    codes: View,
    absmax: View,
    mut out: ViewMut,
) -> Result<()> {
    let (call, n) = (&on.call("dequantize_8bit"), codes.len());
    check_block(block)?;
    expect(call.kernel, "absmax", absmax.len(), n.div_ceil(block))?;
    expect(call.kernel, "out", out.len(), n)?;
    let arguments = [
        call.input("codes", DType::U8, codes)?,
        call.f32("absmax", absmax)?,
        (n as u64).into(),
        block.ilog2().into(),
        on.tables.map(map),
        call.f32_mut("out", &mut out)?,
    ];
    call.launch("dequantize8_f32", Grid::blocks(n.div_ceil(TILE), THREADS), &arguments)
}

#[cfg(all(test, host_kernels))]
mod tests {
    use crate::CudaBackend;
    use rankfold_backend::{Backend, DType, Error};
    use rankfold_reference::ReferenceBackend;

    fn quantize_scales(backend: &dyn Backend, scales: &[f32]) -> Result<f32, Error> {
        let x = backend.upload(scales)?;
        let (mut codes, mut nested) = (backend.alloc(DType::U8, scales.len())?, backend.alloc(DType::F32, 1)?);
        backend.quantize_scales(x.view(), codes.view_mut(), nested.view_mut())
    }

    /// The mean of three largest numbers and a least one is half the largest; the last is 1.5 times that below it.
    #[test]
    fn a_scale_whose_distance_from_the_mean_is_infinite_is_named() {
        let scales = [f32::MAX, f32::MAX, f32::MAX, f32::MIN];
        let expected = Err(Error::NonFinite { index: 3, value: f64::NEG_INFINITY });
        assert_eq!(quantize_scales(&ReferenceBackend::new(), &scales), expected);
        assert_eq!(quantize_scales(&CudaBackend::on_host(None).unwrap(), &scales), expected);
    }
}
