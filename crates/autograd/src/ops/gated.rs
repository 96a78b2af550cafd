//! y = z ∘ x with a hard concrete gate z of log α (Louizos et al. 2018): diff pruning's sparse difference.
//!
//! log α, z, x, y: one shape. dx = dy ∘ z;  dz = dy ∘ x, which the gate's kernel carries on to log α. z is drawn again
//! in backward, from the same counters, so that nothing is saved but what is there anyway.

use crate::gradients::output;
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::params::{HardConcrete, Rows};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Gated {
    p: HardConcrete,
    log_alpha: Tensor,
    x: Tensor,
}

impl Gated {
    fn z(&self, backend: &dyn Backend) -> Result<Buffer> {
        let mut z = backend.alloc(self.log_alpha.dtype(), self.log_alpha.shape().elements())?;
        backend.hard_concrete(&self.p, self.log_alpha.view(), z.view_mut())?;
        Ok(z)
    }
}

impl Tape {
    /// z ∘ x
    pub fn gated(&self, p: HardConcrete, log_alpha: &Tensor, x: &Tensor) -> Result<Tensor> {
        if log_alpha.shape() != x.shape() {
            let expected = x.shape().to_string();
            return Err(Error::Shape { op: "gated", tensor: "log_alpha", expected, found: log_alpha.shape().clone() });
        }
        let op = Gated { p, log_alpha: log_alpha.clone(), x: x.clone() };
        let z = op.z(self.backend().as_ref())?;
        let mut y = self.alloc(x.dtype(), z.len())?;
        self.backend().scale_columns(&row(&z), x.view(), z.view(), y.view_mut())?;
        self.record(y, x.shape().clone(), &[log_alpha.variable(), x.variable()], |_| Ok(op))
    }
}

impl Op for Gated {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let z = self.z(backend)?;
        let mut dx = gradients.slot(&self.x)?;
        if let Some(into) = output(&mut dx) {
            backend.scale_columns(&row(&z), grad.view(), z.view(), into)?;
        }
        gradients.add_slot(dx)?;
        let len = z.len();
        let mut dlog_alpha = gradients.slot_for_adding(self.log_alpha.variable(), self.log_alpha.dtype(), len)?;
        if let Some(into) = output(&mut dlog_alpha) {
            let mut dz = z;
            backend.scale_columns(&row(&grad), grad.view(), self.x.view(), dz.view_mut())?;
            backend.hard_concrete_grad(&self.p, self.log_alpha.view(), dz.view(), 0.0, into)?;
        }
        if let Some((variable, gradient)) = dlog_alpha {
            gradients.put(variable, gradient);
        }
        Ok(())
    }
}

/// All of it as one row, so that a factor a column is one an element.
fn row(x: &Buffer) -> Rows {
    Rows { rows: 1, width: x.len() }
}
