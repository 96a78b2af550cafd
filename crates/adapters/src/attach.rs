//! An adapter onto a model: the layers that the configuration names get their updates, all of them or none.

use crate::patterns::Specs;
use crate::saved::trained_bias;
use crate::start::{check_alike, check_start};
use crate::targets::{select, unmatched};
use crate::{AdapterConfig, AdapterFolder, Error, Form, Init, Linear, Lora, LoraSpec, Part, Result, Targets};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::params::elements;
use rankfold_backend::{Backend, DType};

/// What was attached, for printing and for writing.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The configuration with its targets by name, whatever the model, and the start that the update still has: what
    /// belongs in the adapter's folder.
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
/// `layers` are the linear layers of the model's blocks; `architecture` is the `model_type` of its `config.json`, for
/// targets that are not given.
///
/// A start that takes something out of the base leaves W − s·B₀·A₀ there; LoftQ's, and PiSSA's on 4 bits, is
/// [`attach_remade`](crate::attach_remade)'s.
///
/// Errors: targets that match nothing; hyper-parameters out of range; a base that is trained, or that the start cannot
/// decompose. No layer is then changed. And a remainder of the base that its element type cannot hold.
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
    let biases = plan.biases(backend, layers, None)?;
    plan.carry_out(backend, layers, loras, biases)
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
        check_start(layer, spec, config.init)?;
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
        let lora = Lora::new(layer.path(), a, b, part, spec)?;
        if !config.init.takes_from_the_base() || matches!(layer.base(), Base::Quantized(_)) {
            return Ok(lora);
        }
        let plain = LoraSpec { form: Form::Plain, ..spec };
        let (a, b) = (parameter(&[rank, layer.inputs()])?, parameter(&[layer.outputs(), rank])?);
        Ok(lora.started(Lora::new(layer.path(), a, b, Part::None, plain)?))
    })?;
    let biases = plan.biases(backend, layers, None)?;
    plan.carry_out(backend, layers, loras, biases)
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
    let config = folder.config();
    let plan = Plan::new(layers, config, architecture)?;
    let loras = plan.build(layers, |layer, spec| {
        if matches!((config.init, layer.base()), (Init::Loftq { .. }, Base::Dense(_))) {
            return Err(Error::field("init_lora_weights", config.init, "with it, the base in 4 bits that LoftQ made"));
        }
        folder.lora(backend, layer, spec)
    })?;
    let biases = plan.biases(backend, layers, Some(folder))?;
    folder.check_no_more(&plan.paths(), &biases.iter().map(|bias| &*bias.name).collect::<Vec<_>>())?;
    plan.carry_out(backend, layers, loras, biases)
}

/// What is to be attached where.
pub(crate) struct Plan {
    /// Places in the list of layers, one a module of `attached`.
    places: Vec<usize>,
    attached: Attached,
}

/// A bias that is to be trained.
pub(crate) struct TrainedBias {
    /// Its layer's place in the list of layers.
    place: usize,
    /// Its name in a PEFT folder.
    name: String,
    value: Parameter,
}

impl Plan {
    pub(crate) fn new(layers: &[&mut Linear], config: &AdapterConfig, architecture: &str) -> Result<Self> {
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
        check_alike(places.iter().map(|&place| layers[place]), config.init)?;

        let paths: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
        let excluded = config.exclude.as_ref().map_or(Ok(Vec::new()), |names| unmatched(names, &layers))?;
        let unused = [
            ("rank_pattern", specs.ranks.unmatched(&paths)),
            ("rank_pattern", config.adalora.as_ref().map_or(Vec::new(), |adalora| adalora.unmatched(&paths))),
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

    /// The modules, each with its place in the list of layers.
    pub(crate) fn modules(&self) -> impl Iterator<Item = (usize, &AttachedModule)> {
        self.places.iter().copied().zip(&self.attached.modules)
    }

    /// The biases that are to be trained, from the values that they have or, with a folder, from its.
    pub(crate) fn biases(
        &self,
        backend: &dyn Backend,
        layers: &[&mut Linear],
        folder: Option<&AdapterFolder>,
    ) -> Result<Vec<TrainedBias>> {
        let mut biases = Vec::new();
        for (place, layer) in layers.iter().enumerate() {
            let is_adapted = self.places.contains(&place);
            if !self.attached.config.bias.means(is_adapted) {
                continue;
            }
            if let Some(value) = trained_bias(backend, layer, is_adapted, folder)? {
                biases.push(TrainedBias { place, name: layer.bias_name(is_adapted), value });
            }
        }
        Ok(biases)
    }

    /// The updates, each of them one that its layer will take.
    fn build(&self, layers: &[&mut Linear], lora: impl Fn(&Linear, LoraSpec) -> Result<Lora>) -> Result<Vec<Lora>> {
        let checked = self.modules().map(|(place, module)| {
            let lora = lora(layers[place], module.spec)?;
            layers[place].check_adapter(&lora.clone().into())?;
            Ok(lora)
        });
        checked.collect()
    }

    pub(crate) fn carry_out(
        mut self,
        backend: &dyn Backend,
        layers: &mut [&mut Linear],
        loras: Vec<Lora>,
        biases: Vec<TrainedBias>,
    ) -> Result<Attached> {
        for ((&place, module), lora) in self.places.iter().zip(&mut self.attached.modules).zip(loras) {
            module.parameters = lora.elements();
            layers[place].set_adapter(lora)?;
            layers[place].take_out(backend)?;
        }
        for TrainedBias { place, value, .. } in biases {
            layers[place].train_bias(value);
        }
        // In 4 bits what is left is a base of its own, and the update a plain one beside it.
        let has_start = self.places.iter().any(|&place| layers[place].adapter().is_some_and(|l| l.start().is_some()));
        if self.attached.config.init.takes_from_the_base() && !has_start {
            self.attached.config.init = Init::Kaiming;
        }
        Ok(self.attached)
    }
}
