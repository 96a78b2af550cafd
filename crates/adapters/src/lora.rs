//! LoRA (Hu et al. 2021, eq. 3): h = W x + s·B(A x), s = α/r, or α/√r (Kalajdzievski 2023, rsLoRA).
//!
//! A [rank, inputs], B [outputs, rank]. B begins at zero, so that training begins at the base. A's first values are
//! uniform in ±1/√inputs (PyTorch's Kaiming-uniform with a = √5) or normal with standard deviation 1/r, drawn by
//! Philox from (seed, layer, element): the same numbers on every backend.

use crate::streams;
use crate::{Error, Result};
use rankfold_autograd::{LinearAdapter, Parameter};
use rankfold_backend::params::Dropout;
use rankfold_backend::{Backend, DType, philox};

/// The hyper-parameters of one layer's update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSpec {
    /// r: rows of A, columns of B.
    pub rank: usize,
    /// α.
    pub alpha: f64,
    /// Whether s is α/√r instead of α/r.
    pub rslora: bool,
    /// The probability of dropping an element of A's input while training.
    pub dropout: f64,
}

impl LoraSpec {
    /// A rank from 1, a finite alpha, a dropout probability in [0, 1).
    pub fn check(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::field("r", self.rank, "1 or more"));
        }
        if !self.alpha.is_finite() {
            return Err(Error::field("lora_alpha", self.alpha, "a finite number"));
        }
        // As the kernels take it: just below 1 may round to 1.
        if !(0.0..1.0).contains(&(self.dropout as f32)) {
            return Err(Error::field("lora_dropout", self.dropout, "at least 0 and below 1"));
        }
        Ok(())
    }

    /// s.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Whether the rank is above min(outputs, inputs): legal, but a full matrix would be smaller. For a warning.
    pub fn is_wasteful(&self, dims: [usize; 2]) -> bool {
        self.rank > dims[0].min(dims[1])
    }
}

/// Where A and B begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform in ±1/√inputs, B zero.
    #[default]
    Kaiming,
    /// A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// A uniform in ±1/√inputs, B uniform in ±1/√r: no no-op, for checks.
    Random,
}

/// The update of one layer.
#[derive(Clone, Debug)]
pub struct Lora {
    a: Parameter,
    b: Parameter,
    spec: LoraSpec,
}

impl Lora {
    /// From A [rank, inputs] and B [outputs, rank].
    ///
    /// Errors: a hyper-parameter out of range; shapes that disagree with the rank (`module` is for the message).
    pub fn new(module: &str, a: Parameter, b: Parameter, spec: LoraSpec) -> Result<Self> {
        spec.check()?;
        let wrong = |tensor, expected, parameter: &Parameter| {
            Err(Error::Shape { module: module.into(), tensor, expected, found: parameter.shape().clone() })
        };
        match (a.shape().dims(), b.shape().dims()) {
            (&[rank, _], _) if rank != spec.rank => wrong("lora_A", format!("[{}, inputs]", spec.rank), &a),
            (_, &[_, rank]) if rank != spec.rank => wrong("lora_B", format!("[outputs, {}]", spec.rank), &b),
            (&[_, _], &[_, _]) => Ok(Self { a, b, spec }),
            (&[_, _], _) => wrong("lora_B", format!("[outputs, {}]", spec.rank), &b),
            _ => wrong("lora_A", format!("[{}, inputs]", spec.rank), &a),
        }
    }

    /// First values for a layer of matrix [outputs, inputs], in f32.
    pub fn init(
        backend: &dyn Backend,
        module: &str,
        [outputs, inputs]: [usize; 2],
        spec: LoraSpec,
        init: Init,
        seed: u64,
        layer: u64,
    ) -> Result<Self> {
        spec.check()?;
        let stream = streams::initialisation(layer);
        let uniform = |first: usize, elements: usize, width: usize| -> Vec<f32> {
            let bound = 1.0 / (width as f64).sqrt();
            let draw = |i: usize| f64::from(philox::unit(philox::word(seed, stream, (first + i) as u64)));
            (0..elements).map(|i| ((2.0 * draw(i) - 1.0) * bound) as f32).collect()
        };
        let elements = spec.rank * inputs;
        let a = match init {
            Init::Kaiming | Init::Random => uniform(0, elements, inputs),
            Init::Gaussian => {
                (0..elements).map(|i| (philox::normal(seed, stream, i as u64) / spec.rank as f64) as f32).collect()
            }
        };
        let b = match init {
            Init::Random => backend.upload(&uniform(elements, outputs * spec.rank, spec.rank))?,
            _ => backend.filled(DType::F32, outputs * spec.rank, 0.0)?,
        };
        let a = Parameter::new(backend.upload(&a)?, [spec.rank, inputs])?;
        Self::new(module, a, Parameter::new(b, [outputs, spec.rank])?, spec)
    }

    /// A [rank, inputs].
    pub fn a(&self) -> &Parameter {
        &self.a
    }

    /// B [outputs, rank].
    pub fn b(&self) -> &Parameter {
        &self.b
    }

    /// Its hyper-parameters.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// [outputs, inputs] of the matrix that B·A is.
    pub fn dims(&self) -> [usize; 2] {
        [self.b.shape().rows(), self.a.shape().width()]
    }

    /// Numbers trained.
    pub fn elements(&self) -> usize {
        self.a.shape().elements() + self.b.shape().elements()
    }

    /// The update as the tape takes it, with dropout from (seed, stream) where one is given.
    pub(crate) fn on_tape(&self, dropout: Option<(u64, u64)>) -> LinearAdapter {
        let probability = self.spec.dropout as f32;
        LinearAdapter {
            a: self.a.tensor(),
            b: self.b.tensor(),
            scale: self.spec.scale(),
            per_rank: None,
            row_scale: None,
            dropout: dropout.filter(|_| probability > 0.0).map(|(seed, stream)| Dropout { probability, seed, stream }),
        }
    }
}
