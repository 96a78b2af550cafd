//! Bottleneck adapters: a small residual network after a layer that writes to the residual stream.
//!
//! ```text
//! h' = h + U·relu(D·h + b_D) + b_U      h [tokens, width], D [bottleneck, width], U [width, bottleneck]
//! ```
//!
//! Houlsby et al. 2019 (§2.1) have two a block, after attention's output projection and after the feed-forward, each
//! before the residual sum; Pfeiffer et al. 2021 (§2.2) the second alone. Both placed them in BERT, whose norms come
//! after the sum; in a pre-norm Llama what stays of that is "before the sum". D begins normal with standard deviation
//! 0.01 (Houlsby, §3.1), the rest as zeros, so that training begins at the base to the bit. A relu does not merge into
//! a matrix.
//!
//! PEFT has no such method. The folder is ours: `adapter_config.json` with `peft_type` "BOTTLENECK", `placement`
//! ("houlsby" or "pfeiffer") and `bottleneck`; the tensors `base_model.model.PATH.bottleneck_down.weight`,
//! `….bottleneck_down.bias`, `….bottleneck_up.weight`, `….bottleneck_up.bias`, PATH the layer that they follow.

use crate::adapter::expect;
use crate::values::{Source, Start};
use crate::{Linear, Result};
use rankfold_autograd::{Base, Parameter, Tape, Tensor};
use rankfold_backend::Compute;
use rankfold_backend::params::Activation;

/// The standard deviation of D at the start.
const SIGMA: f64 = 0.01;

/// The ends of its tensors' names in a folder.
const NAMES: [&str; 4] =
    ["bottleneck_down.weight", "bottleneck_down.bias", "bottleneck_up.weight", "bottleneck_up.bias"];

/// Which layers have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// After attention and after the feed-forward.
    Houlsby,
    /// After the feed-forward.
    Pfeiffer,
}

impl Placement {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Houlsby => "houlsby",
            Self::Pfeiffer => "pfeiffer",
        }
    }

    /// The layers that bottlenecks follow.
    pub(crate) fn targets(self) -> &'static [&'static str] {
        match self {
            Self::Houlsby => &["down_proj", "o_proj"],
            Self::Pfeiffer => &["down_proj"],
        }
    }
}

/// What follows one layer.
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// D [bottleneck, width], b_D `[bottleneck]`, U [width, bottleneck], b_U `[width]`.
    pub parts: [Parameter; 4],
}

impl Bottleneck {
    pub(crate) fn new(source: &Source, bottleneck: usize) -> Result<Self> {
        let part = |i: usize, dims: &[usize], start| source.parameter(NAMES[i], dims, start);
        let (width, zero) = (source.layer.outputs(), Start::Constant(0.0));
        let parts = [
            part(0, &[bottleneck, width], Start::Normal(SIGMA))?,
            part(1, &[bottleneck], zero)?,
            part(2, &[width, bottleneck], zero)?,
            part(3, &[width], zero)?,
        ];
        Ok(Self { parts })
    }

    pub(crate) fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        NAMES.into_iter().zip(&self.parts).collect()
    }

    pub(crate) fn check(&self, layer: &Linear) -> Result<()> {
        let (n, width) = (self.parts[0].shape().rows(), layer.outputs());
        for ((name, part), dims) in self.parameters().into_iter().zip([&[n, width][..], &[n], &[width, n], &[width]]) {
            expect(layer, name, part, dims)?;
        }
        Ok(())
    }

    /// h' of the layer's output h.
    pub(crate) fn after(&self, tape: &Tape, h: &Tensor, compute: Compute) -> Result<Tensor> {
        let [down, down_bias, up, up_bias] = self.parts.each_ref().map(Parameter::tensor);
        let inner = tape.linear(h, &Base::Dense(down), Some(&down_bias), None, compute)?;
        let inner = tape.activate(Activation::Relu, &inner)?;
        let outer = tape.linear(&inner, &Base::Dense(up), Some(&up_bias), None, compute)?;
        Ok(tape.add(h, &outer)?)
    }
}
