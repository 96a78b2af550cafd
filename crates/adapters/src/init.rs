//! First values of an update.
//!
//! LoRA and DoRA: A uniform in ±1/√inputs (PyTorch's Kaiming-uniform with a = √5) or normal with standard deviation
//! 1/r, B zero; DoRA's m is the norm of each row of W + s·B A, so that training begins at the base. AdaLoRA: A and B
//! normal with standard deviation 0.02, E zero. Numbers are drawn by Philox from (seed, layer, element): the same on
//! every backend. PiSSA and OLoRA take A and B out of the base ([`start`](crate::start)), LoftQ out of what 4 bits lost
//! of it ([`loftq`](mod@crate::loftq)). DoRA's m is of the rows that the layer begins with: those of W, but for what
//! requantising a base in 4 bits changed of them.

use crate::lora::{Form, Part};
use crate::merge::{base_norms, update_norms};
use crate::start::{first_values, remainder, taken_out};
use crate::streams;
use crate::values::{normal, uniform};
use crate::{Error, Linear, Lora, LoraSpec, Result};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::{Backend, DType};
use std::fmt;

/// The standard deviation of AdaLoRA's A and B.
const ADALORA_SIGMA: f64 = 0.02;

/// Where A and B begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform in ±1/√inputs, B zero; AdaLoRA's own.
    #[default]
    Kaiming,
    /// A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// A uniform in ±1/√inputs, B uniform in ±1/√r: no no-op, for checks.
    Random,
    /// The largest singular triples of the base, out of which they are taken.
    Pissa,
    /// The first columns and rows of the base's Q R, out of which they are taken.
    Olora,
    /// The largest singular triples of what 4 bits lost of the base, after so many turns.
    Loftq {
        /// Turns, from 1.
        iterations: usize,
    },
}

impl Init {
    /// Whether the base is W − s·B₀·A₀ afterwards.
    pub fn takes_from_the_base(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }

    /// Whether the base is another one afterwards.
    pub fn changes_the_base(self) -> bool {
        self.takes_from_the_base() || matches!(self, Self::Loftq { .. })
    }
}

/// PEFT's name.
impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kaiming => "true",
            Self::Random => "false",
            Self::Gaussian => "gaussian",
            Self::Pissa => "pissa",
            Self::Olora => "olora",
            Self::Loftq { .. } => "loftq",
        })
    }
}

impl Lora {
    /// First values for a layer, in f32.
    ///
    /// Errors: hyper-parameters out of range; a base that cannot be decomposed; LoftQ, and PiSSA on 4 bits, which need
    /// the matrix that was quantised ([`attach_remade`](crate::attach_remade)).
    pub fn init(backend: &dyn Backend, layer: &Linear, spec: LoraSpec, init: Init, seed: u64) -> Result<Self> {
        spec.check()?;
        if init.takes_from_the_base() {
            return Self::taken_from(backend, layer, spec, init);
        }
        let (outputs, inputs, rank) = (layer.outputs(), layer.inputs(), spec.rank);
        let stream = streams::initialisation(layer.index());
        let at = |first: usize| [seed, stream, first as u64];
        let bound = |width: usize| 1.0 / (width as f64).sqrt();
        let (in_a, in_b) = (rank * inputs, outputs * rank);
        let a = match (spec.form, init) {
            (Form::AdaLora, _) => normal(at(0), in_a, ADALORA_SIGMA),
            (_, Init::Kaiming | Init::Random) => uniform(at(0), in_a, bound(inputs)),
            (_, Init::Gaussian) => normal(at(0), in_a, 1.0 / rank as f64),
            (_, init) => return Err(Error::field("init_lora_weights", init, "a start that needs no dense base")),
        };
        let b = match (spec.form, init) {
            (Form::AdaLora, _) => backend.upload(&normal(at(in_a), in_b, ADALORA_SIGMA))?,
            (_, Init::Random) => backend.upload(&uniform(at(in_a), in_b, bound(rank)))?,
            _ => backend.filled(DType::F32, in_b, 0.0)?,
        };
        let a = Parameter::new(backend.upload(&a)?, [rank, inputs])?;
        let b = Parameter::new(b, [outputs, rank])?;
        Self::complete(backend, layer, a, b, spec)
    }

    /// With A₀ and B₀, which the layer's base still holds and is to lose ([`Linear::take_out`]).
    fn taken_from(backend: &dyn Backend, layer: &Linear, spec: LoraSpec, init: Init) -> Result<Self> {
        let [a0, b0] = first_values(backend, layer, spec, init)?;
        let start = taken_out(backend, layer, [&a0, &b0], spec, init)?;
        let a = Parameter::new(backend.upload(&a0)?, [spec.rank, layer.inputs()])?;
        let b = Parameter::new(backend.upload(&b0)?, [layer.outputs(), spec.rank])?;
        let part = match (spec.form, layer.base()) {
            // Rows of the base as it was, which is what the layer begins as.
            (Form::Dora, base @ Base::Dense(_)) => {
                Part::Magnitude(Parameter::new(base_norms(backend, &base)?, [layer.outputs()])?)
            }
            (Form::Dora, Base::Quantized(_)) => {
                let plain = LoraSpec { form: Form::Plain, ..spec };
                let update = Self::new(layer.path(), a.clone(), b.clone(), Part::None, plain)?;
                let norms = update_norms(backend, &remainder(backend, layer, &start)?, &update)?;
                Part::Magnitude(Parameter::new(norms, [layer.outputs()])?)
            }
            _ => Part::None,
        };
        Ok(Self::new(layer.path(), a, b, part, spec)?.started(start))
    }

    /// A and B with the first values of what else the form has: m of the rows as they are, E zero.
    pub(crate) fn complete(
        backend: &dyn Backend,
        layer: &Linear,
        a: Parameter,
        b: Parameter,
        spec: LoraSpec,
    ) -> Result<Self> {
        let part = match spec.form {
            Form::Plain => Part::None,
            Form::Dora => {
                let plain = LoraSpec { form: Form::Plain, ..spec };
                let update = Self::new(layer.path(), a.clone(), b.clone(), Part::None, plain)?;
                let norms = update_norms(backend, &layer.base(), &update)?;
                Part::Magnitude(Parameter::new(norms, [layer.outputs()])?)
            }
            Form::AdaLora => Part::Triplets {
                lambda: Parameter::new(backend.filled(DType::F32, spec.rank, 0.0)?, [spec.rank, 1])?,
                kept: vec![true; spec.rank],
            },
        };
        Self::new(layer.path(), a, b, part, spec)
    }
}
