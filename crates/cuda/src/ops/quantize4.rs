//! 4-bit weights, there and back: the kernels of `kernels/quantize4.cu`; and how other kernels are handed one.

use crate::call::{Call, Grid, Scratch};
use crate::tables::order;
use crate::{Argument, CudaBackend};
use half::{bf16, f16};
use rankfold_backend::params::expect;
use rankfold_backend::{
    Backend, DType, DynamicMap, Error, Format, Quantized, Result, Scales, View, ViewMut, check_block,
};

/// Threads of a block.
pub(crate) const THREADS: u32 = 256;

/// Elements that a block of threads decodes.
pub(crate) const TILE: usize = 4096;

/// The least index of an element that is NaN or infinite, as kernels find it.
pub(crate) struct NonFinite<'a> {
    call: &'a Call<'a>,
    index: Scratch,
}

impl<'a> NonFinite<'a> {
    const NONE: u64 = u64::MAX;

    /// None so far.
    pub(crate) fn new(call: &'a Call<'a>) -> Result<Self> {
        let index = call.scratch(DType::I64, 1)?;
        call.driver().upload(bytemuck::bytes_of(&Self::NONE), index.at(0))?;
        Ok(Self { call, index })
    }

    /// For a kernel to lower.
    pub(crate) fn counter(&self) -> Argument {
        Argument::counters(self.index.at(0))
    }

    /// The error where a kernel found one, with its value.
    pub(crate) fn check(&self, value: impl Fn(usize) -> Result<f64>) -> Result<()> {
        let mut index = Self::NONE;
        self.call.driver().download(self.index.at(0), bytemuck::bytes_of_mut(&mut index))?;
        match index {
            Self::NONE => Ok(()),
            index => Err(Error::NonFinite { index: index as usize, value: value(index as usize)? }),
        }
    }
}

/// An element of a float view.
pub(crate) fn element(on: &CudaBackend, x: View, index: usize) -> Result<f64> {
    let (on, x): (&dyn Backend, View) = (on, x.slice(index, 1)?);
    Ok(f64::from(match x.dtype() {
        DType::Bf16 => on.download::<bf16>(x)?[0].to_f32(),
        DType::F16 => on.download::<f16>(x)?[0].to_f32(),
        _ => on.download::<f32>(x)?[0],
    }))
}

/// The launch of a kernel of `kernels/blockwise.cuh`: a lane for each 8 elements of a block, at most a warp.
pub(crate) fn blockwise(n: usize, block: usize) -> Grid {
    let lanes = (block / 8).min(32);
    Grid::blocks((n.div_ceil(block) * lanes).div_ceil(THREADS as usize), THREADS)
}

/// Codes and absmax of w.
pub(crate) fn quantize_4bit(
    on: &CudaBackend,
    format: Format,
    block: usize,
    w: View,
    mut codes: ViewMut,
    mut absmax: ViewMut,
) -> Result<()> {
    let (call, n) = (&on.call("quantize_4bit"), w.len());
    check_block(block)?;
    expect(call.kernel, "codes", codes.len(), n.div_ceil(2))?;
    expect(call.kernel, "absmax", absmax.len(), n.div_ceil(block))?;
    call.float("w", w.dtype())?;
    let kernel = match w.dtype() {
        DType::Bf16 => "quantize4_bf16",
        DType::F16 => "quantize4_f16",
        _ => "quantize4_f32",
    };
    let non_finite = NonFinite::new(call)?;
    let arguments = [
        call.input("w", w.dtype(), w)?,
        call.output("codes", DType::U8, &mut codes)?,
        call.f32_mut("absmax", &mut absmax)?,
        (n as u64).into(),
        block.ilog2().into(),
        on.tables.thresholds(format),
        order(format).into(),
        non_finite.counter(),
    ];
    call.launch(kernel, blockwise(n, block), &arguments)?;
    non_finite.check(|index| element(on, w, index))
}

/// A weight whose lengths have been checked, as `struct Quantized` of `kernels/quantized.cuh` wants it.
pub(crate) fn weight(call: &Call, q: &Quantized) -> Result<[Argument; 7]> {
    let codes = call.input("codes", DType::U8, q.codes.view())?;
    let (absmax, scale_codes, offset) = match &q.scales {
        Scales::Plain(absmax) => (call.f32("absmax", absmax.view())?, Argument::input(DType::U8, 0), 0.0),
        Scales::Nested { codes, absmax, offset } => {
            let codes = call.input("scale codes", DType::U8, codes.view())?;
            (call.f32("nested absmax", absmax.view())?, codes, *offset)
        }
    };
    let (map, values) = (call.on.tables.map(DynamicMap::Signed), call.on.tables.values(q.format));
    Ok([codes, absmax, scale_codes, offset.into(), map, values, q.block.ilog2().into()])
}

/// That a weight is this backend's, of the types that it serves.
pub(crate) fn check(call: &Call, q: &Quantized) -> Result<()> {
    call.check("codes", DType::U8, &q.codes.view())?;
    match &q.scales {
        Scales::Plain(absmax) => call.check("absmax", DType::F32, &absmax.view()),
        Scales::Nested { codes, absmax, .. } => {
            call.check("scale codes", DType::U8, &codes.view())?;
            call.check("nested absmax", DType::F32, &absmax.view())
        }
    }
}

/// A checked weight as elements of a float type, at an address of the device.
pub(crate) fn decode(call: &Call, q: &Quantized, dtype: DType, to: u64) -> Result<()> {
    let kernel = match dtype {
        DType::Bf16 => "dequantize4_bf16",
        DType::F16 => "dequantize4_f16",
        _ => "dequantize4_f32",
    };
    let [codes, absmax, scale_codes, offset, map, values, log_block] = weight(call, q)?;
    let (n, out) = ((q.elements() as u64).into(), Argument::output(dtype, to));
    let arguments = [codes, absmax, scale_codes, offset, map, values, log_block, n, out];
    call.launch(kernel, Grid::blocks(q.elements().div_ceil(TILE), THREADS), &arguments)
}

/// out_i = `values[code_i] · scale_(i / block)`, rounded to out's type.
pub(crate) fn dequantize_4bit(on: &CudaBackend, q: &Quantized, mut out: ViewMut) -> Result<()> {
    let (call, dtype) = (&on.call("dequantize_4bit"), out.dtype());
    q.check()?;
    expect(call.kernel, "out", out.len(), q.elements())?;
    call.float("out", dtype)?;
    let to = call.output("out", dtype, &mut out)?;
    decode(call, q, dtype, to.value())
}
