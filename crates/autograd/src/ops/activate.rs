//! y = f(x), elementwise: ReLU, SiLU, tanh. dx = dy ∘ f'(x).

use crate::gradients::output;
use crate::saved::Saved;
use crate::{Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::params::Activation;
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Activate {
    f: Activation,
    x: Saved,
}

impl Tape {
    /// f(x)
    pub fn activate(&self, f: Activation, x: &Tensor) -> Result<Tensor> {
        let mut y = self.alloc(x.dtype(), x.shape().elements())?;
        self.backend().activate(f, x.view(), y.view_mut())?;
        self.record(y, x.shape().clone(), &[x.variable()], |_| Ok(Activate { f, x: self.save(x)? }))
    }
}

impl Op for Activate {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let x = self.x.get(backend)?;
        let mut dx = gradients.slot(&x)?;
        if let Some(into) = output(&mut dx) {
            backend.activate_grad(self.f, x.view(), grad.view(), into)?;
        }
        gradients.add_slot(dx)
    }
}
