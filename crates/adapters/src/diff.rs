//! Diff pruning: a sparse difference beside W (Guo et al. 2021, §3).
//!
//! ```text
//! y = x (W + z ∘ δ)ᵀ + bias      z, δ [outputs, inputs]
//! ```
//!
//! z is a hard concrete gate (Louizos et al. 2018) with learned log α: noisy while training, and so exactly 0 or 1 with
//! a probability that log α moves; its middle in evaluation. The objective gains
//!
//! ```text
//! penalty · Σ P(z ≠ 0) / n,      P(z ≠ 0) = σ(log α − β ln(−γ/ζ)),
//! ```
//!
//! Σ and n over all elements of all layers: the expected share of W that is changed. γ = −1.5, ζ = 1.5 and β = 1 are
//! its authors' (whose 1.25·10⁻⁷ an element is a penalty of 42 for BERT's 335 million). δ begins at zero, so that
//! training begins at the base. Adam moves a number by about the sum of its rates, however large the gradient, so that
//! log α, which has some way to go to a gate's end, is trained at a rate of its own: 0.1 at the most ([`RATE`]), the
//! authors'. At the end z is fixed at its middle and what it closes is gone: δ' = z ∘ δ, zero where z is.
//!
//! Otherwise than with the authors log α begins at 1, where a gate is open with probability 0.73, and not at 5, as runs
//! are shorter than theirs; no gate is shared by a group (their structured variant); and no second run follows that
//! projects δ' onto its largest magnitudes and trains what is left.
//!
//! Merged: W' = W + δ', W in f32: off by u·(|w| + |δ'|), u = 2⁻²⁴, and half a unit in the last place of w'.
//!
//! PEFT has no such method. The folder is ours: `adapter_config.json` with `peft_type` "DIFF_PRUNING" and
//! `diff_penalty`; the tensor `base_model.model.PATH.diff`, δ'; in a checkpoint δ, and `….log_alpha` beside it. From a
//! finished difference training goes on without gates, and every element may change again.

use crate::adapter::expect;
use crate::values::{Source, Start};
use crate::{DropoutKey, Linear, Result, streams};
use rankfold_autograd::{Base, Gradients, Parameter, Tape, Tensor, Variable};
use rankfold_backend::params::{HardConcrete, Rows};
use rankfold_backend::{Backend, Buffer, Compute};

/// The ends of its tensors' names in a folder.
const DIFF: &str = "diff";
const LOG_ALPHA: &str = "log_alpha";
/// The learning rate of log α where that of all else is at its highest.
pub const RATE: f64 = 0.1;
/// Where log α begins; a gate's middle is closed from 0 downwards.
const OPEN: f64 = 1.0;

/// A gate of these ends is 0 or 1: of the next number above σ = ½, in f64 too, (σ − ½)·2⁶¹ is more than 1.
const STEEP: f64 = (1u64 << 60) as f64;

/// The gate of the layer of number `index`: with noise where a draw is given.
fn gate(index: u64, draw: Option<DropoutKey>) -> HardConcrete {
    let noise = draw.map(|key| (key.seed, streams::dropout(key.draw, index)));
    HardConcrete { temperature: 1.0, low: -1.5, high: 1.5, noise }
}

/// One layer's difference.
#[derive(Clone, Debug)]
pub struct Diff {
    /// δ [outputs, inputs].
    pub diff: Parameter,
    /// log α of the gates of its elements; none once they are fixed, where δ is δ'.
    pub log_alpha: Option<Parameter>,
}

impl Diff {
    pub(crate) fn new(source: &Source) -> Result<Self> {
        let dims = [source.layer.outputs(), source.layer.inputs()];
        let diff = source.parameter(DIFF, &dims, Start::Constant(0.0))?;
        if source.lacks(LOG_ALPHA) {
            return Ok(Self { diff, log_alpha: None });
        }
        Ok(Self { diff, log_alpha: Some(source.parameter(LOG_ALPHA, &dims, Start::Constant(OPEN))?) })
    }

    pub(crate) fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        [(DIFF, &self.diff)].into_iter().chain(self.log_alpha.iter().map(|gates| (LOG_ALPHA, gates))).collect()
    }

    pub(crate) fn check(&self, layer: &Linear) -> Result<()> {
        let dims = [layer.outputs(), layer.inputs()];
        self.parameters().into_iter().try_for_each(|(name, part)| expect(layer, name, part, &dims))
    }

    /// x (z ∘ δ)ᵀ
    pub(crate) fn product(
        &self,
        tape: &Tape,
        x: &Tensor,
        index: u64,
        draw: Option<DropoutKey>,
        compute: Compute,
    ) -> Result<Tensor> {
        let mut diff = self.diff.tensor();
        if let Some(log_alpha) = &self.log_alpha {
            diff = tape.gated(gate(index, draw), &log_alpha.tensor(), &diff)?;
        }
        Ok(tape.linear(x, &Base::Dense(diff), None, None, compute)?)
    }

    /// δ'
    pub(crate) fn fixed(&self, backend: &dyn Backend) -> Result<Tensor> {
        let diff = self.diff.tensor();
        let Some(log_alpha) = &self.log_alpha else { return Ok(diff) };
        let mut z = backend.alloc(diff.dtype(), diff.shape().elements())?;
        backend.hard_concrete(&gate(0, None), log_alpha.tensor().view(), z.view_mut())?;
        let mut fixed = backend.alloc(diff.dtype(), z.len())?;
        let p = Rows { rows: 1, width: z.len() };
        backend.scale_columns(&p, diff.view(), z.view(), fixed.view_mut())?;
        Ok(Tensor::constant(fixed, diff.shape().clone())?)
    }

    /// W' of W in f32.
    pub(crate) fn merge(&self, backend: &dyn Backend, mut w: Buffer) -> Result<Buffer> {
        backend.add_in_place(self.fixed(backend)?.view(), w.view_mut())?;
        Ok(w)
    }
}

/// Whether a name in a folder is that of a log α.
pub fn is_gate(name: &str) -> bool {
    name.ends_with(".log_alpha")
}

/// The share of elements that are as they were in evaluation, their gates closed, over all layers whose gates are
/// trained; `None` where none are.
pub fn closed_share<'a>(backend: &dyn Backend, layers: impl IntoIterator<Item = &'a Linear>) -> Result<Option<f64>> {
    let (mut open, mut elements) = (0.0, 0);
    for gates in layers.into_iter().filter_map(|layer| layer.diff()?.log_alpha.as_ref()) {
        let log_alpha = gates.tensor();
        let mut z = backend.alloc(log_alpha.dtype(), log_alpha.shape().elements())?;
        // So steep that a gate which is not closed is 1: the squares count them.
        let steep = HardConcrete { low: -STEEP, high: STEEP, ..gate(0, None) };
        backend.hard_concrete(&steep, log_alpha.view(), z.view_mut())?;
        open += backend.sum_squares(z.view())?;
        elements += z.len();
    }
    Ok((elements > 0).then(|| 1.0 - open / elements as f64))
}

/// The expected share of elements that differ, over all layers whose gates are trained; `None` where none are. The
/// gradient of `penalty` times it is added to `gradients`.
pub fn expected_share<'a>(
    backend: &dyn Backend,
    layers: impl IntoIterator<Item = &'a Linear>,
    penalty: f64,
    gradients: &mut Gradients,
) -> Result<Option<f64>> {
    let gates: Vec<&Parameter> = layers.into_iter().filter_map(|layer| layer.diff()?.log_alpha.as_ref()).collect();
    let elements: usize = gates.iter().map(|gates| gates.shape().elements()).sum();
    if elements == 0 {
        return Ok(None);
    }
    let mut open = 0.0;
    for gates in gates {
        let (log_alpha, len) = (gates.tensor(), gates.shape().elements());
        let mut z = backend.alloc(log_alpha.dtype(), len)?;
        open += backend.hard_concrete(&gate(0, None), log_alpha.view(), z.view_mut())?;
        // No gradient by z: the penalty's alone.
        backend.fill(0.0, z.view_mut())?;
        let variable = Variable::Parameter(gates.id());
        let mut grad = gradients.take_for_adding(variable, log_alpha.dtype(), len)?;
        let share = penalty / elements as f64;
        backend.hard_concrete_grad(&gate(0, None), log_alpha.view(), z.view(), share, grad.view_mut())?;
        gradients.put(variable, grad);
    }
    Ok(Some(open / elements as f64))
}
