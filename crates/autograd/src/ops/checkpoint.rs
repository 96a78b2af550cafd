//! y = f(x), remembering only x (Chen et al. 2016, "Training deep nets with sublinear memory cost").
//!
//! Forward runs f on a tape that forgets. Backward runs f again on a tape of its own, with x as a leaf, and walks
//! that tape at once: the gradients of f's parameters land where they always do, x's is handed on. Randomness is
//! counter-based, so the second run is the first one bit for bit, unless x was rounded meanwhile. A constant x stays
//! one in the second run, and where f trains nothing either, there is none. That tape keeps activations as the outer
//! one does.

use crate::saved::Saved;
use crate::{Gradients, Op, Result, SavedAs, Tape, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

type Function = dyn Fn(&Tape, &Tensor) -> Result<Tensor>;

struct Checkpoint {
    backend: Arc<dyn Backend>,
    x: Saved,
    saved_as: SavedAs,
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
        self.record_shared(&y, || {
            let (backend, saved_as) = (self.backend().clone(), self.saved_as);
            Ok(Checkpoint { backend, x: self.save(x)?, saved_as, f: Box::new(f) })
        })
    }
}

impl Op for Checkpoint {
    fn backward(self: Box<Self>, _: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { backend, x, saved_as, f } = *self;
        let tape = Tape::saving(backend.clone(), saved_as);
        let variable = x.variable();
        // From here on f's operations keep what they need of x.
        let leaf = tape.leaf(&x.get(backend.as_ref())?);
        drop(x);
        let y = f(&tape, &leaf)?;
        drop(leaf);
        let mut inner = Gradients::new(backend);
        std::mem::swap(&mut inner.parameters, &mut gradients.parameters);
        let walked = tape.backward(&y, grad, &mut inner);
        std::mem::swap(&mut inner.parameters, &mut gradients.parameters);
        walked?;
        // x is the first node where it is a variable, and there are none where y is a constant.
        match (variable, inner.nodes.first_mut().and_then(Option::take)) {
            (Some(outer), Some(dx)) => gradients.add(outer, dx),
            _ => Ok(()),
        }
    }
}
