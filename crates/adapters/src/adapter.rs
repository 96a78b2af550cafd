//! What can sit on a linear layer: LoRA in one of its forms, or one of the methods that it is compared with.

use crate::bitfit::Bias;
use crate::bottleneck::Bottleneck;
use crate::diff::Diff;
use crate::ia3::Ia3;
use crate::{Error, Linear, Lora, Result};
use rankfold_autograd::Parameter;

/// One layer's adapter.
#[derive(Clone, Debug)]
pub enum Adapter {
    /// A low-rank update.
    Lora(Lora),
    /// (IA)³'s scale.
    Ia3(Ia3),
    /// BitFit's bias.
    Bias(Bias),
    /// A bottleneck after the output.
    Bottleneck(Bottleneck),
    /// A sparse difference.
    Diff(Diff),
}

impl From<Lora> for Adapter {
    fn from(lora: Lora) -> Self {
        Self::Lora(lora)
    }
}

impl Adapter {
    /// What is trained, by the ends of its names in a folder.
    pub fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        match self {
            Self::Lora(lora) => lora.parameters(),
            Self::Ia3(ia3) => ia3.parameters(),
            Self::Bias(bias) => bias.parameters(),
            Self::Bottleneck(bottleneck) => bottleneck.parameters(),
            Self::Diff(diff) => diff.parameters(),
        }
    }

    /// Numbers trained.
    pub fn elements(&self) -> usize {
        self.parameters().iter().map(|(_, parameter)| parameter.shape().elements()).sum()
    }

    /// That its tensors have the shapes that a layer asks for.
    pub(crate) fn check(&self, layer: &Linear) -> Result<()> {
        match self {
            Self::Lora(lora) => layer.check_lora(lora),
            Self::Ia3(ia3) => ia3.check(layer),
            Self::Bias(bias) => bias.check(layer),
            Self::Bottleneck(bottleneck) => bottleneck.check(layer),
            Self::Diff(diff) => diff.check(layer),
        }
    }
}

/// That a tensor of `layer`'s adapter has these dimensions.
pub(crate) fn expect(layer: &Linear, tensor: &'static str, parameter: &Parameter, dims: &[usize]) -> Result<()> {
    let found = parameter.shape();
    if found.dims() == dims {
        return Ok(());
    }
    let (module, expected) = (layer.path().into(), format!("{dims:?}"));
    Err(Error::Shape { module, tensor, expected, found: found.clone() })
}
