//! L = Σ_t −log softmax(x_t Wᵀ)[label_t] / N over the kept targets: the output head and its loss in one node.
//!
//! The logits [tokens, vocab] are the largest tensor of a language model's step, and never exist here: they are
//! formed for a chunk of tokens at a time. With z = x Wᵀ, dL/dz = (softmax(z) − onehot(label)) / N, which overwrites
//! the chunk; then dx = dz W and, where the head is trained, dW += dzᵀ x. Both are formed in forward, while the
//! logits are there, and only scaled in backward: the head is multiplied twice (three times if trained), not once
//! more to form the logits again.

use crate::{Base, Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::params::{CrossEntropy, Linear};
use rankfold_backend::{Backend, Buffer, Compute, DType, LinearGrads};
use std::sync::Arc;

/// Bytes of logits at a time: long enough chunks for the products to run at full rate.
const CHUNK_BYTES: usize = 16 << 20;
/// Tokens at the least, however large the vocabulary.
const CHUNK_TOKENS: usize = 128;

struct LinearCrossEntropy {
    dx: Option<(Variable, Buffer)>,
    dw: Option<(Variable, Buffer)>,
}

impl Tape {
    /// The loss of x [tokens, width] under `head` [vocab, width] and labels i64 `[tokens]`, −100 where ignored.
    ///
    /// `normalizer` is N, the kept targets of the whole step. Returns the scalar, and its value Σ/N in f64.
    pub fn linear_cross_entropy(
        &self,
        x: &Tensor,
        head: &Base,
        labels: &Buffer,
        normalizer: f64,
        compute: Compute,
    ) -> Result<(Tensor, f64)> {
        let [vocab, width] = head.dims()?;
        let (tokens, dtype, backend) = (x.shape().rows(), x.dtype(), self.backend());
        if x.shape().width() != width {
            let expected = format!("[tokens, {width}]");
            return Err(Error::Shape { op: "linear_cross_entropy", tensor: "x", expected, found: x.shape().clone() });
        }
        let mut dx = self.wanted(x.variable(), dtype, tokens * width)?;
        let mut dw = self.wanted(head.variable(), dtype, vocab * width)?;
        if let Some((_, dw)) = &mut dw {
            backend.fill(0.0, dw.view_mut())?;
        }
        let mut losses = self.alloc(dtype, tokens)?;
        let chunk = (CHUNK_BYTES / (dtype.size() * vocab.max(1))).max(CHUNK_TOKENS).min(tokens.max(1));
        let mut logits = self.alloc(dtype, chunk * vocab)?;
        for start in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - start);
            let p = Linear { tokens: rows, inputs: width, outputs: vocab, compute };
            let ce = CrossEntropy { rows, vocab };
            let x = x.view().slice(start * width, rows * width)?;
            let labels = labels.slice(start, rows)?;
            backend.linear(&p, x, &head.weight(), None, None, logits.slice_mut(0, rows * vocab)?)?;
            let losses = losses.slice_mut(start, rows)?;
            if dx.is_none() && dw.is_none() {
                backend.cross_entropy(&ce, logits.slice(0, rows * vocab)?, labels, losses)?;
                continue;
            }
            let scale = 1.0 / normalizer;
            backend.cross_entropy_grad_in_place(&ce, scale, logits.slice_mut(0, rows * vocab)?, labels, losses)?;
            let dz = logits.slice(0, rows * vocab)?;
            if let Some((_, dx)) = &mut dx {
                let dx = dx.slice_mut(start * width, rows * width)?;
                backend.linear_grad_input(&p, dz, &head.weight(), None, false, dx)?;
            }
            if let Some((_, dw)) = &mut dw {
                let grads = LinearGrads { weight: Some(dw.view_mut()), ..LinearGrads::default() };
                backend.linear_grad_weight(&p, x, dz, &head.weight(), None, grads)?;
            }
        }
        let value = sum(backend.as_ref(), &losses)? / normalizer;
        let loss = backend.filled(dtype, 1, value)?;
        let inputs = [x.variable(), head.variable()];
        Ok((self.record(loss, [], &inputs, |_| LinearCrossEntropy { dx, dw })?, value))
    }

    /// A gradient to be formed in forward, where the tape wants it.
    fn wanted(&self, variable: Option<Variable>, dtype: DType, len: usize) -> Result<Option<(Variable, Buffer)>> {
        match variable.filter(|_| self.wants(variable)) {
            Some(variable) => Ok(Some((variable, self.alloc(dtype, len)?))),
            None => Ok(None),
        }
    }
}

/// Σ in f64, in the order of the rows.
fn sum(backend: &dyn Backend, losses: &Buffer) -> Result<f64> {
    Ok(match losses.dtype() {
        DType::F64 => backend.download::<f64>(losses.view())?.iter().sum(),
        _ => backend.download::<f32>(losses.view())?.into_iter().map(f64::from).sum(),
    })
}

impl Op for LinearCrossEntropy {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let upstream = sum(backend, &grad)?;
        for (variable, mut gradient) in [self.dx, self.dw].into_iter().flatten() {
            if upstream != 1.0 {
                backend.scale_in_place(upstream, gradient.view_mut())?;
            }
            gradients.add(variable, gradient)?;
        }
        Ok(())
    }
}
