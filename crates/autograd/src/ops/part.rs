//! y = x[rows, columns]: a part of a matrix, copied.
//!
//! Every element of y is one of x, so dy is added to those and the others get nothing.

use crate::{Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::{Backend, Buffer};
use std::ops::Range;
use std::sync::Arc;

struct Part {
    input: Option<Variable>,
    /// Of x.
    elements: usize,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Part {
    /// Stretches that lie together in both: (place in x, place in y, length).
    fn stretches(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (width, columns) = (self.width, self.columns.len());
        // Whole rows lie together.
        let (count, len) = match columns == width {
            true => (1, self.rows.len() * width),
            false => (self.rows.len(), columns),
        };
        let first = self.rows.start * width + self.columns.start;
        (0..count).map(move |i| (first + i * width, i * columns, len))
    }
}

impl Tape {
    /// A part of the matrix x; a vector is one row.
    pub fn part(&self, x: &Tensor, rows: Range<usize>, columns: Range<usize>) -> Result<Tensor> {
        if rows.start > rows.end
            || rows.end > x.shape().rows()
            || columns.start > columns.end
            || columns.end > x.shape().width()
        {
            let expected = format!("at least [{}, {}]", rows.end, columns.end);
            return Err(Error::Shape { op: "part", tensor: "x", expected, found: x.shape().clone() });
        }
        let dims = [rows.len(), columns.len()];
        let (elements, width) = (x.shape().elements(), x.shape().width());
        let op = Part { input: x.variable(), elements, width, rows, columns };
        let mut y = self.alloc(x.dtype(), dims[0] * dims[1])?;
        for (from, to, len) in op.stretches() {
            self.backend().copy(x.view().slice(from, len)?, y.slice_mut(to, len)?)?;
        }
        self.record(y, dims, &[x.variable()], |_| Ok(op))
    }
}

impl Op for Part {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Some(variable) = self.input else { return Ok(()) };
        let mut dx = gradients.take_for_adding(variable, grad.dtype(), self.elements)?;
        for (from, to, len) in self.stretches() {
            backend.add_in_place(grad.slice(to, len)?, dx.slice_mut(from, len)?)?;
        }
        gradients.put(variable, dx);
        Ok(())
    }
}
