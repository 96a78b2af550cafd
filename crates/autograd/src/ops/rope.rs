//! Rotary position embedding (Su et al. 2021, eq. 34): each pair of a head turns by its position's angle.
//!
//! A rotation is orthogonal, so the gradient is turned back by the same angle. Nothing of x is saved.

use crate::{Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer, params};
use std::sync::Arc;

struct Rope {
    p: params::Rope,
    positions: Arc<Buffer>,
    cos: Tensor,
    sin: Tensor,
    input: Option<Variable>,
}

impl Tape {
    /// Turn x [tokens, heads · head_dim]; positions u32 `[tokens]`; cos, sin [positions, head_dim / 2].
    pub fn rope(&self, x: &Tensor, positions: &Arc<Buffer>, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let head_dim = 2 * cos.shape().width();
        let (tokens, heads) = (x.shape().rows(), x.shape().width() / head_dim.max(1));
        let p = params::Rope { tokens, heads, head_dim, inverse: false };
        let mut y = self.alloc(x.dtype(), x.shape().elements())?;
        self.backend().rope(&p, x.view(), positions.view(), cos.view(), sin.view(), y.view_mut())?;
        let input = x.variable();
        self.record(y, x.shape().clone(), &[input], |_| {
            Ok(Rope { p, positions: positions.clone(), cos: cos.clone(), sin: sin.clone(), input })
        })
    }
}

impl Op for Rope {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Some(input) = self.input else { return Ok(()) };
        let p = params::Rope { inverse: true, ..self.p };
        let mut dx = backend.alloc(grad.dtype(), grad.len())?;
        backend.rope(&p, grad.view(), self.positions.view(), self.cos.view(), self.sin.view(), dx.view_mut())?;
        gradients.add(input, dx)
    }
}
