//! First values that are taken out of the base: PiSSA and OLoRA, and how they are exchanged.
//!
//! ```text
//! PiSSA   W = U S Vᵀ,  A₀ = √(S_r/s)·V_rᵀ,  B₀ = U_r·√(S_r/s)      (Meng et al. 2024, eq. 2–4)
//! OLoRA   W = Q R,     A₀ = R[:r],          B₀ = Q[:, :r]           (Büyükakyüz 2024, alg. 1)
//! ```
//!
//! What stays frozen is W₀ = W − s·B₀·A₀, in W's element type, and h = W₀ x + s·B A x begins as W x.
//!
//! In 4 bits W₀ = quant(W − s·B₀·A₀), in the base's own format, blocks and kind of scales: off by what that loses, as
//! plain quantisation is by what it loses of W. OLoRA's W is what the 4 bits stand for, as with PEFT, so that a 4-bit
//! checkpoint will do; PiSSA's is the matrix that was quantised (QPiSSA; Meng et al. 2024), whose largest parts 4 bits
//! have blurred ([`attach_remade`](crate::attach_remade)). The update is from then on a plain LoRA that belongs to W₀.
//!
//! Where W is dense, W₀ + s·B A = W + s·(B A − B₀ A₀), so that beside the original base the update is a plain LoRA of
//! rank 2r: [B, −B₀]·[A; A₀], with α doubled as well (× √2 where s = α/√r). That is what is written; only what a run
//! goes on from keeps A, B and A₀, B₀ apart. W₀ was rounded and W was not: beside the original base the update is off
//! by that rounding, as it is with PEFT.

use crate::decompose::{qr, qr_bytes, svd, svd_bytes};
use crate::lora::{Form, Part};
use crate::merge::{merged_weight, values};
use crate::remade::{four_bits, requantised};
use crate::{Adapter, AdapterConfig, Error, Init, Linear, Lora, LoraSpec, Result, Weight};
use rankfold_autograd::{Base, Parameter, Tensor};
use rankfold_backend::{Backend, Buffer, DType};
use std::sync::Arc;

/// A₀ [rank, inputs] and B₀ [outputs, rank] of a layer's base.
///
/// α is positive ([`AdapterConfig::check`]). Errors: PiSSA on 4 bits; a rank that the matrix does not have.
pub(crate) fn first_values(backend: &dyn Backend, layer: &Linear, spec: LoraSpec, init: Init) -> Result<[Vec<f32>; 2]> {
    let (dims, rank) = ([layer.outputs(), layer.inputs()], spec.rank);
    check_start(layer, spec, init)?;
    check_values(layer, init)?;
    let w = values(backend, &layer.base(), DType::F32)?;
    let w: Vec<f64> = backend.download::<f32>(w.view())?.into_iter().map(f64::from).collect();
    match init {
        Init::Olora => {
            let found = qr(&w, dims, rank);
            Ok([narrow(&found.r), narrow(&found.q)])
        }
        _ => balanced(layer.path(), &w, dims, spec),
    }
}

impl Init {
    /// Bytes that beginning so takes for a while, for a layer [outputs, inputs] with a base in 4 bits or a dense one: W
    /// in f32 and in f64, for LoftQ what is left of it too, and what the decomposition works in. PiSSA's remainder is
    /// formed in buffers of f32 before it is 4 bits.
    pub fn working_bytes(self, dims: [usize; 2], in_4_bits: bool) -> usize {
        let of_w = |bytes: usize| dims[0].saturating_mul(dims[1]).saturating_mul(bytes);
        match self {
            Self::Pissa if in_4_bits => of_w(4 + 8 + 4 * 4).saturating_add(svd_bytes(dims)),
            Self::Pissa => of_w(4 + 8).saturating_add(svd_bytes(dims)),
            Self::Olora => of_w(4 + 8).saturating_add(qr_bytes(dims)),
            Self::Loftq { .. } => of_w(3 * 4 + 2 * 8).saturating_add(svd_bytes(dims)),
            Self::Kaiming | Self::Gaussian | Self::Random => 0,
        }
    }
}

/// A and B with s·B A the best approximation of rank r of w, its singular values shared evenly.
pub(crate) fn balanced(module: &str, w: &[f64], [rows, columns]: [usize; 2], spec: LoraSpec) -> Result<[Vec<f32>; 2]> {
    check_rank(module, [rows, columns], spec)?;
    let (found, rank) = (svd(module, w, [rows, columns], spec.rank)?, spec.rank);
    let roots: Vec<f64> = found.s.iter().map(|s| (s / f64::from(spec.scale())).sqrt()).collect();
    let a: Vec<f64> = found.vt.iter().enumerate().map(|(i, v)| roots[i / columns] * v).collect();
    let b: Vec<f64> = found.u.iter().enumerate().map(|(i, u)| roots[i % rank] * u).collect();
    Ok([narrow(&a), narrow(&b)])
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

/// That a layer can begin so.
///
/// Errors: a base of another kind than the start needs; a rank that its matrix does not have.
pub(crate) fn check_start(layer: &Linear, spec: LoraSpec, init: Init) -> Result<()> {
    if init.changes_the_base() {
        check_rank(layer.path(), [layer.outputs(), layer.inputs()], spec)?;
    }
    match init {
        Init::Loftq { .. } => four_bits(layer).map(drop),
        _ => Ok(()),
    }
}

/// That a layer's own base has the values that a start decomposes.
fn check_values(layer: &Linear, init: Init) -> Result<()> {
    match (init, layer.base()) {
        (Init::Pissa, Base::Quantized(_)) => {
            let field = format!("{}: init_lora_weights", layer.path());
            Err(Error::field(field, init, "with it, a dense base or the one that was quantised"))
        }
        _ => Ok(()),
    }
}

/// That the layers of a start which takes something out of the base are all dense or all in 4 bits.
pub(crate) fn check_alike<'a>(layers: impl Iterator<Item = &'a Linear>, init: Init) -> Result<()> {
    let mut layers = layers.filter(|_| init.takes_from_the_base()).peekable();
    let is_dense = |layer: &Linear| matches!(layer.base(), Base::Dense(_));
    let first = layers.peek().map(|layer| is_dense(layer));
    match layers.find(|layer| Some(is_dense(layer)) != first) {
        Some(other) => {
            let found = if is_dense(other) { "dense" } else { "in 4 bits" };
            Err(Error::field(format!("{}: base", other.path()), found, "as the other targets' with this start"))
        }
        None => Ok(()),
    }
}

/// That a decomposition of `module`'s matrix has as many triples as the rank asks for.
fn check_rank(module: &str, dims: [usize; 2], spec: LoraSpec) -> Result<()> {
    match spec.is_wasteful(dims) {
        true => Err(Error::field(format!("{module}: r"), spec.rank, "no more than the matrix has by itself")),
        false => Ok(()),
    }
}

/// The update −s·B₀·A₀ of a layer whose base is to lose it.
///
/// Errors: PiSSA on 4 bits.
pub(crate) fn taken_out(
    backend: &dyn Backend,
    layer: &Linear,
    [a, b]: [&[f32]; 2],
    spec: LoraSpec,
    init: Init,
) -> Result<Lora> {
    check_values(layer, init)?;
    taken_out_of(backend, layer.path(), [layer.outputs(), layer.inputs()], [a, b], spec)
}

/// The same of a matrix [outputs, inputs] of `module`.
pub(crate) fn taken_out_of(
    backend: &dyn Backend,
    module: &str,
    [outputs, inputs]: [usize; 2],
    [a, b]: [&[f32]; 2],
    spec: LoraSpec,
) -> Result<Lora> {
    let a = Parameter::new(backend.upload(a)?, [spec.rank, inputs])?;
    let b = Parameter::new(backend.upload(b)?, [outputs, spec.rank])?;
    let spec = LoraSpec { alpha: -spec.alpha, form: Form::Plain, dropout: 0.0, ..spec };
    Lora::new(module, a, b, Part::None, spec)
}

/// W₀, what a layer's base is without `start`.
///
/// Errors: values that are not finite in the base's element type.
pub(crate) fn remainder(backend: &dyn Backend, layer: &Linear, start: &Lora) -> Result<Base> {
    let (base, dims) = (layer.base(), [layer.outputs(), layer.inputs()]);
    let left = |dtype| merged_weight(backend, layer.path(), &base, start, dtype);
    Ok(match &base {
        Base::Dense(w) => Base::Dense(Tensor::constant(left(w.dtype())?, dims)?),
        Base::Quantized(q) => Base::Quantized(Arc::new(requantised(backend, left(DType::F32)?.view(), q)?)),
    })
}

impl Linear {
    /// W₀ in place of W, where the adapter began by taking something out of it. In 4 bits W + s·(B A − B₀ A₀) is
    /// another matrix than the layer's, so that A₀ and B₀ are of no more use.
    ///
    /// Errors: those of [`remainder`].
    pub(crate) fn take_out(&mut self, backend: &dyn Backend) -> Result<()> {
        let Some(start) = self.adapter().and_then(Lora::start) else { return Ok(()) };
        let left = remainder(backend, self, start)?;
        if let (Base::Quantized(_), Some(Adapter::Lora(lora))) = (&left, &mut self.adapter) {
            lora.start = None;
        }
        self.weight = Weight::Frozen(left);
        self.is_remade = true;
        Ok(())
    }
}

/// [A; A₀] and [B, −B₀] of an update that began by taking A₀ and B₀ out of the base.
pub(crate) fn doubled(backend: &dyn Backend, lora: &Lora, start: &Lora) -> Result<[Parameter; 2]> {
    let ([outputs, inputs], rank) = (lora.dims(), lora.rank());
    let mut a = backend.alloc(DType::F32, 2 * rank * inputs)?;
    backend.copy(lora.a().tensor().view(), a.slice_mut(0, rank * inputs)?)?;
    backend.copy(start.a().tensor().view(), a.slice_mut(rank * inputs, rank * inputs)?)?;
    let [now, first] = [lora.b(), start.b()].map(|b| backend.download::<f32>(b.tensor().view()));
    let (now, first) = (now?, first?);
    let rows = now.chunks(rank).zip(first.chunks(rank));
    let b: Vec<f32> = rows.flat_map(|(now, first)| now.iter().copied().chain(first.iter().map(|b| -b))).collect();
    let b: Buffer = backend.upload(&b)?;
    Ok([Parameter::new(a, [2 * rank, inputs])?, Parameter::new(b, [outputs, 2 * rank])?])
}

impl AdapterConfig {
    /// The configuration of the same adapter beside the base that others have: of twice the rank where it began by
    /// taking something out of the base, and with a start that does nothing to it.
    pub fn exchanged(&self) -> Self {
        let mut config = self.clone();
        if self.init.takes_from_the_base() {
            let by = if self.spec.rslora { std::f64::consts::SQRT_2 } else { 2.0 };
            config.spec.rank *= 2;
            config.spec.alpha *= by;
            config.rank_pattern.iter_mut().for_each(|(_, rank)| *rank *= 2);
            config.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= by);
        }
        if self.init.changes_the_base() {
            config.init = Init::Kaiming;
        }
        config
    }
}
