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

/// Elements of a block of a [`Moment`].
pub const MOMENT_BLOCK: usize = 256;

/// A moment of n parameters in 8 bits, one of [`Backend::adamw_8bit`](crate::Backend::adamw_8bit)'s two: element i is
/// `map[codes_i] · absmax_(i / 256)`. It is 0, whatever the codes, where absmax is.
#[derive(Debug)]
pub struct Moment<'a> {
    /// u8 `[n]`.
    pub codes: ViewMut<'a>,
    /// f32 [⌈n / 256⌉].
    pub absmax: ViewMut<'a>,
}

impl AdamW {
    /// Lengths, and a step from 1.
    pub fn check(&self, grad: &View, param: &ViewMut, m: &ViewMut, v: &ViewMut) -> Result<()> {
        self.check_step("adamw")?;
        expect("adamw", "param", param.len(), grad.len())?;
        expect("adamw", "m", m.len(), grad.len())?;
        expect("adamw", "v", v.len(), grad.len())
    }

    /// The same for `adamw_8bit`.
    pub fn check_8bit(&self, grad: &View, param: &ViewMut, m: &Moment, v: &Moment) -> Result<()> {
        let (kernel, n, blocks) = ("adamw_8bit", grad.len(), grad.len().div_ceil(MOMENT_BLOCK));
        self.check_step(kernel)?;
        expect(kernel, "param", param.len(), n)?;
        expect(kernel, "m codes", m.codes.len(), n)?;
        expect(kernel, "m absmax", m.absmax.len(), blocks)?;
        expect(kernel, "v codes", v.codes.len(), n)?;
        expect(kernel, "v absmax", v.absmax.len(), blocks)
    }

    fn check_step(&self, kernel: &'static str) -> Result<()> {
        match self.step {
            0 => Err(Error::Invalid { kernel, why: "step 0: expected 1 or more".into() }),
            _ => Ok(()),
        }
    }
}
