//! The optimiser.

use super::expect;
use crate::{Error, Result, View, ViewMut};

/// One step of Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// The learning rate of this step, schedule included.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The step's number, from 1: the bias correction's exponent.
    pub step: u64,
    /// What the gradient is multiplied by first: 1, or the clip's factor.
    pub grad_scale: f64,
}

impl AdamW {
    /// Lengths, and a step from 1.
    pub fn check(&self, grad: &View, param: &ViewMut, m: &ViewMut, v: &ViewMut) -> Result<()> {
        if self.step == 0 {
            return Err(Error::Invalid { kernel: "adamw", why: "step 0: expected 1 or more".into() });
        }
        expect("adamw", "param", param.len(), grad.len())?;
        expect("adamw", "m", m.len(), grad.len())?;
        expect("adamw", "v", v.len(), grad.len())
    }
}
