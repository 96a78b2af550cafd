//! y = gain ∘ x / ρ, ρ = √(mean(x²) + ε) over the last dimension (Zhang & Sennrich 2019, eq. 4).
//!
//! Saved: x and 1/ρ of every row. The kernel's comment derives dx and dgain.

use crate::gradients::{Taken, output};
use crate::saved::Saved;
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer, params};
use std::sync::Arc;

struct RmsNorm {
    p: params::RmsNorm,
    x: Saved,
    gain: Tensor,
    inv_rms: Buffer,
}

impl Tape {
    /// Normalise the last dimension of x, of `gain`'s width (so a head at a time where x is [tokens, heads · width]).
    pub fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
        let width = gain.shape().elements();
        if width == 0 || !x.shape().width().is_multiple_of(width) {
            let expected = format!("rows of a multiple of {width}");
            return Err(Error::Shape { op: "rms_norm", tensor: "x", expected, found: x.shape().clone() });
        }
        let p = params::RmsNorm { rows: x.shape().elements() / width, width, eps };
        let mut y = self.alloc(x.dtype(), x.shape().elements())?;
        let mut inv_rms = self.alloc(x.dtype(), p.rows)?;
        self.backend().rms_norm(&p, x.view(), gain.view(), y.view_mut(), inv_rms.view_mut())?;
        let inputs = [x.variable(), gain.variable()];
        self.record(y, x.shape().clone(), &inputs, |_| Ok(RmsNorm { p, x: self.save(x)?, gain: gain.clone(), inv_rms }))
    }
}

impl Op for RmsNorm {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { p, x, gain, inv_rms } = *self;
        let x = x.get(backend)?;
        let mut dgain = gradients.slot_for_adding(gain.variable(), gain.dtype(), p.width)?;
        let (mut dx, accumulate) = match x.variable() {
            Some(variable) => {
                let Taken { buffer, accumulate } = gradients.take(variable, x.dtype(), x.shape().elements())?;
                (Some((variable, buffer)), accumulate)
            }
            None => (None, false),
        };
        backend.rms_norm_grad(
            &p,
            x.view(),
            gain.view(),
            inv_rms.view(),
            grad.view(),
            accumulate,
            output(&mut dx),
            output(&mut dgain),
        )?;
        for (variable, gradient) in [dx, dgain].into_iter().flatten() {
            gradients.put(variable, gradient);
        }
        Ok(())
    }
}
