//! The configuration of LoRA's relatives that sit on linear layers: (IA)³, BitFit, bottlenecks, diff pruning.
//!
//! Read: as LoRA's, every field is taken, or known to change nothing, or null, false or empty; any other is an error
//! that names it. Written: (IA)³'s as PEFT 0.21.2 writes it; the others', which PEFT lacks, in its manner.

use crate::adapter::Adapter;
use crate::bitfit::Bias;
use crate::bottleneck::{Bottleneck, Placement};
use crate::config::{IGNORED, is_empty, json_number, number, rank, take_origin};
use crate::diff::Diff;
use crate::ia3::{self, Ia3, Side};
use crate::lora::check_rows;
use crate::targets::{Names, Targets, compile, select, unmatched};
use crate::values::{Opened, Source, Values};
use crate::{Error, Linear, Result, peft_name};
use rankfold_backend::Backend;
use serde_json::{Map, Value, json};

/// Which of them, with what each has of its own.
#[derive(Clone, Debug, PartialEq)]
pub enum Relative {
    /// (IA)³.
    Ia3 {
        /// The targeted layers whose inputs are scaled; PEFT's for the architecture where not given.
        feed_forward: Option<Names>,
    },
    /// BitFit.
    BitFit,
    /// Bottleneck adapters.
    Bottleneck {
        /// After which layers.
        placement: Placement,
        /// Rows of D.
        bottleneck: usize,
    },
    /// Diff pruning.
    Diff {
        /// What the expected share of changed elements costs.
        penalty: f64,
    },
}

/// What an adapter is: which method, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct RelativeConfig {
    /// The method.
    pub method: Relative,
    /// The layers that get an adapter,
    pub targets: Targets,
    /// but for these.
    pub exclude: Option<Names>,
    /// The base that the adapter was made for.
    pub base_model: Option<String>,
    /// The base's version.
    pub revision: Option<String>,
    /// PEFT's name of the task.
    pub task_type: Option<String>,
}

impl Relative {
    /// Its `peft_type`.
    pub fn peft_type(&self) -> &'static str {
        match self {
            Self::Ia3 { .. } => "IA3",
            Self::BitFit => "BITFIT",
            Self::Bottleneck { .. } => "BOTTLENECK",
            Self::Diff { .. } => "DIFF_PRUNING",
        }
    }

    /// That of a `peft_type`, its own fields yet to be read.
    fn of(peft_type: &str) -> Option<Self> {
        let placement = Placement::Houlsby;
        let all = [
            Self::Ia3 { feed_forward: None },
            Self::BitFit,
            Self::Bottleneck { placement, bottleneck: 0 },
            Self::Diff { penalty: f64::NAN },
        ];
        all.into_iter().find(|method| method.peft_type() == peft_type)
    }

    /// Take a field, if it is one of its own.
    fn take(&mut self, field: &str, value: &Value) -> Result<bool> {
        match (self, field) {
            (Self::Ia3 { feed_forward }, "feedforward_modules") if !value.is_null() => {
                *feed_forward = Some(Names::from_json(field, value)?);
            }
            // How l began; what it became is in the folder.
            (Self::Ia3 { .. }, "init_ia3_weights") => {}
            (Self::Bottleneck { bottleneck, .. }, "bottleneck") => *bottleneck = rank(field, value)?,
            (Self::Bottleneck { placement, .. }, "placement") => {
                let all = [Placement::Houlsby, Placement::Pfeiffer];
                let found = all.into_iter().find(|placement| value == placement.name());
                *placement = found.ok_or_else(|| Error::field(field, value, "\"houlsby\" or \"pfeiffer\""))?;
            }
            (Self::Diff { penalty }, "diff_penalty") => *penalty = number(field, value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self) -> Result<()> {
        match self {
            Self::Bottleneck { bottleneck, .. } => check_rows("bottleneck", *bottleneck),
            Self::Diff { penalty } if !(*penalty >= 0.0 && penalty.is_finite()) => {
                Err(Error::field("diff_penalty", penalty, "0 or more"))
            }
            _ => Ok(()),
        }
    }

    /// The adapter of one layer.
    fn adapter(&self, source: &Source) -> Result<Adapter> {
        Ok(match self {
            Self::Ia3 { feed_forward } => {
                let names = feed_forward.as_ref();
                let is_inner = names.map_or(Ok(false), |names| is_feed_forward(names, source.layer.path()))?;
                Adapter::Ia3(Ia3::new(source, if is_inner { Side::Inputs } else { Side::Outputs })?)
            }
            Self::BitFit => Adapter::Bias(Bias::new(source)?),
            Self::Bottleneck { bottleneck, .. } => Adapter::Bottleneck(Bottleneck::new(source, *bottleneck)?),
            Self::Diff { .. } => Adapter::Diff(Diff::new(source)?),
        })
    }
}

/// PEFT's rule: a path that ends in an entry, whether or not a part of it begins there; or one that is the expression.
fn is_feed_forward(names: &Names, path: &str) -> Result<bool> {
    match names {
        Names::List(names) => Ok(names.iter().any(|name| path.ends_with(name))),
        Names::Pattern(pattern) => Ok(compile("feedforward_modules", pattern, pattern)?.is_match(path)),
    }
}

impl RelativeConfig {
    /// Of a method, for a causal language model, on the method's own targets.
    pub fn new(method: Relative) -> Self {
        let task_type = Some("CAUSAL_LM".into());
        Self { method, targets: Targets::Default, exclude: None, base_model: None, revision: None, task_type }
    }

    /// Read the fields of a file whose `peft_type` is one of these; `None` where it is another.
    pub(crate) fn from_fields(peft_type: &str, fields: &Map<String, Value>) -> Result<Option<Self>> {
        let Some(method) = Relative::of(peft_type) else { return Ok(None) };
        let mut config = Self { task_type: None, ..Self::new(method) };
        for (field, value) in fields {
            config.take(field, value)?;
        }
        config.method.check()?;
        config.check_feed_forward()?;
        Ok(Some(config))
    }

    /// PEFT's rule: of two lists, `feedforward_modules` names some of `target_modules`.
    fn check_feed_forward(&self) -> Result<()> {
        let (Relative::Ia3 { feed_forward: Some(Names::List(inner)) }, Targets::Named(Names::List(targets))) =
            (&self.method, &self.targets)
        else {
            return Ok(());
        };
        match inner.difference(targets).next() {
            Some(stranger) => Err(Error::field("feedforward_modules", stranger, "some of 'target_modules'")),
            None => Ok(()),
        }
    }

    fn take(&mut self, field: &str, value: &Value) -> Result<()> {
        let has_targets = !matches!(self.method, Relative::Bottleneck { .. });
        match field {
            "peft_type" => {}
            _ if self.method.take(field, value)? => {}
            "target_modules" if has_targets => self.targets = Targets::from_json(value)?,
            "exclude_modules" if !is_empty(value) => self.exclude = Some(Names::from_json(field, value)?),
            _ if take_origin(field, value, [&mut self.base_model, &mut self.revision, &mut self.task_type])? => {}
            _ if IGNORED.contains(&field) || is_empty(value) => {}
            _ => return Err(Error::Unsupported { field: field.into(), value: value.to_string() }),
        }
        Ok(())
    }

    /// The text of the file.
    pub(crate) fn to_json(&self) -> String {
        let mut fields = json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "exclude_modules": self.exclude.as_ref().map(Names::to_json),
            "inference_mode": true,
            "modules_to_save": null,
            "peft_type": self.method.peft_type(),
            "revision": self.revision,
            "target_modules": self.targets.to_json(),
            "task_type": self.task_type,
        });
        if let Value::Object(fields) = &mut fields {
            let mut put = |name: &str, value| drop(fields.insert(name.into(), value));
            match &self.method {
                Relative::Ia3 { feed_forward } => {
                    put("fan_in_fan_out", false.into());
                    put("feedforward_modules", json!(feed_forward.as_ref().map(Names::to_json)));
                    put("init_ia3_weights", true.into());
                    put("peft_version", "0.21.2".into());
                }
                Relative::BitFit => {}
                Relative::Bottleneck { placement, bottleneck } => {
                    fields.remove("target_modules");
                    fields.insert("bottleneck".into(), (*bottleneck).into());
                    fields.insert("placement".into(), placement.name().into());
                }
                Relative::Diff { penalty } => put("diff_penalty", json_number(*penalty)),
            }
            fields.sort_keys();
        }
        format!("{fields:#}")
    }

    /// The same with its layers by name, whatever the model, and those names.
    fn resolved(&self, layers: &[&Linear], architecture: &str) -> Result<(Self, Names)> {
        let list = |names: &[&str]| Names::List(names.iter().map(|name| name.to_string()).collect());
        let names = match (&self.targets, &self.method) {
            (_, Relative::Bottleneck { placement, .. }) => list(placement.targets()),
            (Targets::Default, Relative::Ia3 { .. }) => list(ia3::default_targets(architecture)?),
            (Targets::Default, _) => Targets::AllLinear.named(layers, architecture)?,
            (targets, _) => targets.named(layers, architecture)?,
        };
        let mut method = self.method.clone();
        if let Relative::Ia3 { feed_forward: feed_forward @ None } = &mut method {
            // PEFT wants them among the targets, where these are a list.
            let targeted = match &names {
                Names::List(names) => names.iter().filter(|name| name.ends_with(ia3::FEED_FORWARD)).cloned().collect(),
                Names::Pattern(_) => [ia3::FEED_FORWARD.to_owned()].into(),
            };
            *feed_forward = Some(Names::List(targeted));
        }
        // Where bottlenecks go, their placement says.
        let targets = match &method {
            Relative::Bottleneck { .. } => Targets::Default,
            _ => Targets::Named(names.clone()),
        };
        Ok((Self { method, targets, ..self.clone() }, names))
    }

    /// Put the method onto the layers that it names: the configuration with its layers by name, the numbers that
    /// train, and the entries of `exclude_modules` that mean no layer.
    ///
    /// Errors: targets that match nothing; a base that is trained; with a folder, tensors that are missing, left over,
    /// of other shapes, or not finite. No layer is then changed.
    pub(crate) fn attach(
        &self,
        backend: &dyn Backend,
        layers: &mut [&mut Linear],
        architecture: &str,
        values: Values,
    ) -> Result<(Self, usize, Vec<String>)> {
        self.method.check()?;
        let opened = Opened::new(values)?;
        let (config, places, adapters, unused) = {
            let layers: Vec<&Linear> = layers.iter().map(|layer| &**layer).collect();
            let (config, names) = self.resolved(&layers, architecture)?;
            let places = select(&layers, &names, config.exclude.as_ref())?;
            let unused = config.exclude.as_ref().map_or(Ok(Vec::new()), |names| unmatched(names, &layers))?;
            let adapter = |&place: &usize| {
                let layer = layers[place];
                let adapter = config.method.adapter(&Source::new(backend, layer, &opened))?;
                layer.check_adapter(&adapter)?;
                Ok((layer.path().to_owned(), adapter))
            };
            let adapters = places.iter().map(adapter).collect::<Result<Vec<_>>>()?;
            (config, places, adapters, unused)
        };
        if let Opened::Saved(saved) = &opened {
            let names = |(path, adapter): &(String, Adapter)| -> Vec<String> {
                adapter.parameters().into_iter().map(|(end, _)| peft_name(path, end)).collect()
            };
            let known: Vec<String> = adapters.iter().flat_map(names).collect();
            saved.check_no_more(|name| known.iter().any(|known| known == name))?;
        }
        let trained = adapters.iter().map(|(_, adapter)| adapter.elements()).sum();
        for (place, (_, adapter)) in places.into_iter().zip(adapters) {
            layers[place].set_adapter(adapter)?;
        }
        Ok((config, trained, unused))
    }
}
