//! (IA)³: a learned scale of a layer's outputs, or of its inputs (Liu et al. 2022, §3.3).
//!
//! ```text
//! keys, values      y = l ∘ (x Wᵀ + bias)      l [outputs, 1]
//! feed-forward      y = (l ∘ x) Wᵀ + bias      l [1, inputs]
//! ```
//!
//! l begins as ones, and multiplying by 1 is exact, so that training begins at the base to the bit. The paper scales
//! what the feed-forward's second matrix is given; which layers these are, `feedforward_modules` says, as in PEFT.
//!
//! Merged: W' = diag(l) W with bias' = l ∘ bias, or W' = W diag(l). W is taken in f32, so that an element is off by
//! u·|l w|, u = 2⁻²⁴, and half a unit in the last place of w' in the element type asked for.

use crate::adapter::expect;
use crate::values::{Source, Start};
use crate::{Error, Linear, Result};
use rankfold_autograd::{Base, LinearAdapter, Parameter, Tape, Tensor, Value};
use rankfold_backend::params::Rows;
use rankfold_backend::{Backend, Buffer, Compute, DType};

/// The end of its tensor's name in a PEFT folder.
const NAME: &str = "ia3_l";

/// What is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The layer's outputs.
    Outputs,
    /// Its inputs.
    Inputs,
}

/// One layer's scale.
#[derive(Clone, Debug)]
pub struct Ia3 {
    /// l, [outputs, 1] or [1, inputs].
    pub scale: Parameter,
    /// Which of the two.
    pub side: Side,
}

impl Ia3 {
    pub(crate) fn new(source: &Source, side: Side) -> Result<Self> {
        let scale = source.parameter(NAME, &dims(source.layer, side), Start::Constant(1.0))?;
        Ok(Self { scale, side })
    }

    pub(crate) fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![(NAME, &self.scale)]
    }

    pub(crate) fn check(&self, layer: &Linear) -> Result<()> {
        expect(layer, NAME, &self.scale, &dims(layer, self.side))
    }

    pub(crate) fn forward(
        &self,
        tape: &Tape,
        x: &Tensor,
        base: &Base,
        bias: Option<&Tensor>,
        compute: Compute,
    ) -> Result<Tensor> {
        let l = self.scale.tensor();
        match self.side {
            Side::Inputs => Ok(tape.linear(&tape.scale_columns(x, &l)?, base, bias, None, compute)?),
            Side::Outputs => {
                let [outputs, inputs] = base.dims()?;
                let empty = |dims: [usize; 2]| -> Result<Tensor> {
                    Ok(Tensor::constant(tape.backend().alloc(l.dtype(), 0)?, dims)?)
                };
                // The kernel's factor of a row is outside the sum and inside the bias.
                let bias = bias.map(|bias| tape.scale_columns(bias, &l)).transpose()?;
                let update = LinearAdapter {
                    a: empty([0, inputs])?,
                    b: empty([outputs, 0])?,
                    scale: 1.0,
                    per_rank: None,
                    row_scale: Some(l),
                    dropout: None,
                };
                Ok(tape.linear(x, base, bias.as_ref(), Some(&update), compute)?)
            }
        }
    }

    /// W' [outputs, inputs] of W in f32, and bias' in f32.
    pub(crate) fn merge(&self, backend: &dyn Backend, layer: &Linear, w: Buffer) -> Result<(Buffer, Option<Buffer>)> {
        let (rows, width) = (layer.outputs(), layer.inputs());
        let l = self.scale.tensor();
        let bias = layer.bias().map(Value::tensor);
        match self.side {
            Side::Inputs => {
                let mut scaled = backend.alloc(DType::F32, w.len())?;
                backend.scale_columns(&Rows { rows, width }, w.view(), l.view(), scaled.view_mut())?;
                Ok((scaled, None))
            }
            Side::Outputs => {
                let mut scaled = w;
                for (row, factor) in backend.download::<f32>(l.view())?.into_iter().enumerate() {
                    backend.scale_in_place(factor.into(), scaled.slice_mut(row * width, width)?)?;
                }
                let scale = |bias: Tensor| -> Result<Buffer> {
                    let mut scaled = backend.alloc(DType::F32, rows)?;
                    let p = Rows { rows: 1, width: rows };
                    backend.scale_columns(&p, bias.view(), l.view(), scaled.view_mut())?;
                    Ok(scaled)
                };
                Ok((scaled, bias.map(scale).transpose()?))
            }
        }
    }
}

fn dims(layer: &Linear, side: Side) -> [usize; 2] {
    match side {
        Side::Outputs => [layer.outputs(), 1],
        Side::Inputs => [1, layer.inputs()],
    }
}

/// PEFT's targets where none are given, by the `model_type` of `config.json`.
pub(crate) fn default_targets(architecture: &str) -> Result<&'static [&'static str]> {
    match architecture {
        "llama" | "mistral" => Ok(&["k_proj", "v_proj", "down_proj"]),
        "qwen2" | "qwen3" => Ok(&["q_proj", "v_proj", "down_proj"]),
        _ => Err(Error::NoDefault { architecture: architecture.into() }),
    }
}

/// PEFT's `feedforward_modules` where none are given: one name, in every architecture that has default targets.
pub(crate) const FEED_FORWARD: &str = "down_proj";
