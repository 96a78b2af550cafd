//! Sums of adapters: Σ_i w_i·ΔW_i, exactly, as one update of rank Σ_i r_i; and several adapters of one base, of which
//! one at a time is on it.
//!
//! With ΔW_i = s_i·B_i·A_i (AdaLoRA: s_i·B_i·E_i·A_i),
//!
//! ```text
//! Σ_i w_i ΔW_i = B·A,   A = [A_1; A_2; …],   B = [w_1 s_1 B_1 | w_2 s_2 B_2 E_2 | …]
//! ```
//!
//! so that α = r makes s = 1. A is copied, and an element of B is rounded once. DoRA's update scales the base's rows and
//! is no sum of anything.

use crate::lora::Part;
use crate::{Adapter, Error, Linear, Lora, LoraSpec, Result};
use rankfold_autograd::Parameter;
use rankfold_backend::Backend;
use std::collections::BTreeMap;

/// Σ_i w_i·ΔW_i of one layer's updates; `module` is for the message. Errors: none at all, a DoRA, other shapes, a
/// weight that is not finite.
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
            b[row * rank + column + k] = (factors[k] * f64::from(value)) as f32;
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

/// Adapters of one base by name, their tensors in memory, one of them on the layers.
#[derive(Debug, Default)]
pub struct Rack {
    /// By name, then by the layer's place.
    adapters: BTreeMap<String, Vec<Option<Adapter>>>,
}

impl Rack {
    /// Take the adapter off the layers and keep it under a name, in place of one that had it.
    pub fn keep(&mut self, name: &str, layers: &mut [&mut Linear]) {
        let adapter = layers.iter_mut().map(|layer| layer.take_adapter()).collect();
        self.adapters.insert(name.into(), adapter);
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Put the adapter of that name on the layers that it was taken from, in place of what is there: nothing is copied.
    ///
    /// Errors: no such name; other layers than those.
    pub fn put(&self, name: &str, layers: &mut [&mut Linear]) -> Result<()> {
        let adapter = self.of(name, layers.len())?;
        for (layer, adapter) in layers.iter_mut().zip(adapter) {
            layer.take_adapter();
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
            layer.take_adapter();
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
