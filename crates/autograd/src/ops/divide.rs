//! y = a / n with n a constant, elementwise, 0 where n is: DoRA's magnitudes over the norms that it detaches.
//!
//! da = dy / n.

use crate::{Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Divide {
    variable: Option<Variable>,
    n: Tensor,
}

impl Tape {
    /// a / n
    pub fn divide(&self, a: &Tensor, n: &Tensor) -> Result<Tensor> {
        if a.shape() != n.shape() {
            let expected = a.shape().to_string();
            return Err(Error::Shape { op: "divide", tensor: "n", expected, found: n.shape().clone() });
        }
        let mut y = self.alloc(a.dtype(), a.shape().elements())?;
        self.backend().divide(a.view(), n.view(), y.view_mut())?;
        let variable = a.variable();
        self.record(y, a.shape().clone(), &[variable], |_| Ok(Divide { variable, n: n.detach() }))
    }
}

impl Op for Divide {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Some(variable) = self.variable else { return Ok(()) };
        let mut da = backend.alloc(grad.dtype(), grad.len())?;
        backend.divide(grad.view(), self.n.view(), da.view_mut())?;
        gradients.add(variable, da)
    }
}
