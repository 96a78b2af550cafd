//! y_b = [p; x_b]: the same rows before each sequence of a batch, as learned tokens are.
//!
//! p [n, width]   x [batch · tokens, width]   y [batch · (n + tokens), width]
//!
//! Every row of y is one of p or of x, so dx_b is dy_b without its first n rows, and dp the sum over b of these.

use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct Prepend {
    p: Tensor,
    x: Tensor,
    batch: usize,
}

impl Prepend {
    /// Elements of p, and of a sequence of x.
    fn lengths(&self) -> [usize; 2] {
        [self.p.shape().elements(), self.x.shape().elements() / self.batch]
    }
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
        let op = Prepend { p: p.clone(), x: x.clone(), batch };
        let [own, each] = op.lengths();
        let rows = batch * p.shape().rows() + tokens;
        let mut y = self.alloc(x.dtype(), rows * width)?;
        for b in 0..batch {
            let first = b * (own + each);
            self.backend().copy(p.view(), y.slice_mut(first, own)?)?;
            self.backend().copy(x.view().slice(b * each, each)?, y.slice_mut(first + own, each)?)?;
        }
        self.record(y, [rows, width], &[p.variable(), x.variable()], |_| op)
    }
}

impl Op for Prepend {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let [own, each] = self.lengths();
        if let Some(variable) = self.p.variable() {
            let mut dp = gradients.take_for_adding(variable, grad.dtype(), own)?;
            for b in 0..self.batch {
                backend.add_in_place(grad.slice(b * (own + each), own)?, dp.view_mut())?;
            }
            gradients.put(variable, dp);
        }
        if let Some(variable) = self.x.variable() {
            let mut dx = backend.alloc(grad.dtype(), self.batch * each)?;
            for b in 0..self.batch {
                backend.copy(grad.slice(b * (own + each) + own, each)?, dx.slice_mut(b * each, each)?)?;
            }
            gradients.add(variable, dx)?;
        }
        Ok(())
    }
}
