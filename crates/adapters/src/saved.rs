//! What is trained beside the updates: biases, and modules that are trained whole.
//!
//! PEFT's `bias` is "none", "all" (of every layer) or "lora_only" (of the adapted ones); an entry of its
//! `modules_to_save` means every module whose path ends in it, whether or not a part of the path begins there: "norm"
//! is every layer's norms and the last one, where in `target_modules` it would be the last alone. Both are saved with
//! the adapter, whole: a bias as `base_model.model.PATH.bias`, of an adapted layer as `….PATH.base_layer.bias`; a module
//! as `base_model.model.PATH.weight`. In f32.

use crate::linear::peft_name;
use crate::{AdapterConfig, AdapterFolder, Error, Linear, Result};
use rankfold_autograd::{Parameter, Tensor, Value};
use rankfold_backend::{Backend, DType};

/// Which biases are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Those of every linear layer.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

impl Bias {
    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }

    /// By PEFT's name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::None, Self::All, Self::LoraOnly].into_iter().find(|bias| bias.name() == name)
    }

    /// Whether the bias of a layer is trained, if it has one.
    pub(crate) fn means(self, is_adapted: bool) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::LoraOnly => is_adapted,
        }
    }
}

/// The bias of a layer as it is to be trained, where it has one: from the value that it has or, with a folder, from
/// its.
pub(crate) fn trained_bias(
    backend: &dyn Backend,
    layer: &Linear,
    is_adapted: bool,
    folder: Option<&AdapterFolder>,
) -> Result<Option<Parameter>> {
    let Some(bias) = layer.bias() else { return Ok(None) };
    Ok(Some(match folder {
        Some(folder) => folder.tensor(backend, layer.path(), &layer.bias_name(is_adapted), &[layer.outputs()])?,
        None => trainable(backend, &bias.tensor())?,
    }))
}

/// Train the modules that `modules_to_save` names, out of `modules`, each with its path: from the values that they have
/// or, with a folder, from its.
///
/// Errors: an entry that names none of them; a tensor that the folder lacks, or has in another shape.
pub fn train_modules(
    backend: &dyn Backend,
    modules: Vec<(String, &mut Value)>,
    config: &AdapterConfig,
    folder: Option<&AdapterFolder>,
) -> Result<()> {
    for name in &config.modules_to_save {
        if !modules.iter().any(|(path, _)| path.ends_with(name)) {
            let mut known: Vec<&str> = modules.iter().filter_map(|(path, _)| path.rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Error::NoModule { name: name.clone(), known: known.join(", ") });
        }
    }
    for (path, value) in modules.into_iter().filter(|(path, _)| config.saves(path)) {
        let shape = value.tensor().shape().dims().to_vec();
        let trained = match folder {
            Some(folder) => folder.tensor(backend, &path, &peft_name(&path, "weight"), &shape)?,
            None => trainable(backend, &value.tensor())?,
        };
        *value = Value::Trained(trained);
    }
    Ok(())
}

impl AdapterConfig {
    /// Whether anything of the base itself is trained.
    pub fn trains_the_base(&self) -> bool {
        self.bias != Bias::None || !self.modules_to_save.is_empty()
    }

    /// Whether the module at `path` is trained whole.
    pub fn saves(&self, path: &str) -> bool {
        self.modules_to_save.iter().any(|name| path.ends_with(name))
    }
}

/// A parameter in f32 with a tensor's values.
fn trainable(backend: &dyn Backend, tensor: &Tensor) -> Result<Parameter> {
    let mut value = backend.alloc(DType::F32, tensor.shape().elements())?;
    backend.cast(tensor.view(), value.view_mut())?;
    Ok(Parameter::new(value, tensor.shape().clone())?)
}
