//! y = g ∘ (x Wᵀ + s·(x̃ (e∘A)ᵀ) Bᵀ) + bias: a base matrix and its low-rank update in one node.
//!
//! LoRA (Hu et al. 2021, eq. 3) has e = g = 1; AdaLoRA (Zhang et al. 2023, eq. 3) e = Λ; DoRA (Liu et al. 2024,
//! eq. 5) g = m/‖W + s·BA‖. x̃ is x under dropout.
//!
//! Backward asks the kernels for those gradients alone that are wanted: dx where x is a variable, dW and dbias where
//! the base is trained, dA, dB, de, dg where the adapter is. x is saved only where one of the latter needs it.

use crate::gradients::{Taken, output};
use crate::saved::Saved;
use crate::{Base, Error, Gradients, Op, Result, Tape, Tensor, Variable};
use rankfold_backend::params::{Dropout, Linear as Params};
use rankfold_backend::{Backend, Buffer, Compute, LinearGrads, LowRank};
use std::sync::Arc;

/// The low-rank update beside a base matrix.
#[derive(Clone, Debug)]
pub struct LinearAdapter {
    /// A [rank, inputs].
    pub a: Tensor,
    /// B [outputs, rank].
    pub b: Tensor,
    /// s: α/r, or what the method makes of it.
    pub scale: f32,
    /// e `[rank]`: AdaLoRA's Λ.
    pub per_rank: Option<Tensor>,
    /// g `[outputs]`: DoRA's m/‖·‖.
    pub row_scale: Option<Tensor>,
    /// Dropout on the update's input.
    pub dropout: Option<Dropout>,
}

impl LinearAdapter {
    fn low_rank(&self) -> LowRank<'_> {
        LowRank {
            rank: self.rank(),
            a: self.a.view(),
            b: self.b.view(),
            scale: self.scale,
            per_rank: self.per_rank.as_ref().map(Tensor::view),
            row_scale: self.row_scale.as_ref().map(Tensor::view),
            dropout: self.dropout,
        }
    }

    /// Rows of A.
    pub fn rank(&self) -> usize {
        self.a.shape().dims().first().copied().unwrap_or(0)
    }

    /// Its variables: A, B, e, g.
    fn variables(&self) -> [Option<Variable>; 4] {
        let of = |tensor: &Option<Tensor>| tensor.as_ref().and_then(Tensor::variable);
        [self.a.variable(), self.b.variable(), of(&self.per_rank), of(&self.row_scale)]
    }
}

struct Linear {
    p: Params,
    input: Option<Variable>,
    x: Option<Saved>,
    base: Base,
    bias: Option<Variable>,
    adapter: Option<LinearAdapter>,
}

impl Tape {
    /// x [tokens, inputs] → y [tokens, outputs].
    pub fn linear(
        &self,
        x: &Tensor,
        base: &Base,
        bias: Option<&Tensor>,
        adapter: Option<&LinearAdapter>,
        compute: Compute,
    ) -> Result<Tensor> {
        let [outputs, inputs] = base.dims()?;
        if x.shape().width() != inputs {
            let expected = format!("[tokens, {inputs}]");
            return Err(Error::Shape { op: "linear", tensor: "x", expected, found: x.shape().clone() });
        }
        let tokens = x.shape().rows();
        let p = Params { tokens, inputs, outputs, compute };
        let mut y = self.alloc(x.dtype(), tokens * outputs)?;
        let low_rank = adapter.map(LinearAdapter::low_rank);
        let bias_view = bias.map(Tensor::view);
        self.backend().linear(&p, x.view(), &base.weight(), low_rank.as_ref(), bias_view, y.view_mut())?;

        let bias = bias.and_then(Tensor::variable);
        let [a, b, e, g] = adapter.map_or([None; 4], LinearAdapter::variables);
        let trained = [base.variable(), bias, a, b, e, g];
        let x_needed = trained.iter().any(Option::is_some);
        let inputs = [&[x.variable()], &trained[..]].concat();
        self.record(y, [tokens, outputs], &inputs, |_| {
            let (input, x) = (x.variable(), x_needed.then(|| self.save(x)).transpose()?);
            Ok(Linear { p, input, x, base: base.clone(), bias, adapter: adapter.cloned() })
        })
    }
}

impl Op for Linear {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { p, input, x, base, bias, adapter } = *self;
        let (weight, dtype) = (base.weight(), grad.dtype());
        let low_rank = adapter.as_ref().map(LinearAdapter::low_rank);

        let rank = adapter.as_ref().map_or(0, LinearAdapter::rank);
        let [a, b, e, g] = adapter.as_ref().map_or([None; 4], LinearAdapter::variables);
        let mut slot = |variable: Option<Variable>, len: usize| gradients.slot_for_adding(variable, dtype, len);
        let mut slots = [
            slot(base.variable(), p.outputs * p.inputs)?,
            slot(bias, p.outputs)?,
            slot(a, rank * p.inputs)?,
            slot(b, p.outputs * rank)?,
            slot(e, rank)?,
            slot(g, p.outputs)?,
        ];
        // x was saved if and only if something beside the input is trained.
        if let Some(x) = x {
            let x = x.get(backend)?;
            let [weight_grad, bias, a, b, per_rank, row_scale] = slots.each_mut().map(output);
            let grads = LinearGrads { weight: weight_grad, bias, a, b, per_rank, row_scale };
            backend.linear_grad_weight(&p, x.view(), grad.view(), &weight, low_rank.as_ref(), grads)?;
            for (variable, buffer) in slots.into_iter().flatten() {
                gradients.put(variable, buffer);
            }
        }

        if let Some(variable) = input {
            let Taken { mut buffer, accumulate } = gradients.take(variable, dtype, p.tokens * p.inputs)?;
            backend.linear_grad_input(&p, grad.view(), &weight, low_rank.as_ref(), accumulate, buffer.view_mut())?;
            gradients.put(variable, buffer);
        }
        Ok(())
    }
}
