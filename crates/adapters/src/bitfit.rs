//! BitFit: biases alone are trained (Ben Zaken et al. 2022, §3).
//!
//! ```text
//! y = x Wᵀ + b      b [outputs]
//! ```
//!
//! b begins as the base's own bias. Where the base has none, as in a Llama, the layer gets one that begins as zeros:
//! adding 0 is exact, so that training begins at the base to the bit. Merged, W stays as it is and b is the layer's
//! bias, without a rounding.
//!
//! PEFT has no such method. The folder is ours: `adapter_config.json` with `peft_type` "BITFIT", and
//! `base_model.model.PATH.bias` `[outputs]`, the whole bias and not what was added to it.

use crate::adapter::expect;
use crate::values::{Source, Start};
use crate::{Linear, Result};
use rankfold_autograd::{Parameter, Value};

/// The end of its tensor's name in a folder.
const NAME: &str = "bias";

/// One layer's trained bias, in place of the base's.
#[derive(Clone, Debug)]
pub struct Bias {
    /// b `[outputs]`.
    pub bias: Parameter,
}

impl Bias {
    pub(crate) fn new(source: &Source) -> Result<Self> {
        let own = source.layer.bias().map(Value::tensor);
        let start = own.as_ref().map_or(Start::Constant(0.0), Start::Copy);
        Ok(Self { bias: source.parameter(NAME, &[source.layer.outputs()], start)? })
    }

    pub(crate) fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![(NAME, &self.bias)]
    }

    pub(crate) fn check(&self, layer: &Linear) -> Result<()> {
        expect(layer, NAME, &self.bias, &[layer.outputs()])
    }
}
