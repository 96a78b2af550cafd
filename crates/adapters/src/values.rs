//! Where an adapter's tensors come from: drawn, read from a folder, or, for what counts memory, left without values.

use crate::folder::TENSORS_FILE;
use crate::linear::peft_name;
use crate::streams;
use crate::tensors::SavedTensors;
use crate::{Linear, Result};
use rankfold_autograd::{Parameter, Tensor};
use rankfold_backend::params::elements;
use rankfold_backend::{Backend, DType, philox};
use std::cell::Cell;
use std::path::Path;

/// Which values an adapter that is attached gets.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// A new adapter's, drawn from a seed.
    New(u64),
    /// Those of the folder.
    Saved(&'a Path),
    /// None in particular: for what counts memory and computes nothing.
    Blank,
}

/// How a new tensor begins.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start<'a> {
    /// All alike.
    Constant(f64),
    /// Normal, with this standard deviation.
    Normal(f64),
    /// Uniform in ± this bound.
    Uniform(f64),
    /// As another tensor.
    Copy(&'a Tensor),
}

/// `len` normal numbers of standard deviation `sigma`, from place `first` of the stream on.
pub(crate) fn normal([seed, stream, first]: [u64; 3], len: usize, sigma: f64) -> Vec<f32> {
    (first..first + len as u64).map(|i| (philox::normal(seed, stream, i) * sigma) as f32).collect()
}

/// `len` numbers uniform in ± `bound`, from place `first` of the stream on.
pub(crate) fn uniform([seed, stream, first]: [u64; 3], len: usize, bound: f64) -> Vec<f32> {
    let draw = |i: u64| f64::from(philox::unit(philox::word(seed, stream, i)));
    (first..first + len as u64).map(|i| ((2.0 * draw(i) - 1.0) * bound) as f32).collect()
}

/// [`Values`], a folder's opened.
pub(crate) enum Opened {
    New(u64),
    Saved(SavedTensors),
    Blank,
}

impl Opened {
    pub(crate) fn new(values: Values) -> Result<Self> {
        Ok(match values {
            Values::New(seed) => Self::New(seed),
            Values::Saved(folder) => Self::Saved(SavedTensors::open(&folder.join(TENSORS_FILE))?),
            Values::Blank => Self::Blank,
        })
    }

    /// A tensor of this name in a folder; `module` is who needs it, for messages. A new one is drawn from `stream`, from
    /// place `first` on.
    pub(crate) fn parameter(
        &self,
        backend: &dyn Backend,
        name: &str,
        module: &str,
        dims: &[usize],
        start: Start,
        [stream, first]: [u64; 2],
    ) -> Result<Parameter> {
        let len = elements(dims);
        let buffer = match (self, start) {
            (Self::Saved(saved), _) => return saved.parameter(backend, name, module, dims),
            (Self::Blank, _) => backend.alloc(DType::F32, len)?,
            (Self::New(_), Start::Constant(value)) => backend.filled(DType::F32, len, value)?,
            (Self::New(_), Start::Copy(tensor)) => {
                let mut copy = backend.alloc(DType::F32, len)?;
                backend.cast(tensor.view(), copy.view_mut())?;
                copy
            }
            (Self::New(seed), Start::Normal(sigma)) => backend.upload(&normal([*seed, stream, first], len, sigma))?,
            (Self::New(seed), Start::Uniform(bound)) => backend.upload(&uniform([*seed, stream, first], len, bound))?,
        };
        Ok(Parameter::new(buffer, dims)?)
    }
}

/// The values of one layer's adapter.
pub(crate) struct Source<'a> {
    backend: &'a dyn Backend,
    pub layer: &'a Linear,
    opened: &'a Opened,
    drawn: Cell<u64>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(backend: &'a dyn Backend, layer: &'a Linear, opened: &'a Opened) -> Self {
        Self { backend, layer, opened, drawn: Cell::new(0) }
    }

    /// The layer's tensor whose name ends so.
    pub(crate) fn parameter(&self, end: &str, dims: &[usize], start: Start) -> Result<Parameter> {
        let (name, module) = (peft_name(self.layer.path(), end), self.layer.path());
        let place = [streams::initialisation(self.layer.index()), self.drawn.get()];
        self.drawn.set(place[1] + elements(dims) as u64);
        self.opened.parameter(self.backend, &name, module, dims, start, place)
    }

    /// Whether a folder lacks tensors whose names end so, of any layer; a new adapter lacks nothing.
    pub(crate) fn lacks(&self, end: &str) -> bool {
        match self.opened {
            Opened::Saved(saved) => !saved.has_any(&format!(".{end}")),
            _ => false,
        }
    }
}
