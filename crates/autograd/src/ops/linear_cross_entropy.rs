//! L = Σ_t −log softmax(x_t Wᵀ)[label_t] / N over the kept targets: the output head and its loss in one node.
//!
//! The logits [tokens, vocab] are the largest tensor of a language model's step, and never exist here: they are
//! formed for a chunk of tokens at a time. With z = x Wᵀ, dL/dz = (softmax(z) − onehot(label)) / N, which overwrites
//! the chunk; then dx = dz W and, where the head is trained, dW += dzᵀ x. Both are formed in forward, while the
//! logits are there, and only scaled in backward: the head is multiplied twice (three times if trained), not once
//! more to form the logits again.

use crate::gradients::Slot;
use crate::{Base, Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::params::{CrossEntropy, Linear};
use rankfold_backend::{Backend, Buffer, Compute, DType, LinearGrads};
use std::sync::Arc;

/// Bytes of logits at a time: long enough chunks for the products to run at full rate.
const CHUNK_BYTES: usize = 16 << 20;
/// Tokens at the least, however large the vocabulary.
const CHUNK_TOKENS: usize = 128;

struct LinearCrossEntropy {
    dx: Slot,
    dw: Slot,
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
        let [vocab, _] = head.dims()?;
        let chunk = (CHUNK_BYTES / (x.dtype().size() * vocab.max(1))).max(CHUNK_TOKENS);
        self.in_chunks(chunk, x, head, labels, normalizer, compute)
    }

    /// [`Tape::linear_cross_entropy`], `chunk` tokens (at least 1) at a time.
    fn in_chunks(
        &self,
        chunk: usize,
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
        let chunk = chunk.min(tokens.max(1));
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
        Ok((self.record(loss, [], &inputs, |_| Ok(LinearCrossEntropy { dx, dw }))?, value))
    }

    /// A gradient to be formed in forward, where the tape wants it.
    fn wanted(&self, variable: Option<Variable>, dtype: DType, len: usize) -> Result<Slot> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{parameter, worst_error};
    use rankfold_backend::params::IGNORED;
    use rankfold_reference::ReferenceBackend;

    const TOKENS: usize = 7;
    const LABELS: [i64; TOKENS] = [5, IGNORED, 0, 3, 5, IGNORED, 1];
    const KEPT: f64 = 5.0;

    /// On `reference` a token's loss and dx do not depend on the other tokens, so chunks leave them as they are, to
    /// the bit. A sum of 7 terms dW, begun at 0 and rounded at most once more a chunk, is off by γ₁₄·Σ|dz_t x_t|,
    /// twice for two orders (28·ε/2); |dz| ≤ 1/N in the kept rows and |x| ≤ 1, so that Σ|dz_t x_t| ≤ 1.
    #[test]
    fn chunks_of_any_length_give_the_loss_and_gradients_of_one() {
        let b: Arc<dyn Backend> = Arc::new(ReferenceBackend::new());
        let (x, head) = (parameter(&b, 1, &[TOKENS, 3]).unwrap(), parameter(&b, 2, &[6, 3]).unwrap());
        let labels = b.upload(&LABELS).unwrap();
        let run = |chunk: usize| {
            let tape = Tape::new(b.clone());
            let base = Base::Dense(head.tensor());
            let (root, loss) = tape.in_chunks(chunk, &x.tensor(), &base, &labels, KEPT, Compute::F32).unwrap();
            let mut gradients = Gradients::new(b.clone());
            tape.backward_from_loss(&root, &mut gradients).unwrap();
            let [dx, dw] = [&x, &head].map(|p| b.download::<f64>(gradients.of(p).unwrap().view()).unwrap());
            (loss, dx, dw)
        };
        let (loss, dx, dw) = run(TOKENS);
        let bound = 14.0 * f64::EPSILON;
        for chunk in 1..TOKENS {
            let (found_loss, found_dx, found_dw) = run(chunk);
            assert_eq!((found_loss, &found_dx), (loss, &dx), "chunks of {chunk}");
            let worst = found_dw.iter().zip(&dw).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst <= bound, "chunks of {chunk}: dW differs by {worst:e}");
        }
    }

    /// 1e-7 is what the two roundings and the truncation of a central difference leave, many times over: see
    /// `gradcheck`.
    #[test]
    fn gradients_match_differences_over_several_chunks() {
        let b: Arc<dyn Backend> = Arc::new(ReferenceBackend::new());
        let (x, head) = (parameter(&b, 1, &[TOKENS, 3]).unwrap(), parameter(&b, 2, &[6, 3]).unwrap());
        let labels = b.upload(&LABELS).unwrap();
        for chunk in [1, 3] {
            let loss = |t: &Tape| {
                let base = Base::Dense(head.tensor());
                Ok(t.in_chunks(chunk, &x.tensor(), &base, &labels, KEPT, Compute::F32)?.0)
            };
            let worst = worst_error(&b, &[x.clone(), head.clone()], loss).unwrap();
            assert!(worst < 1e-7, "chunks of {chunk}: worst error {worst:e}");
        }
    }
}
