//! y_b = [p; x_b]: the same rows before each sequence of a batch, as learned tokens are.
//!
//! p [n, width]   x [batch · tokens, width]   y [batch · (n + tokens), width]
//!
//! Every row of y is one of p or of x, so dx_b is dy_b without its first n rows, and dp the sum over b of these.

use crate::{Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Prepend {
    /// p and x.
    inputs: [Option<Variable>; 2],
    /// Elements of p, and of a sequence of x.
    lengths: [usize; 2],
    batch: usize,
}

impl Tape {
    /// p before each of the `batch` sequences of x.
    pub fn prepend(&self, p: &Tensor, x: &Tensor, batch: usize) -> Result<Tensor> {
        let (width, tokens) = (x.shape().width(), x.shape().rows());
        let wrong = |tensor, expected, found: &Tensor| {
            Err(Error::Shape { op: "prepend", tensor, expected, found: found.shape().clone() })
        };
        if p.shape().width() != width {
            return wrong("p", format!("[rows, {width}]"), p);
        }
        if batch == 0 || !tokens.is_multiple_of(batch) {
            return wrong("x", format!("[{batch} · tokens, {width}]"), x);
        }
        let [own, each] = [p.shape().elements(), x.shape().elements() / batch];
        let rows = batch * p.shape().rows() + tokens;
        let mut y = self.alloc(x.dtype(), rows * width)?;
        for b in 0..batch {
            let first = b * (own + each);
            self.backend().copy(p.view(), y.slice_mut(first, own)?)?;
            self.backend().copy(x.view().slice(b * each, each)?, y.slice_mut(first + own, each)?)?;
        }
        let inputs = [p.variable(), x.variable()];
        self.record(y, [rows, width], &inputs, |_| Ok(Prepend { inputs, lengths: [own, each], batch }))
    }
}

impl Op for Prepend {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { inputs: [p, x], lengths: [own, each], batch } = *self;
        if let Some(variable) = p {
            let mut dp = gradients.take_for_adding(variable, grad.dtype(), own)?;
            for b in 0..batch {
                backend.add_in_place(grad.slice(b * (own + each), own)?, dp.view_mut())?;
            }
            gradients.put(variable, dp);
        }
        if let Some(variable) = x {
            let mut dx = backend.alloc(grad.dtype(), batch * each)?;
            for b in 0..batch {
                backend.copy(grad.slice(b * (own + each) + own, each)?, dx.slice_mut(b * each, each)?)?;
            }
            gradients.add(variable, dx)?;
        }
        Ok(())
    }
}
