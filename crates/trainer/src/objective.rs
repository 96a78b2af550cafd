//! What the objective has beside the tokens' loss: AdaLoRA's orthogonality term, diff pruning's penalty.

use crate::Result;
use rankfold_adapters::adalora::{AdaLora, orthogonality};
use rankfold_adapters::diff::expected_share;
use rankfold_adapters::{Linear, PeftConfig, Relative};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::{Backend, DType};
use std::sync::Arc;
use tracing::debug_span;

/// The terms that a method adds, each where it has it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// AdaLoRA's.
    pub orthogonality: Option<Orthogonality>,
    /// What the expected share of changed elements costs, in diff pruning.
    pub diff_penalty: Option<f64>,
}

/// The weight of AdaLoRA's orthogonality term.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Orthogonality {
    /// What the mean over all factors is multiplied by.
    pub weight: f64,
    /// Whether it is of squared norms.
    pub squared: bool,
}

/// What terms came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Added {
    /// Their sum, each with its weight.
    pub value: f64,
    /// The expected share of changed elements, in diff pruning.
    pub changed: Option<f64>,
}

impl Terms {
    /// Those of an adapter's method.
    pub fn of(config: &PeftConfig) -> Self {
        let mut terms = Self::default();
        match config {
            PeftConfig::Lora(config) => {
                let of = |adalora: &AdaLora| Orthogonality { weight: adalora.orthogonality, squared: adalora.squared };
                terms.orthogonality = config.adalora.as_ref().map(of);
            }
            PeftConfig::Relative(config) => {
                if let Relative::Diff { penalty } = config.method {
                    terms.diff_penalty = Some(penalty);
                }
            }
            PeftConfig::Virtual(_) => {}
        }
        terms
    }

    /// Form the terms over a model's layers, and add their gradients to `gradients`.
    pub fn add_to<'a>(
        &self,
        backend: &Arc<dyn Backend>,
        layers: impl IntoIterator<Item = &'a Linear> + Clone,
        gradients: &mut Gradients,
    ) -> Result<Added> {
        let _layer = debug_span!("layer", kind = "objective").entered();
        let mut added = Added { value: 0.0, changed: None };
        if let Some(Orthogonality { weight, squared }) = self.orthogonality {
            let tape = Tape::new(backend.clone());
            if let Some((root, value)) = orthogonality(&tape, layers.clone(), squared)? {
                added.value += weight * value;
                let seed = backend.filled(DType::F32, 1, weight)?;
                tape.backward(&root, seed, gradients)?;
            }
        }
        if let Some(penalty) = self.diff_penalty {
            added.changed = expected_share(backend.as_ref(), layers, penalty, gradients)?;
            added.value += penalty * added.changed.unwrap_or_default();
        }
        Ok(added)
    }
}
