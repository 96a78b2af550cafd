//! Frozen linear layers with a LoRA each, one on top of the other, forward and backward: the weights are read from the
//! first to the last and back again. With few tokens there is little to compute for a weight's bytes, with many a lot;
//! and with many the layers' inputs, which backward needs again, are as large as the weights.

use crate::work::{Failure, Step, draw};
use rankfold_autograd::{Base, Gradients, LinearAdapter, Parameter, Tape, Tensor};
use rankfold_backend::{Backend, Compute, DType, Format, Quantized};
use std::sync::Arc;

const RANK: usize = 8;
const BLOCK: usize = 64;

/// A stack of `layers` layers of `width` × `width`, its weights in f32 or in NF4.
pub fn make(
    backend: Arc<dyn Backend>,
    coded: bool,
    [layers, width]: [usize; 2],
    tokens: usize,
) -> Result<Step, Failure> {
    // Rows of norm 1: what goes in comes out as large.
    let values = draw(width * width, 1, (3.0 / width as f32).sqrt());
    let mut stack = Vec::new();
    for _ in 0..layers {
        let dense = backend.upload(&values)?;
        let base = match coded {
            false => Base::Dense(Tensor::constant(dense, [width, width])?),
            true => {
                let shape = [width, width];
                let codes = Quantized::quantize(backend.as_ref(), dense.view(), shape, Format::Nf4, BLOCK, true)?;
                Base::Quantized(Arc::new(codes))
            }
        };
        let a = Parameter::new(backend.upload(&values[..RANK * width])?, [RANK, width])?;
        let b = Parameter::new(backend.filled(DType::F32, width * RANK, 0.0)?, [width, RANK])?;
        stack.push((base, a, b));
    }
    let inputs = Tensor::constant(backend.upload(&draw(tokens * width, 2, 1.0))?, [tokens, width])?;
    let seed = Arc::new(backend.upload(&draw(tokens * width, 3, 1.0))?);
    Ok(Box::new(move |_| {
        let (tape, mut x) = (Tape::new(backend.clone()), inputs.clone());
        for (base, a, b) in &stack {
            let (a, b) = (a.tensor(), b.tensor());
            let adapter = LinearAdapter { a, b, scale: 1.0, per_rank: None, row_scale: None, dropout: None };
            x = tape.linear(&x, base, None, Some(&adapter), Compute::F32)?;
        }
        Ok(tape.backward(&x, seed.clone(), &mut Gradients::new(backend.clone()))?)
    }))
}
