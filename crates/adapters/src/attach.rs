//! An adapter onto a model: the layers that the configuration names get their updates, all of them or none.

use crate::patterns::Specs;
use crate::targets::{select, unmatched};
use crate::{AdapterConfig, AdapterFolder, Form, Linear, Lora, LoraSpec, Part, Result, Targets};
use rankfold_autograd::Parameter;
use rankfold_backend::params::elements;
use rankfold_backend::{Backend, DType};

/// What was attached, for printing and for writing.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The configuration with its targets by name, whatever the model: what belongs in the adapter's folder.
    pub config: AdapterConfig,
    /// The layers, in the model's order.
    pub modules: Vec<AttachedModule>,
    /// Keys of patterns and entries of `exclude_modules` that mean no layer, each as "FIELD: KEY": to be warned of.
    pub unused: Vec<String>,
}

/// One layer that has an update now.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachedModule {
    /// The layer's name in the model.
    pub path: String,
    /// Its hyper-parameters.
    pub spec: LoraSpec,
    /// Numbers that train in it.
    pub parameters: usize,
    /// Whether its rank is above min(outputs, inputs): to be warned of.
    pub is_wasteful: bool,
}

impl Attached {
    /// Numbers that train in all layers.
    pub fn parameters(&self) -> usize {
        self.modules.iter().map(|module| module.parameters).sum()
    }
}

/// Attach new updates, their first values drawn from `seed`.
///
/// `layers` are all linear layers of the model, the head among them; `architecture` is the `model_type` of its
/// `config.json`, for targets that are not given.
///
/// Errors: targets that match nothing; hyper-parameters out of range; a base that is trained. No layer is then
/// changed.
pub fn attach_new(
    backend: &dyn Backend,
    layers: &mut [&mut Linear],
    config: &AdapterConfig,
    architecture: &str,
    seed: u64,
) -> Result<Attached> {
    config.check()?;
    let plan = Plan::new(layers, config, architecture)?;
    let loras = plan.build(layers, |layer, spec| Lora::init(backend, layer, spec, config.init, seed))?;
    plan.carry_out(layers, loras)
}

/// Attach updates of unspecified value, for what counts memory and computes nothing.
///
/// Errors: those of [`attach_new`].
pub fn attach_blank(
    backend: &dyn Backend,
    layers: &mut [&mut Linear],
    config: &AdapterConfig,
    architecture: &str,
) -> Result<Attached> {
    config.check()?;
    let plan = Plan::new(layers, config, architecture)?;
    let loras = plan.build(layers, |layer, spec| {
        let parameter = |dims: &[usize]| -> Result<Parameter> {
            Ok(Parameter::new(backend.alloc(DType::F32, elements(dims))?, dims.to_vec())?)
        };
        let kept = config.adalora.as_ref().map_or(Ok(Vec::new()), |adalora| adalora.kept(layer.path(), spec.rank))?;
        let rank = if kept.is_empty() { spec.rank } else { kept.iter().filter(|kept| **kept).count() };
        let (a, b) = (parameter(&[rank, layer.inputs()])?, parameter(&[layer.outputs(), rank])?);
        let part = match spec.form {
            Form::Plain => Part::None,
            Form::Dora => Part::Magnitude(parameter(&[layer.outputs()])?),
            Form::AdaLora => Part::Triplets { lambda: parameter(&[rank, 1])?, kept },
        };
        Lora::new(layer.path(), a, b, part, spec)
    })?;
    plan.carry_out(layers, loras)
}

/// Attach the updates of a folder.
///
/// Errors: those of [`attach_new`]; tensors that are missing, left over, of other shapes or ranks, or not finite.
pub fn attach_folder(
    backend: &dyn Backend,
    layers: &mut [&mut Linear],
    folder: &AdapterFolder,
    architecture: &str,
) -> Result<Attached> {
    let plan = Plan::new(layers, folder.config(), architecture)?;
    let loras = plan.build(layers, |layer, spec| folder.lora(backend, layer, spec))?;
    folder.check_no_more(&plan.paths())?;
    plan.carry_out(layers, loras)
}

/// What is to be attached where.
struct Plan {
    /// Places in the list of layers, one a module of `attached`.
    places: Vec<usize>,
    attached: Attached,
}

impl Plan {
    fn new(layers: &[&mut Linear], config: &AdapterConfig, architecture: &str) -> Result<Self> {
        let layers: Vec<&Linear> = layers.iter().map(|layer| &**layer).collect();
        let names = config.targets.named(&layers, architecture)?;
        let places = select(&layers, &names, config.exclude.as_ref())?;

        let specs = Specs::new(config)?;
        let module = |&place: &usize| {
            let layer = layers[place];
            let (dims, spec) = ([layer.outputs(), layer.inputs()], specs.of(layer.path()));
            // Counted when it is built.
            AttachedModule { path: layer.path().into(), spec, parameters: 0, is_wasteful: spec.is_wasteful(dims) }
        };
        let modules: Vec<AttachedModule> = places.iter().map(module).collect();

        let paths: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
        let excluded = config.exclude.as_ref().map_or(Ok(Vec::new()), |names| unmatched(names, &layers))?;
        let unused = [
            ("rank_pattern", specs.ranks.unmatched(&paths)),
            ("alpha_pattern", specs.alphas.unmatched(&paths)),
            ("exclude_modules", excluded),
        ];
        let unused = unused.iter().flat_map(|(field, keys)| keys.iter().map(move |key| format!("{field}: {key}")));

        let config = AdapterConfig { targets: Targets::Named(names), ..config.clone() };
        Ok(Self { places, attached: Attached { config, unused: unused.collect(), modules } })
    }

    fn paths(&self) -> Vec<&str> {
        self.attached.modules.iter().map(|module| module.path.as_str()).collect()
    }

    /// The updates, each of them one that its layer will take.
    fn build(&self, layers: &[&mut Linear], lora: impl Fn(&Linear, LoraSpec) -> Result<Lora>) -> Result<Vec<Lora>> {
        let modules = self.places.iter().zip(&self.attached.modules);
        let checked = modules.map(|(&place, module)| {
            let lora = lora(layers[place], module.spec)?;
            layers[place].check_adapter(&lora)?;
            Ok(lora)
        });
        checked.collect()
    }

    fn carry_out(mut self, layers: &mut [&mut Linear], loras: Vec<Lora>) -> Result<Attached> {
        for ((&place, module), lora) in self.places.iter().zip(&mut self.attached.modules).zip(loras) {
            module.parameters = lora.elements();
            layers[place].set_adapter(lora)?;
        }
        Ok(self.attached)
    }
}
