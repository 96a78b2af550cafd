//! Sums of adapters: Σ_i w_i·ΔW_i, exactly, as one update of rank Σ_i r_i; and several adapters of one base, of which
//! one at a time is on it.
//!
//! With ΔW_i = s_i·B_i·A_i (AdaLoRA: s_i·B_i·E_i·A_i),
//!
//! ```text
//! Σ_i w_i ΔW_i = B·A,   A = [A_1; A_2; …],   B = [w_1 s_1 B_1 | w_2 s_2 B_2 E_2 | …]
//! ```
//!
//! so that α = r makes s = 1; [`of_rank`] makes a smaller one of it. A is copied, and an element of B is rounded once.
//! DoRA's update scales the base's rows and is no sum of anything.

use crate::decompose::{product, qr, svd, transposed};
use crate::lora::Part;
use crate::{Adapter, AdapterConfig, Error, Linear, Lora, LoraSpec, Names, PeftConfig, Result, Targets};
use rankfold_autograd::Parameter;
use rankfold_backend::Backend;
use std::collections::BTreeMap;

/// Σ_i w_i·ΔW_i of one layer's updates; `module` is for the message. Errors: none at all, a DoRA, other shapes, a
/// weight that is not finite, or with which B is not.
pub fn weighted_sum(backend: &dyn Backend, module: &str, parts: &[(f64, &Lora)]) -> Result<Lora> {
    let Some((_, first)) = parts.first() else {
        return Err(Error::field(format!("{module}: updates to sum"), 0, "one or more"));
    };
    let [outputs, inputs] = first.dims();
    let rank: usize = parts.iter().map(|(_, lora)| lora.rank()).sum();
    let mut a = Vec::with_capacity(rank * inputs);
    let mut b = vec![0.0; outputs * rank];
    let mut column = 0;
    for (weight, lora) in parts {
        if !weight.is_finite() {
            return Err(Error::field("weight", weight, "a finite number"));
        }
        if lora.dims() != [outputs, inputs] {
            let (expected, found) = (format!("[{}, {inputs}]", lora.rank()), lora.a().shape().clone());
            return Err(Error::Shape { module: module.into(), tensor: "lora_A", expected, found });
        }
        let scale = weight * f64::from(lora.spec().scale());
        let factors: Vec<f64> = match lora.part() {
            Part::None => vec![scale; lora.rank()],
            Part::Triplets { lambda, .. } => {
                let e = backend.download::<f32>(lambda.tensor().view())?;
                e.into_iter().map(|e| scale * f64::from(e)).collect()
            }
            Part::Magnitude(_) => return Err(Error::NoSum { module: module.into() }),
        };
        a.extend(backend.download::<f32>(lora.a().tensor().view())?);
        let theirs = backend.download::<f32>(lora.b().tensor().view())?;
        for (i, value) in theirs.into_iter().enumerate() {
            let (row, k) = (i / lora.rank(), i % lora.rank());
            let value = (factors[k] * f64::from(value)) as f32;
            if !value.is_finite() {
                let weight = format!("{weight:e}");
                return Err(Error::field(format!("{module}: weight"), weight, "one with which B is finite in f32"));
            }
            b[row * rank + column + k] = value;
        }
        column += lora.rank();
    }
    // A rank of 0, of pruned layers alone, is one of zeros.
    if rank == 0 {
        a = vec![0.0; inputs];
        b = vec![0.0; outputs];
    }
    let rank = rank.max(1);
    let a = Parameter::new(backend.upload(&a)?, [rank, inputs])?;
    let b = Parameter::new(backend.upload(&b)?, [outputs, rank])?;
    Lora::new(module, a, b, Part::None, LoraSpec::new(rank, rank as f64))
}

/// The best approximation of rank `rank` of an update s·B·A, with s = 1 (Eckart & Young 1936): nothing is lost where it
/// has no higher rank.
///
/// With B = Q_B R_B and Aᵀ = Q_A R_A the singular values of B A are those of the small R_B R_Aᵀ = U S Vᵀ; what is kept
/// of it is shared evenly, B' = Q_B U √S and A' = √S Vᵀ Q_Aᵀ. In f64, each element rounded once to f32.
///
/// Errors: those of [`weighted_sum`]; a rank of 0.
pub fn of_rank(backend: &dyn Backend, module: &str, lora: &Lora, rank: usize) -> Result<Lora> {
    let sum = weighted_sum(backend, module, &[(1.0, lora)])?;
    let ([outputs, inputs], inner) = (sum.dims(), sum.rank());
    let wide = |parameter: &Parameter| -> Result<Vec<f64>> {
        let values = backend.download::<f32>(parameter.tensor().view())?;
        Ok(values.into_iter().map(f64::from).collect())
    };
    let b = qr(&wide(sum.b())?, [outputs, inner], inner);
    let a = qr(&transposed(&wide(sum.a())?, [inner, inputs]), [inputs, inner], inner);
    let [m, n] = [outputs.min(inner), inputs.min(inner)];
    let core = product(&b.r, &transposed(&a.r, [n, inner]), [m, inner, n]);
    let kept = svd(module, &core, [m, n], rank)?;
    let found = kept.s.len();
    let root: Vec<f64> = kept.s.iter().map(|s| s.sqrt()).collect();
    let left = product(&b.q, &kept.u, [outputs, m, found]);
    let right = product(&kept.vt, &transposed(&a.q, [inputs, n]), [found, n, inputs]);
    // Where there are fewer triples than asked for, the rest is zero.
    let at = |values: &[f64], k: usize, index: usize| if k < found { (root[k] * values[index]) as f32 } else { 0.0 };
    let b: Vec<f32> = (0..outputs * rank).map(|i| at(&left, i % rank, i / rank * found + i % rank)).collect();
    let a: Vec<f32> = (0..rank * inputs).map(|i| at(&right, i / inputs, i)).collect();
    let a = Parameter::new(backend.upload(&a)?, [rank, inputs])?;
    let b = Parameter::new(backend.upload(&b)?, [outputs, rank])?;
    Lora::new(module, a, b, Part::None, LoraSpec::new(rank, rank as f64))
}

/// The configuration of plain updates with s = 1, as sums are: layers by path, each with its own rank.
pub fn config_of<'a>(layers: impl IntoIterator<Item = &'a Linear>) -> AdapterConfig {
    let ranks = layers.into_iter().filter_map(|layer| Some((layer.path().to_owned(), layer.adapter()?.rank())));
    let ranks: Vec<(String, usize)> = ranks.collect();
    let most = ranks.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
    let others = || ranks.iter().filter(|(_, rank)| *rank != most);
    AdapterConfig {
        spec: LoraSpec::new(most, most as f64),
        rank_pattern: others().cloned().collect(),
        alpha_pattern: others().map(|(path, rank)| (path.clone(), *rank as f64)).collect(),
        targets: Targets::Named(Names::List(ranks.iter().map(|(path, _)| path.clone()).collect())),
        ..AdapterConfig::default()
    }
}

/// Adapters of one base by name, their tensors in memory, one of them on the layers.
#[derive(Debug, Default)]
pub struct Rack {
    /// By name, then by the layer's place.
    adapters: BTreeMap<String, Vec<Option<Adapter>>>,
}

impl Rack {
    /// Take the adapter of this configuration off the layers and keep it under a name, in place of one that had it.
    ///
    /// Errors: one that is more than what sits on the layers ([`PeftConfig::check_alone`]); a layer whose base was made
    /// for it. It stays where it is.
    pub fn keep(&mut self, name: &str, config: &PeftConfig, layers: &mut [&mut Linear]) -> Result<()> {
        config.check_alone()?;
        layers.iter().try_for_each(|layer| layer.check_whole())?;
        let adapter = layers.iter_mut().map(|layer| layer.take_adapter()).collect::<Result<_>>()?;
        self.adapters.insert(name.into(), adapter);
        Ok(())
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Put the adapter of that name on the layers that it was taken from, in place of what is there: nothing is copied.
    ///
    /// Errors: no such name; other layers than those; what [`Linear::take_adapter`] refuses.
    pub fn put(&self, name: &str, layers: &mut [&mut Linear]) -> Result<()> {
        let adapter = self.of(name, layers.len())?;
        for (layer, adapter) in layers.iter_mut().zip(adapter) {
            layer.take_adapter()?;
            if let Some(adapter) = adapter {
                layer.set_adapter(adapter.clone())?;
            }
        }
        Ok(())
    }

    /// Put the sum of adapters on the layers, each times its weight.
    ///
    /// Errors: as [`Rack::put`], and as [`weighted_sum`].
    pub fn put_sum(&self, backend: &dyn Backend, parts: &[(f64, &str)], layers: &mut [&mut Linear]) -> Result<()> {
        let adapters = parts.iter().map(|(weight, name)| Ok((*weight, self.of(name, layers.len())?)));
        let adapters = adapters.collect::<Result<Vec<_>>>()?;
        for (place, layer) in layers.iter_mut().enumerate() {
            let mut parts: Vec<(f64, &Lora)> = Vec::new();
            for (weight, adapter) in &adapters {
                match &adapter[place] {
                    Some(Adapter::Lora(lora)) => parts.push((*weight, lora)),
                    Some(_) => return Err(Error::NoSum { module: layer.path().into() }),
                    None => {}
                }
            }
            layer.take_adapter()?;
            if !parts.is_empty() {
                let sum = weighted_sum(backend, layer.path(), &parts)?;
                layer.set_adapter(sum)?;
            }
        }
        Ok(())
    }

    fn of(&self, name: &str, layers: usize) -> Result<&[Option<Adapter>]> {
        match self.adapters.get(name) {
            Some(adapter) if adapter.len() == layers => Ok(adapter),
            Some(_) => Err(Error::field(format!("{name}: layers"), layers, "those that the adapter was taken from")),
            None => Err(Error::field("adapter", name, "a name that one is kept under")),
        }
    }
}
