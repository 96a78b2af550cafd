//! The linear layer: y = x Wᵀ + s·(x̃ Aᵀ) Bᵀ + bias.
//!
//! x [tokens, inputs], y [tokens, outputs], W [outputs, inputs], x̃ = dropout(x) while training. W and the bias are
//! frozen or trained, each for itself; the update is there where an adapter was attached. What another method makes of
//! the product is in its own file.

use crate::diff::Diff;
use crate::merge::Unmerged;
use crate::streams::{self, LAYERS};
use crate::{Adapter, Error, Lora, Result};
use rankfold_autograd::{Base, Parameter, Tape, Tensor, Value};
use rankfold_backend::Compute;
use tracing::debug_span;

/// The matrix of a layer.
#[derive(Clone, Debug)]
pub enum Weight {
    /// As the file has it, or quantised: nothing asks for its gradient.
    Frozen(Base),
    /// Full finetuning.
    Trained(Parameter),
}

/// How a forward pass runs.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// Precision of the inputs of every product.
    pub compute: Compute,
    /// Which dropout to draw; none in evaluation.
    pub dropout: Option<DropoutKey>,
}

impl Forward {
    /// Without dropout.
    pub fn evaluation(compute: Compute) -> Self {
        Self { compute, dropout: None }
    }
}

/// Names the dropout of one micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The micro-batch's number, counted over the whole run, below 2⁴³.
    pub draw: u64,
}

/// One linear layer of a model.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) path: String,
    index: u64,
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Value>,
    outputs: usize,
    inputs: usize,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) unmerged: Option<Unmerged>,
    /// Whether W is no longer what the layer was made with, but what an adapter's start left or made of it.
    pub(crate) is_remade: bool,
}

impl Linear {
    /// A layer without an adapter.
    ///
    /// `path` is its name in the model ("model.layers.0.self_attn.q_proj"), `index` its number among the model's
    /// linear layers: two layers of one number would drop out alike.
    ///
    /// Errors: a weight that is no matrix; a bias that is not of its outputs; an index that has no streams.
    pub fn new(path: impl Into<String>, index: u64, weight: Weight, bias: Option<Value>) -> Result<Self> {
        let path = path.into();
        if index >= LAYERS {
            return Err(Error::field(format!("{path}: index"), index, "a number below 1048576"));
        }
        let weight = match weight {
            Weight::Frozen(Base::Dense(tensor)) => Weight::Frozen(Base::Dense(tensor.detach())),
            weight => weight,
        };
        let [outputs, inputs] = base(&weight).dims()?;
        let found = bias.as_ref().map(|bias| bias.tensor().shape().clone());
        if let Some(found) = found.filter(|found| found.elements() != outputs) {
            let expected = format!("[{outputs}]");
            return Err(Error::Shape { module: path, tensor: "bias", expected, found });
        }
        Ok(Self { path, index, weight, bias, outputs, inputs, adapter: None, unmerged: None, is_remade: false })
    }

    /// Its name in the model.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its number among the model's linear layers.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Columns of x.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Columns of y.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// W, frozen or trained.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// W as the tape takes it.
    pub fn base(&self) -> Base {
        base(&self.weight)
    }

    /// The bias, if any.
    pub fn bias(&self) -> Option<&Value> {
        self.bias.as_ref()
    }

    /// Train the bias, from this value.
    pub(crate) fn train_bias(&mut self, bias: Parameter) {
        self.bias = Some(Value::Trained(bias));
    }

    /// The bias's name in a PEFT folder, of a layer that is adapted or not.
    pub(crate) fn bias_name(&self, is_adapted: bool) -> String {
        peft_name(&self.path, if is_adapted { "base_layer.bias" } else { "bias" })
    }

    /// What sits on it, where something is attached and not merged.
    pub fn attached(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The low-rank update, where that is what sits on it.
    pub fn adapter(&self) -> Option<&Lora> {
        match &self.adapter {
            Some(Adapter::Lora(lora)) => Some(lora),
            _ => None,
        }
    }

    /// The sparse difference, where that is what sits on it.
    pub(crate) fn diff(&self) -> Option<&Diff> {
        match &self.adapter {
            Some(Adapter::Diff(diff)) => Some(diff),
            _ => None,
        }
    }

    /// Whether its base is in 4 bits that were made for its adapter, and are in no file that the model came from.
    pub fn has_own_base(&self) -> bool {
        self.is_remade && matches!(self.base(), Base::Quantized(_))
    }

    /// Attach an adapter in place of the one there is, if any, merged or not.
    ///
    /// Errors: shapes that are not the layer's; a base that is trained itself, or was made for the adapter that there
    /// is.
    pub fn set_adapter(&mut self, adapter: impl Into<Adapter>) -> Result<()> {
        let adapter = adapter.into();
        self.check_adapter(&adapter)?;
        self.unmerge();
        self.adapter = Some(adapter);
        Ok(())
    }

    /// Take off what sits on it, merged or not.
    ///
    /// Errors: an adapter whose start made another base, without which it is of no use: what it took out would not
    /// come back with it.
    pub fn take_adapter(&mut self) -> Result<Option<Adapter>> {
        self.check_whole()?;
        self.unmerge();
        Ok(self.adapter.take())
    }

    /// What [`Linear::set_adapter`] refuses.
    pub(crate) fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        match &self.weight {
            Weight::Trained(_) => Err(Error::TrainedBase { module: self.path.clone() }),
            Weight::Frozen(_) => self.check_whole().and_then(|()| adapter.check(self)),
        }
    }

    /// That the base is the file's, whatever sits on it: of one that an adapter's start made, W is not kept.
    pub(crate) fn check_whole(&self) -> Result<()> {
        if self.is_remade { Err(Error::PartialBase { module: self.path.clone() }) } else { Ok(()) }
    }

    /// That an update is of this layer's shape.
    pub(crate) fn check_lora(&self, lora: &Lora) -> Result<()> {
        let module = self.path.clone();
        let rank = lora.rank();
        let [outputs, inputs] = lora.dims();
        if inputs != self.inputs {
            let (expected, found) = (format!("[{rank}, {}]", self.inputs), lora.a().shape().clone());
            return Err(Error::Shape { module, tensor: "lora_A", expected, found });
        }
        if outputs != self.outputs {
            let (expected, found) = (format!("[{}, {rank}]", self.outputs), lora.b().shape().clone());
            return Err(Error::Shape { module, tensor: "lora_B", expected, found });
        }
        Ok(())
    }

    /// x [tokens, inputs] → y [tokens, outputs].
    pub fn forward(&self, tape: &Tape, x: &Tensor, mode: &Forward) -> Result<Tensor> {
        let _layer = debug_span!("layer", kind = self.path.rsplit('.').next()).entered();
        let (base, bias) = (self.base(), self.bias.as_ref().map(Value::tensor));
        let bias = bias.as_ref();
        let alone = |bias: Option<&Tensor>| tape.linear(x, &base, bias, None, mode.compute);
        match &self.adapter {
            None => Ok(alone(bias)?),
            Some(Adapter::Lora(lora)) => {
                let dropout = mode.dropout.map(|key| (key.seed, streams::dropout(key.draw, self.index)));
                let update = lora.on_tape(tape, &base, dropout)?;
                Ok(tape.linear(x, &base, bias, Some(&update), mode.compute)?)
            }
            Some(Adapter::Ia3(ia3)) => ia3.forward(tape, x, &base, bias, mode.compute),
            Some(Adapter::Bias(own)) => Ok(alone(Some(&own.bias.tensor()))?),
            Some(Adapter::Bottleneck(bottleneck)) => bottleneck.after(tape, &alone(bias)?, mode.compute),
            Some(Adapter::Diff(diff)) => {
                let difference = diff.product(tape, x, self.index, mode.dropout, mode.compute)?;
                Ok(tape.add(&alone(bias)?, &difference)?)
            }
        }
    }

    /// What is trained, by the names that files give it: an adapter's, and a bias's beside it, are PEFT's, the base's
    /// the model's own.
    ///
    /// A weight shared with another layer (a tied head) is in both layers' lists.
    pub fn parameters(&self) -> Vec<(String, Parameter)> {
        let mut parameters = Vec::new();
        if let Weight::Trained(weight) = &self.weight {
            parameters.push((format!("{}.weight", self.path), weight.clone()));
        }
        if let Some(Value::Trained(bias)) = &self.bias {
            let name = match &self.weight {
                Weight::Trained(_) => format!("{}.bias", self.path),
                Weight::Frozen(_) => self.bias_name(self.adapter.is_some()),
            };
            parameters.push((name, bias.clone()));
        }
        if let Some(adapter) = &self.adapter {
            let named = |(end, parameter): (&str, &Parameter)| (peft_name(&self.path, end), parameter.clone());
            parameters.extend(adapter.parameters().into_iter().map(named));
        }
        parameters
    }
}

/// Whether a name in a PEFT folder is that of a B.
pub fn is_b(name: &str) -> bool {
    name.ends_with(".lora_B.weight") || name.ends_with(".lora_B")
}

/// The name of a module's adapter tensor in a PEFT folder.
pub fn peft_name(path: &str, end: &str) -> String {
    format!("base_model.model.{path}.{end}")
}

fn base(weight: &Weight) -> Base {
    match weight {
        Weight::Frozen(base) => base.clone(),
        Weight::Trained(parameter) => Base::Dense(parameter.tensor()),
    }
}
