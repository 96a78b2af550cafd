//! A base in 4 bits that is made for its update, out of the matrix that was quantised.
//!
//! ```text
//! LoftQ   Q, A, B by turns        ([`loftq`](mod@crate::loftq))
//! PiSSA   Q = quant(W − s·B₀·A₀), A₀ and B₀ of W        ([`start`](crate::start))
//! ```
//!
//! How Q is quantised is how the layer's base is: its format, its blocks, its kind of scales. Neither can begin on a
//! 4-bit checkpoint, which no longer has W. The update is a plain one beside Q, and belongs to that base alone.

use crate::attach::Plan;
use crate::loftq::{Found, loftq};
use crate::merge::merged_weight;
use crate::start::{balanced, check_start, taken_out_of};
use crate::{AdapterConfig, Attached, Error, Init, Linear, Lora, LoraSpec, Result, Weight};
use rankfold_autograd::{Base, Parameter, Tensor};
use rankfold_backend::{Backend, DType, Quantized, Scales, View};
use std::sync::Arc;

/// Attach updates that begin so on layers in 4 bits, whose bases are replaced by Q; `dense` reads the matrix that was
/// quantised by the layer's path.
///
/// Errors: those of [`attach_new`](crate::attach_new), and another start, before anything is changed; a base that is
/// dense; what `dense` refuses, or matrices of other shapes.
pub fn attach_remade(
    backend: &dyn Backend,
    layers: &mut [&mut Linear],
    config: &AdapterConfig,
    architecture: &str,
    dense: &dyn Fn(&str) -> Result<Vec<f32>>,
) -> Result<Attached> {
    config.check()?;
    if !matches!(config.init, Init::Loftq { .. } | Init::Pissa) {
        return Err(Error::field("init_lora_weights", config.init, "loftq or pissa"));
    }
    let plan = Plan::new(layers, config, architecture)?;
    let modules: Vec<(usize, LoraSpec)> = plan.modules().map(|(place, module)| (place, module.spec)).collect();
    for &(place, spec) in &modules {
        layers[place].check_whole()?;
        check_start(layers[place], spec, config.init)?;
        four_bits(layers[place])?;
    }
    let mut loras = Vec::new();
    for &(place, spec) in &modules {
        let layer = &mut *layers[place];
        let (like, w) = (four_bits(layer)?, dense(layer.path())?);
        if w.len() != like.elements() {
            return Err(Error::field(format!("{}: elements", layer.path()), w.len(), "those of its quantised matrix"));
        }
        let (q, a, b) = match config.init {
            Init::Loftq { iterations } => {
                let Found { q, a, b, .. } = loftq(backend, layer.path(), &w, &like, spec, iterations)?;
                (q, a, b)
            }
            _ => pissa(backend, layer.path(), &w, &like, spec)?,
        };
        layer.weight = Weight::Frozen(Base::Quantized(Arc::new(q)));
        let a = Parameter::new(backend.upload(&a)?, [spec.rank, layer.inputs()])?;
        let b = Parameter::new(backend.upload(&b)?, [layer.outputs(), spec.rank])?;
        loras.push(Lora::complete(backend, layer, a, b, spec)?);
    }
    let biases = plan.biases(backend, layers, None)?;
    let attached = plan.carry_out(backend, layers, loras, biases)?;
    modules.iter().for_each(|&(place, _)| layers[place].is_remade = true);
    Ok(attached)
}

/// Q, A₀ and B₀ of w.
fn pissa(
    backend: &dyn Backend,
    module: &str,
    w: &[f32],
    like: &Quantized,
    spec: LoraSpec,
) -> Result<(Quantized, Vec<f32>, Vec<f32>)> {
    let wide: Vec<f64> = w.iter().map(|w| f64::from(*w)).collect();
    let [a, b] = balanced(module, &wide, like.shape, spec)?;
    let start = taken_out_of(backend, module, like.shape, [&a, &b], spec)?;
    let w = Base::Dense(Tensor::constant(backend.upload(w)?, like.shape)?);
    let left = merged_weight(backend, module, &w, &start, DType::F32)?;
    Ok((requantised(backend, left.view(), like)?, a, b))
}

/// `w` in 4 bits, as `like` is in them.
pub(crate) fn requantised(backend: &dyn Backend, w: View, like: &Quantized) -> Result<Quantized> {
    let double = matches!(like.scales, Scales::Nested { .. });
    Ok(Quantized::quantize(backend, w, like.shape, like.format, like.block, double)?)
}

/// A layer's base, where it is in 4 bits.
pub(crate) fn four_bits(layer: &Linear) -> Result<Arc<Quantized>> {
    match layer.base() {
        Base::Quantized(q) => Ok(q),
        Base::Dense(w) => Err(Error::field(format!("{}: base", layer.path()), w.dtype(), "a base in 4 bits")),
    }
}
