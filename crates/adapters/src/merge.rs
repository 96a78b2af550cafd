//! The update folded into the base: W' = W + s·B·A, and out of it again.
//!
//! W (f32, bf16 or f16; or the dequantised values of 4 bits) is taken in f32, s·B is rounded to f32, the product is
//! added, and the sum is rounded to the element type asked for. With u = 2⁻²⁴, r the rank and
//! M = |w| + |s|·Σ_k |b_k a_k|, an element is off by at most
//!
//! ```text
//! (r + 4)·u·M  +  half a unit in the last place of w'
//! ```
//!
//! (the contract's bound for a sum of r products and one more term, with a rounding of each s·b_k), before f32
//! underflows. Subtracting would not give W back; unmerging is exact because W is kept.

use crate::lora::Part;
use crate::{Adapter, Error, Linear, Lora, Result, Weight};
use rankfold_autograd::{Base, Parameter, Tensor, Value};
use rankfold_backend::params::{Layout, MatMul, Rows};
use rankfold_backend::{Backend, Buffer, Compute, DType, View};

/// What a merged layer was before.
#[derive(Clone, Debug)]
pub(crate) struct Unmerged {
    weight: Weight,
    bias: Option<Value>,
    adapter: Adapter,
}

/// The layer's matrix with its update folded in, [outputs, inputs] as `dtype`; W of 4 bits is dequantised.
///
/// `module` is for the message. Errors: values that are not finite in `dtype`.
pub fn merged_weight(backend: &dyn Backend, module: &str, base: &Base, lora: &Lora, dtype: DType) -> Result<Buffer> {
    let mut sum = updated(backend, base, lora)?;
    if let Part::Magnitude(m) = lora.part() {
        let inputs = lora.dims()[1];
        for (row, factor) in row_factors(backend, &sum, lora, m)?.into_iter().enumerate() {
            backend.scale_in_place(factor, sum.slice_mut(row * inputs, inputs)?)?;
        }
    }
    finite(backend, module, sum, dtype)
}

/// ‖W + s·B·A‖ of every row `[outputs]`.
pub(crate) fn update_norms(backend: &dyn Backend, base: &Base, lora: &Lora) -> Result<Buffer> {
    norms(backend, &updated(backend, base, lora)?, lora.dims())
}

/// ‖W‖ of every row `[outputs]`.
pub(crate) fn base_norms(backend: &dyn Backend, base: &Base) -> Result<Buffer> {
    norms(backend, &values(backend, base, DType::F32)?, base.dims()?)
}

fn norms(backend: &dyn Backend, sum: &Buffer, [rows, width]: [usize; 2]) -> Result<Buffer> {
    let mut norms = backend.alloc(sum.dtype(), rows)?;
    backend.row_norms(&Rows { rows, width }, sum.view(), norms.view_mut())?;
    Ok(norms)
}

/// m/‖·‖ of every row.
fn row_factors(backend: &dyn Backend, sum: &Buffer, lora: &Lora, m: &Parameter) -> Result<Vec<f64>> {
    let norms = norms(backend, sum, lora.dims())?;
    let mut factors = backend.alloc(norms.dtype(), norms.len())?;
    backend.divide(m.tensor().view(), norms.view(), factors.view_mut())?;
    Ok(match factors.dtype() {
        DType::F64 => backend.download(factors.view())?,
        _ => backend.download::<f32>(factors.view())?.into_iter().map(f64::from).collect(),
    })
}

/// W + s·B·A, or W + s·B·E·A, [outputs, inputs] in f32; in f64 where gradients are checked.
fn updated(backend: &dyn Backend, base: &Base, lora: &Lora) -> Result<Buffer> {
    let [outputs, inputs] = base.dims()?;
    let (a, b, rank) = (lora.a().tensor(), lora.b().tensor(), lora.rank());
    let working = a.dtype();
    let mut sum = values(backend, base, working)?;
    let mut scaled = backend.alloc(working, b.shape().elements())?;
    match lora.part() {
        Part::Triplets { lambda, .. } => {
            let p = Rows { rows: outputs, width: rank };
            backend.scale_columns(&p, b.view(), lambda.tensor().view(), scaled.view_mut())?;
        }
        _ => backend.copy(b.view(), scaled.view_mut())?,
    }
    backend.scale_in_place(f64::from(lora.spec().scale()), scaled.view_mut())?;
    let (layout, compute) = (Layout::Nn, Compute::F32);
    let p = MatMul { m: outputs, n: inputs, k: rank, layout, accumulate: true, compute };
    backend.matmul(&p, scaled.view(), a.view(), sum.view_mut())?;
    Ok(sum)
}

/// What a layer becomes when its adapter is folded in.
#[derive(Debug)]
pub struct Merged {
    /// W' [outputs, inputs], in the element type asked for.
    pub weight: Buffer,
    /// bias' `[outputs]` in f32, where it is another than the layer's.
    pub bias: Option<Buffer>,
}

/// A layer with what sits on it folded in, W' as `dtype`; nothing where nothing does.
///
/// Errors: an adapter that does not merge; values that are not finite in `dtype`.
pub fn merged(backend: &dyn Backend, layer: &Linear, dtype: DType) -> Result<Option<Merged>> {
    let (base, module) = (layer.base(), layer.path());
    let (weight, bias) = match layer.attached() {
        None => return Ok(None),
        Some(Adapter::Lora(lora)) => {
            let weight = merged_weight(backend, module, &base, lora, dtype)?;
            return Ok(Some(Merged { weight, bias: None }));
        }
        Some(Adapter::Bottleneck(_)) => {
            return Err(Error::NoMerge { module: module.into(), method: "a bottleneck" });
        }
        Some(Adapter::Ia3(ia3)) => ia3.merge(backend, layer, values(backend, &base, DType::F32)?)?,
        Some(Adapter::Bias(own)) => {
            (values(backend, &base, DType::F32)?, Some(cast(backend, own.bias.tensor().view(), DType::F32)?))
        }
        Some(Adapter::Diff(diff)) => (diff.merge(backend, values(backend, &base, DType::F32)?)?, None),
    };
    Ok(Some(Merged { weight: finite(backend, module, weight, dtype)?, bias }))
}

/// W in `dtype`, which for 4 bits is f32.
pub(crate) fn values(backend: &dyn Backend, base: &Base, dtype: DType) -> Result<Buffer> {
    match base {
        Base::Dense(w) => cast(backend, w.view(), dtype),
        Base::Quantized(quantized) => {
            let mut w = backend.alloc(DType::F32, quantized.elements())?;
            backend.dequantize_4bit(quantized, w.view_mut())?;
            Ok(w)
        }
    }
}

/// `sum` as `dtype`, every value finite.
fn finite(backend: &dyn Backend, module: &str, sum: Buffer, dtype: DType) -> Result<Buffer> {
    let working = sum.dtype();
    let merged = cast(backend, sum.view(), dtype)?;
    // The squares of f32 numbers sum to a finite f64, so this sees NaN and infinities and nothing else.
    if !backend.sum_squares(cast(backend, merged.view(), working)?.view())?.is_finite() {
        return Err(Error::MergeOverflow { module: module.into(), dtype });
    }
    Ok(merged)
}

impl Linear {
    /// Fold what sits on the layer into the base, which is kept beside it until [`Linear::unmerge`]. Without an
    /// adapter, nothing.
    ///
    /// The merged base has the element type of a dense base, and f32 for one of 4 bits. Memory: another base.
    pub fn merge(&mut self, backend: &dyn Backend) -> Result<()> {
        let base = self.base();
        let dtype = match &base {
            Base::Dense(tensor) => tensor.dtype(),
            Base::Quantized(_) => DType::F32,
        };
        let Some(Merged { weight, bias }) = merged(backend, self, dtype)? else { return Ok(()) };
        let tensor = Tensor::constant(weight, base.dims()?)?;
        let merged_bias = bias.map(|bias| Tensor::constant(bias, [self.outputs()])).transpose()?;
        let weight = std::mem::replace(&mut self.weight, Weight::Frozen(Base::Dense(tensor)));
        let bias = self.bias.clone();
        if let Some(merged) = merged_bias {
            self.bias = Some(Value::Frozen(merged));
        }
        self.unmerged = self.adapter.take().map(|adapter| Unmerged { weight, bias, adapter });
        Ok(())
    }

    /// The layer as it was before [`Linear::merge`], to the last bit. Without a merge, nothing.
    pub fn unmerge(&mut self) {
        if let Some(Unmerged { weight, bias, adapter }) = self.unmerged.take() {
            self.weight = weight;
            self.bias = bias;
            self.adapter = Some(adapter);
        }
    }
}

fn cast(backend: &dyn Backend, x: View, dtype: DType) -> Result<Buffer> {
    let mut out = backend.alloc(dtype, x.len())?;
    backend.cast(x, out.view_mut())?;
    Ok(out)
}
