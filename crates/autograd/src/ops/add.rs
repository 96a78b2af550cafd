//! y = a + b, both of one shape: the residual connection.
//!
//! ∂y/∂a = ∂y/∂b = 1, so both terms have the gradient of the sum: one buffer, shared.

use crate::{Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Add {
    inputs: [Option<Variable>; 2],
}

impl Tape {
    /// a + b
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if a.shape() != b.shape() {
            return Err(Error::Shape {
                op: "add",
                tensor: "b",
                expected: a.shape().to_string(),
                found: b.shape().clone(),
            });
        }
        let mut y = self.alloc(a.dtype(), a.shape().elements())?;
        self.backend().add(a.view(), b.view(), y.view_mut())?;
        let inputs = [a.variable(), b.variable()];
        self.record(y, a.shape().clone(), &inputs, |_| Ok(Add { inputs }))
    }
}

impl Op for Add {
    fn backward(self: Box<Self>, _: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        for variable in self.inputs.into_iter().flatten() {
            gradients.add(variable, grad.clone())?;
        }
        Ok(())
    }
}
