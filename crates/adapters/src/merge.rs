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

use crate::{Error, Linear, Lora, Result, Weight};
use rankfold_autograd::{Base, Tensor};
use rankfold_backend::params::{Layout, MatMul};
use rankfold_backend::{Backend, Buffer, Compute, DType, View};

/// What a merged layer was before.
#[derive(Clone, Debug)]
pub(crate) struct Unmerged {
    weight: Weight,
    adapter: Lora,
}

/// W + s·B·A [outputs, inputs] as `dtype`; W of 4 bits is dequantised.
///
/// `module` is for the message. Errors: values that are not finite in `dtype`.
pub fn merged_weight(backend: &dyn Backend, module: &str, base: &Base, lora: &Lora, dtype: DType) -> Result<Buffer> {
    let [outputs, inputs] = base.dims()?;
    let (a, b) = (lora.a().tensor(), lora.b().tensor());
    // f32; f64 where gradients are checked.
    let working = a.dtype();
    let mut sum = match base {
        Base::Dense(w) => cast(backend, w.view(), working)?,
        Base::Quantized(quantized) => {
            let mut w = backend.alloc(DType::F32, outputs * inputs)?;
            backend.dequantize_4bit(quantized, w.view_mut())?;
            w
        }
    };
    let mut scaled = backend.alloc(working, b.shape().elements())?;
    backend.copy(b.view(), scaled.view_mut())?;
    backend.scale_in_place(f64::from(lora.spec().scale()), scaled.view_mut())?;
    let (layout, compute) = (Layout::Nn, Compute::F32);
    let p = MatMul { m: outputs, n: inputs, k: lora.spec().rank, layout, accumulate: true, compute };
    backend.matmul(&p, scaled.view(), a.view(), sum.view_mut())?;

    let merged = cast(backend, sum.view(), dtype)?;
    // The squares of f32 numbers sum to a finite f64, so this sees NaN and infinities and nothing else.
    if !backend.sum_squares(cast(backend, merged.view(), working)?.view())?.is_finite() {
        return Err(Error::MergeOverflow { module: module.into(), dtype });
    }
    Ok(merged)
}

impl Linear {
    /// Fold the update into the base, which is kept beside it until [`Linear::unmerge`]. Without an update, nothing.
    ///
    /// The merged base has the element type of a dense base, and f32 for one of 4 bits. Memory: another base.
    pub fn merge(&mut self, backend: &dyn Backend) -> Result<()> {
        let Some(lora) = &self.adapter else { return Ok(()) };
        let base = self.base();
        let dtype = match &base {
            Base::Dense(tensor) => tensor.dtype(),
            Base::Quantized(_) => DType::F32,
        };
        let merged = merged_weight(backend, &self.path, &base, lora, dtype)?;
        let tensor = Tensor::constant(merged, base.dims()?)?;
        let weight = std::mem::replace(&mut self.weight, Weight::Frozen(Base::Dense(tensor)));
        self.unmerged = self.adapter.take().map(|adapter| Unmerged { weight, adapter });
        Ok(())
    }

    /// The layer as it was before [`Linear::merge`], to the last bit. Without a merge, nothing.
    pub fn unmerge(&mut self) {
        if let Some(Unmerged { weight, adapter }) = self.unmerged.take() {
            self.weight = weight;
            self.adapter = Some(adapter);
        }
    }
}

fn cast(backend: &dyn Backend, x: View, dtype: DType) -> Result<Buffer> {
    let mut out = backend.alloc(dtype, x.len())?;
    backend.cast(x, out.view_mut())?;
    Ok(out)
}
