//! y_i = x_i · k_i / (1 − p), k_i the counter-based coin of element i.
//!
//! Linear in x with a diagonal matrix, so dx is the same map applied to dy; the coins are drawn again, not saved.

use crate::{Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer, params};
use std::sync::Arc;

struct Dropout {
    p: params::Dropout,
    input: Option<Variable>,
}

impl Tape {
    /// Dropout of x; the identity where the probability is 0.
    pub fn dropout(&self, x: &Tensor, p: params::Dropout) -> Result<Tensor> {
        if p.probability == 0.0 {
            return Ok(x.clone());
        }
        let mut y = self.alloc(x.dtype(), x.shape().elements())?;
        self.backend().dropout(&p, x.view(), y.view_mut())?;
        let input = x.variable();
        self.record(y, x.shape().clone(), &[input], |_| Ok(Dropout { p, input }))
    }
}

impl Op for Dropout {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Some(input) = self.input else { return Ok(()) };
        let mut dx = backend.alloc(grad.dtype(), grad.len())?;
        backend.dropout(&self.p, grad.view(), dx.view_mut())?;
        gradients.add(input, dx)
    }
}
