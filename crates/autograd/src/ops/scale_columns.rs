//! y_ij = x_ij · f_j: (IA)³'s learned scales (Liu et al. 2022, §3.3); with one row, a product of vectors.
//!
//! x, y: [rows, width]   f: [width]
//!
//! dx_ij = dy_ij f_j;  df_j = Σ_i dy_ij x_ij, for f_j scales a whole column.

use crate::gradients::{Taken, output};
use crate::saved::Saved;
use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::params::Rows;
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

struct ScaleColumns {
    p: Rows,
    x: Saved,
    factors: Tensor,
}

impl Tape {
    /// Every row of x times the factors.
    pub fn scale_columns(&self, x: &Tensor, factors: &Tensor) -> Result<Tensor> {
        let (shape, width) = (x.shape(), factors.shape().elements());
        if shape.width() != width {
            let (expected, found) = (format!("[{}]", shape.width()), factors.shape().clone());
            return Err(Error::Shape { op: "scale_columns", tensor: "factors", expected, found });
        }
        let p = Rows { rows: shape.rows(), width };
        let mut y = self.alloc(x.dtype(), shape.elements())?;
        self.backend().scale_columns(&p, x.view(), factors.view(), y.view_mut())?;
        let inputs = [x.variable(), factors.variable()];
        self.record(y, shape.clone(), &inputs, |_| Ok(ScaleColumns { p, x: self.save(x)?, factors: factors.clone() }))
    }
}

impl Op for ScaleColumns {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { p, x, factors } = *self;
        let x = x.get(backend)?;
        let dtype = grad.dtype();
        let mut dfactors = gradients.slot_for_adding(factors.variable(), dtype, p.width)?;
        let mut dx = match x.variable() {
            Some(variable) => Some((variable, gradients.take(variable, dtype, x.shape().elements())?)),
            None => None,
        };
        let accumulate = dx.as_ref().is_some_and(|(_, taken)| taken.accumulate);
        let into = dx.as_mut().map(|(_, taken)| taken.buffer.view_mut());
        let (x, factors) = (x.view(), factors.view());
        backend.scale_columns_grad(&p, x, factors, grad.view(), accumulate, into, output(&mut dfactors))?;
        if let Some((variable, buffer)) = dfactors {
            gradients.put(variable, buffer);
        }
        if let Some((variable, Taken { buffer, .. })) = dx {
            gradients.put(variable, buffer);
        }
        Ok(())
    }
}
