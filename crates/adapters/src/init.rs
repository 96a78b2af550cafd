//! First values of an update.
//!
//! LoRA and DoRA: A uniform in ±1/√inputs (PyTorch's Kaiming-uniform with a = √5) or normal with standard deviation
//! 1/r, B zero; DoRA's m is the norm of each row of W + s·B A, so that training begins at the base. AdaLoRA: A and B
//! normal with standard deviation 0.02, E zero. Numbers are drawn by Philox from (seed, layer, element): the same on
//! every backend.

use crate::lora::{Form, Part};
use crate::merge::update_norms;
use crate::streams;
use crate::{Linear, Lora, LoraSpec, Result};
use rankfold_autograd::Parameter;
use rankfold_backend::{Backend, DType, philox};

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
}

impl Lora {
    /// First values for a layer, in f32.
    pub fn init(backend: &dyn Backend, layer: &Linear, spec: LoraSpec, init: Init, seed: u64) -> Result<Self> {
        spec.check()?;
        let (outputs, inputs, rank) = (layer.outputs(), layer.inputs(), spec.rank);
        let stream = streams::initialisation(layer.index());
        let uniform = |first: usize, elements: usize, width: usize| -> Vec<f32> {
            let bound = 1.0 / (width as f64).sqrt();
            let draw = |i: usize| f64::from(philox::unit(philox::word(seed, stream, (first + i) as u64)));
            (0..elements).map(|i| ((2.0 * draw(i) - 1.0) * bound) as f32).collect()
        };
        let normal = |first: usize, elements: usize, sigma: f64| -> Vec<f32> {
            (first..first + elements).map(|i| (philox::normal(seed, stream, i as u64) * sigma) as f32).collect()
        };
        let (in_a, in_b) = (rank * inputs, outputs * rank);
        let a = match (spec.form, init) {
            (Form::AdaLora, _) => normal(0, in_a, ADALORA_SIGMA),
            (_, Init::Kaiming | Init::Random) => uniform(0, in_a, inputs),
            (_, Init::Gaussian) => normal(0, in_a, 1.0 / rank as f64),
        };
        let b = match (spec.form, init) {
            (Form::AdaLora, _) => backend.upload(&normal(in_a, in_b, ADALORA_SIGMA))?,
            (_, Init::Random) => backend.upload(&uniform(in_a, in_b, rank))?,
            _ => backend.filled(DType::F32, in_b, 0.0)?,
        };
        let a = Parameter::new(backend.upload(&a)?, [rank, inputs])?;
        let b = Parameter::new(b, [outputs, rank])?;
        Self::complete(backend, layer, a, b, spec)
    }

    /// A and B with the first values of what else the form has: m of the rows as they are, E zero.
    fn complete(backend: &dyn Backend, layer: &Linear, a: Parameter, b: Parameter, spec: LoraSpec) -> Result<Self> {
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
