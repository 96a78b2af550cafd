//! y_t = table_(ids_t). ∂y_t/∂table_v = 1 where ids_t = v, so dtable_v = Σ_(t: ids_t = v) dy_t.

use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::{Backend, Buffer, DType, params};
use std::sync::Arc;

struct Embedding {
    p: params::Embedding,
    ids: Arc<Buffer>,
    table: Tensor,
}

impl Tape {
    /// Rows of table [vocab, width] by ids u32 `[tokens]`, as `dtype`: the type that activations have.
    pub fn embedding(&self, ids: &Arc<Buffer>, table: &Tensor, dtype: DType) -> Result<Tensor> {
        let &[vocab, width] = table.shape().dims() else {
            let expected = "[vocab, width]".into();
            return Err(Error::Shape { op: "embedding", tensor: "table", expected, found: table.shape().clone() });
        };
        let p = params::Embedding { tokens: ids.len(), vocab, width };
        let mut y = self.alloc(dtype, p.tokens * width)?;
        self.backend().embedding(&p, ids.view(), table.view(), y.view_mut())?;
        let op = |_: &_| Ok(Embedding { p, ids: ids.clone(), table: table.clone() });
        self.record(y, [p.tokens, width], &[table.variable()], op)
    }
}

impl Op for Embedding {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Some(variable) = self.table.variable() else { return Ok(()) };
        let mut dtable = gradients.take_for_adding(variable, self.table.dtype(), self.p.vocab * self.p.width)?;
        backend.embedding_grad(&self.p, self.ids.view(), grad.view(), dtable.view_mut())?;
        gradients.put(variable, dtable);
        Ok(())
    }
}
