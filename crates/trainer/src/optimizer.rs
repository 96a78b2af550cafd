//! AdamW over named parameters, and the clip of the gradient's norm.

use crate::{Error, Result};
use rankfold_autograd::{Gradients, Parameter};
use rankfold_backend::{Backend, Buffer, DType, params};
use std::sync::Arc;

/// A parameter with the name that its files use.
#[derive(Clone, Debug)]
pub struct Named {
    /// As in the adapter's or the model's file.
    pub name: String,
    /// The parameter.
    pub parameter: Parameter,
}

/// What stays the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// β1
    pub beta1: f64,
    /// β2
    pub beta2: f64,
    /// ε
    pub eps: f64,
    /// Decoupled decay, of matrices alone: norms and biases have none, as is the custom.
    pub weight_decay: f64,
}

impl Default for Hyper {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// One parameter with its moments.
#[derive(Debug)]
pub struct Slot {
    /// The parameter.
    pub named: Named,
    /// First moment.
    pub m: Buffer,
    /// Second moment.
    pub v: Buffer,
}

/// AdamW (Loshchilov & Hutter 2019).
#[derive(Debug)]
pub struct AdamW {
    backend: Arc<dyn Backend>,
    hyper: Hyper,
    /// Steps taken.
    pub step: u64,
    /// Parameters in the order of their files.
    pub slots: Vec<Slot>,
}

impl AdamW {
    /// Moments of zero for every parameter.
    pub fn new(backend: Arc<dyn Backend>, hyper: Hyper, parameters: Vec<Named>) -> Result<Self> {
        let slots = parameters
            .into_iter()
            .map(|named| {
                let zeros = || backend.filled(DType::F32, named.parameter.shape().elements(), 0.0);
                Ok(Slot { m: zeros()?, v: zeros()?, named })
            })
            .collect::<Result<_>>()?;
        Ok(Self { backend, hyper, step: 0, slots })
    }

    /// ‖gradient‖₂ over all parameters: the squares summed in f64, parameter by parameter.
    pub fn grad_norm(&self, gradients: &Gradients) -> Result<f64> {
        let mut sum = 0.0;
        for slot in &self.slots {
            if let Some(grad) = gradients.of(&slot.named.parameter) {
                sum += self.backend.sum_squares(grad.view())?;
            }
        }
        Ok(sum.sqrt())
    }

    /// That every value is finite: what a last update may have broken before any loss could show it.
    pub fn check_finite(&self) -> Result<()> {
        for Slot { named, .. } in &self.slots {
            let squares = self.backend.sum_squares(named.parameter.tensor().view())?;
            if !squares.is_finite() {
                return Err(Error::NotFinite {
                    step: self.step as usize,
                    what: "norm of a trained tensor",
                    value: squares,
                });
            }
        }
        Ok(())
    }

    /// One step at rate `lr`, every gradient multiplied by `grad_scale` first. A parameter that no loss reached has
    /// no gradient and stays.
    pub fn update(&mut self, gradients: &Gradients, lr: f64, grad_scale: f64) -> Result<()> {
        self.step += 1;
        let Hyper { beta1, beta2, eps, weight_decay } = self.hyper;
        for Slot { named, m, v } in &mut self.slots {
            let Some(grad) = gradients.of(&named.parameter) else { continue };
            let matrix = named.parameter.shape().dims().len() > 1;
            let weight_decay = if matrix { weight_decay } else { 0.0 };
            let p = params::AdamW { lr, beta1, beta2, eps, weight_decay, step: self.step, grad_scale };
            named.parameter.update(|value| {
                Ok(self.backend.adamw(&p, grad.view(), value.view_mut(), m.view_mut(), v.view_mut())?)
            })?;
        }
        Ok(())
    }
}

/// What the gradient is multiplied by so that its norm is at most `clip`; 0 switches the clip off.
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}
