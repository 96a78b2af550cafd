//! y = f(x), remembering only x (Chen et al. 2016, "Training deep nets with sublinear memory cost").
//!
//! Forward runs f on a tape that forgets. Backward runs f again on a tape of its own, with x as a leaf, and walks
//! that tape at once: the gradients of f's parameters land where they always do, x's is handed on. Randomness is
//! counter-based, so the second run is the first one bit for bit. A constant x stays one in the second run, and where
//! f trains nothing either, there is none.

use crate::{Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

type Function = dyn Fn(&Tape, &Tensor) -> Result<Tensor>;

struct Checkpoint {
    backend: Arc<dyn Backend>,
    x: Tensor,
    f: Box<Function>,
}

impl Tape {
    /// f(x), whose intermediate tensors are computed again in backward instead of kept.
    pub fn checkpoint(&self, x: &Tensor, f: impl Fn(&Tape, &Tensor) -> Result<Tensor> + 'static) -> Result<Tensor> {
        let forgetful = Tape::inference(self.backend().clone());
        let y = f(&forgetful, &x.detach())?;
        if !forgetful.trains() && x.variable().is_none() {
            return Ok(y);
        }
        Ok(self.record_shared(&y, || Checkpoint { backend: self.backend().clone(), x: x.clone(), f: Box::new(f) }))
    }
}

impl Op for Checkpoint {
    fn backward(self: Box<Self>, _: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let tape = Tape::new(self.backend.clone());
        let leaf = tape.leaf(&self.x);
        let y = (self.f)(&tape, &leaf)?;
        let mut inner = Gradients::new(self.backend);
        std::mem::swap(&mut inner.parameters, &mut gradients.parameters);
        let walked = tape.backward(&y, grad, &mut inner);
        std::mem::swap(&mut inner.parameters, &mut gradients.parameters);
        walked?;
        // x is the first node where it is a variable, and there are none where y is a constant.
        match (self.x.variable(), inner.nodes.first_mut().and_then(Option::take)) {
            (Some(outer), Some(dx)) => gradients.add(outer, dx),
            _ => Ok(()),
        }
    }
}
