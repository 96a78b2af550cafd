//! y = silu(gate) ∘ up with silu(g) = g·σ(g): the gated feed-forward's activation (Shazeer 2020, SwiGLU).
//!
//! dgate = dy ∘ up ∘ σ(1 + gate(1 − σ)), dup = dy ∘ silu(gate); the kernel's comment derives it.
//!
//! gate and up are kept for that, so whoever needs y in backward makes it again from them.

use crate::gradients::output;
use crate::saved::{Recipe, Saved};
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct SiluMul {
    gate: Saved,
    up: Saved,
}

fn silu_mul(backend: &dyn Backend, gate: &Tensor, up: &Tensor) -> Result<Buffer> {
    let mut y = backend.alloc(gate.dtype(), gate.shape().elements())?;
    backend.silu_mul(gate.view(), up.view(), y.view_mut())?;
    Ok(y)
}

impl Recipe for SiluMul {
    fn make(&self, backend: &dyn Backend) -> Result<Buffer> {
        silu_mul(backend, &self.gate.get(backend)?, &self.up.get(backend)?)
    }
}

impl Tape {
    /// silu(gate) ∘ up
    pub fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if gate.shape() != up.shape() {
            let expected = gate.shape().to_string();
            return Err(Error::Shape { op: "silu_mul", tensor: "up", expected, found: up.shape().clone() });
        }
        let (y, inputs) = (silu_mul(self.backend().as_ref(), gate, up)?, [gate.variable(), up.variable()]);
        let mut recipe: Option<Arc<dyn Recipe>> = None;
        let y = self.record(y, gate.shape().clone(), &inputs, |_| {
            let op = Arc::new(SiluMul { gate: self.save(gate)?, up: self.save(up)? });
            recipe = Some(op.clone());
            Ok(op)
        })?;
        Ok(match recipe {
            Some(recipe) => y.with_recipe(&recipe),
            None => y,
        })
    }
}

impl Op for Arc<SiluMul> {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let (gate, up) = (self.gate.get(backend)?, self.up.get(backend)?);
        let (mut dgate, mut dup) = (gradients.slot(&gate)?, gradients.slot(&up)?);
        backend.silu_mul_grad(gate.view(), up.view(), grad.view(), output(&mut dgate), output(&mut dup))?;
        gradients.add_slot(dgate)?;
        gradients.add_slot(dup)
    }
}
