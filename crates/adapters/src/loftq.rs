//! LoftQ: a base in 4 bits and an update that makes up for what the 4 bits lost (Li et al. 2023, alg. 1).
//!
//! ```text
//! A, B = 0;  K times:  Q = quant(W − s·B A);  s·B A = the best approximation of rank r of W − Q
//! ```
//!
//! The two steps take turns at ‖W − Q − s·B A‖_F. The second never raises it; the first may, so that the Q, A and B of
//! the turn that left least are what is kept. Already the first turn, whose Q is the plain one, leaves no more than
//! plain quantisation does. (The paper's s is 1; PEFT leaves it out, the same where α = r, and keeps the last turn.)
//!
//! The base becomes Q, which is not quant(W): an adapter that began so belongs to that base alone.

use crate::attach::Plan;
use crate::decompose::product;
use crate::start::{balanced, check_start};
use crate::{AdapterConfig, Attached, Error, Init, Linear, LoraSpec, Result, Weight};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::{Backend, DType, Format, Quantized, Scales};
use std::sync::Arc;

/// Q with A [rank, inputs] and B [outputs, rank].
#[derive(Debug)]
pub struct Found {
    /// The base.
    pub q: Quantized,
    /// A.
    pub a: Vec<f32>,
    /// B.
    pub b: Vec<f32>,
    /// ‖W − Q − s·B A‖_F
    pub left: f64,
}

/// The best of `iterations` turns for w `[outputs, inputs]`, row-major, in NF4 with plain scales.
///
/// `module` is for the message. Errors: a rank that the matrix does not have; values that cannot be quantised.
pub fn loftq(
    backend: &dyn Backend,
    module: &str,
    w: &[f32],
    dims: [usize; 2],
    block: usize,
    spec: LoraSpec,
    iterations: usize,
) -> Result<Found> {
    let (rank, scale) = (spec.rank, f64::from(spec.scale()));
    let mut best: Option<Found> = None;
    let mut update = vec![0.0; w.len()];
    for _ in 0..iterations {
        let rest: Vec<f32> = w.iter().zip(&update).map(|(w, u)| (f64::from(*w) - u) as f32).collect();
        let q = Quantized::quantize(backend, backend.upload(&rest)?.view(), dims, Format::Nf4, block, false)?;
        let mut values = backend.alloc(DType::F32, w.len())?;
        backend.dequantize_4bit(&q, values.view_mut())?;
        let values: Vec<f32> = backend.download(values.view())?;
        let lost: Vec<f64> = w.iter().zip(&values).map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
        let [a, b] = balanced(module, &lost, dims, spec)?;
        let wide = |x: &[f32], by: f64| x.iter().map(|x| by * f64::from(*x)).collect::<Vec<f64>>();
        update = product(&wide(&b, scale), &wide(&a, 1.0), [dims[0], rank, dims[1]]);
        let left = lost.iter().zip(&update).map(|(lost, u)| (lost - u).powi(2)).sum::<f64>().sqrt();
        if best.as_ref().is_none_or(|best| left < best.left) {
            best = Some(Found { q, a, b, left });
        }
    }
    best.ok_or_else(|| Error::field("loftq_iter", iterations, "1 or more"))
}

/// Attach updates that begin with what NF4 lost of each layer's matrix, which `dense` reads by the layer's path.
///
/// The layers' bases are in NF4 with plain scales, and are replaced by Q. Errors: those of
/// [`attach_new`](crate::attach_new), before anything is changed; a base in another format; what `dense` refuses, or
/// matrices of other shapes.
pub fn attach_loftq(
    backend: &dyn Backend,
    layers: &mut [&mut Linear],
    config: &AdapterConfig,
    architecture: &str,
    dense: &dyn Fn(&str) -> Result<Vec<f32>>,
) -> Result<Attached> {
    config.check()?;
    let Init::Loftq { iterations } = config.init else {
        return Err(Error::field("init_lora_weights", config.init, "loftq"));
    };
    let plan = Plan::new(layers, config, architecture)?;
    let modules = || plan.modules().map(|(place, module)| (place, module.spec));
    for (place, spec) in modules() {
        check_start(layers[place], spec, config.init)?;
    }
    let mut loras = Vec::new();
    for (place, spec) in modules() {
        let layer = &mut *layers[place];
        let (dims, block, w) = ([layer.outputs(), layer.inputs()], block(layer)?, dense(layer.path())?);
        if w.len() != dims[0] * dims[1] {
            return Err(Error::field(format!("{}: elements", layer.path()), w.len(), "those of its quantised matrix"));
        }
        let Found { q, a, b, .. } = loftq(backend, layer.path(), &w, dims, block, spec, iterations)?;
        layer.weight = Weight::Frozen(Base::Quantized(Arc::new(q)));
        let a = Parameter::new(backend.upload(&a)?, [spec.rank, dims[1]])?;
        let b = Parameter::new(backend.upload(&b)?, [dims[0], spec.rank])?;
        loras.push(crate::Lora::complete(backend, layer, a, b, spec)?);
    }
    let biases = plan.biases(backend, layers, None)?;
    plan.carry_out(backend, layers, loras, biases)
}

/// The block of a base in NF4 with plain scales.
pub(crate) fn block(layer: &Linear) -> Result<usize> {
    let expected = "a base that is quantised to nf4 with plain scales";
    match layer.base() {
        Base::Quantized(q) if q.format == Format::Nf4 && matches!(q.scales, Scales::Plain(_)) => Ok(q.block),
        Base::Quantized(q) => {
            let double = if matches!(q.scales, Scales::Nested { .. }) { ", double" } else { "" };
            Err(Error::field(format!("{}: base", layer.path()), format!("{}{double}", q.format), expected))
        }
        Base::Dense(w) => Err(Error::field(format!("{}: base", layer.path()), w.dtype(), expected)),
    }
}
