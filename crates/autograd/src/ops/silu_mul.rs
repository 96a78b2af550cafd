//! y = silu(gate) ∘ up with silu(g) = g·σ(g): the gated feed-forward's activation (Shazeer 2020, SwiGLU).
//!
//! dgate = dy ∘ up ∘ σ(1 + gate(1 − σ)), dup = dy ∘ silu(gate); the kernel's comment derives it.
//!
//! gate and up are kept for that, so whoever needs y in backward makes it again from them.

use crate::gradients::output;
use crate::saved::Recipe;
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct SiluMul {
    gate: Tensor,
    up: Tensor,
}

impl Recipe for SiluMul {
    fn make(&self, backend: &dyn Backend) -> Result<Buffer> {
        let mut y = backend.alloc(self.gate.dtype(), self.gate.shape().elements())?;
        backend.silu_mul(self.gate.view(), self.up.view(), y.view_mut())?;
        Ok(y)
    }
}

impl Tape {
    /// silu(gate) ∘ up
    pub fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if gate.shape() != up.shape() {
            let expected = gate.shape().to_string();
            return Err(Error::Shape { op: "silu_mul", tensor: "up", expected, found: up.shape().clone() });
        }
        let op = Arc::new(SiluMul { gate: gate.clone(), up: up.clone() });
        let (y, inputs) = (op.make(self.backend().as_ref())?, [gate.variable(), up.variable()]);
        let y = self.record(y, gate.shape().clone(), &inputs, |_| op.clone())?;
        let recipe: Arc<dyn Recipe> = op;
        Ok(y.with_recipe(&recipe))
    }
}

impl Op for Arc<SiluMul> {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let (mut dgate, mut dup) = (gradients.slot(&self.gate)?, gradients.slot(&self.up)?);
        let (gate, up) = (self.gate.view(), self.up.view());
        backend.silu_mul_grad(gate, up, grad.view(), output(&mut dgate), output(&mut dup))?;
        gradients.add_slot(dgate)?;
        gradients.add_slot(dup)
    }
}
