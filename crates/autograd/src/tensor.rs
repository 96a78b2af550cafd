//! Tensors, parameters and the bases of linear layers.

use crate::saved::Recipe;
use crate::{Error, Result};
use rankfold_backend::{Buffer, DType, Quantized, Shape, View, Weight};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// A buffer with a shape: contiguous, row-major, never changed once made.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    shape: Shape,
    variable: Option<Variable>,
    /// How its elements can be had again from what the tape keeps anyway, while it does.
    recipe: Option<Weak<dyn Recipe>>,
}

/// Whose gradient a tensor's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variable {
    /// The output of the tape's operation of this number.
    Node(usize),
    /// A parameter.
    Parameter(ParameterId),
}

impl Tensor {
    /// A constant: nothing asks for its gradient, and none is computed.
    pub fn constant(buffer: impl Into<Arc<Buffer>>, shape: impl Into<Shape>) -> Result<Self> {
        let (buffer, shape) = (buffer.into(), shape.into());
        if buffer.len() != shape.elements() {
            let expected = format!("{} elements", buffer.len());
            return Err(Error::Shape { op: "tensor", tensor: "buffer", expected, found: shape });
        }
        Ok(Self { buffer, shape, variable: None, recipe: None })
    }

    pub(crate) fn variable_of(buffer: Arc<Buffer>, shape: Shape, variable: Option<Variable>) -> Self {
        Self { buffer, shape, variable, recipe: None }
    }

    pub(crate) fn with_recipe(self, recipe: &Arc<dyn Recipe>) -> Self {
        Self { recipe: Some(Arc::downgrade(recipe)), ..self }
    }

    pub(crate) fn recipe(&self) -> Option<Arc<dyn Recipe>> {
        self.recipe.as_ref().and_then(Weak::upgrade)
    }

    /// Its elements.
    pub fn view(&self) -> View<'_> {
        self.buffer.view()
    }

    /// The buffer itself, shared.
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// The variable whose gradient is wanted, if any.
    pub fn variable(&self) -> Option<Variable> {
        self.variable
    }

    /// The same elements without a gradient.
    pub fn detach(&self) -> Self {
        Self { variable: None, ..self.clone() }
    }
}

/// Names a parameter within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParameterId(u64);

/// A trained tensor: shared by the layers that use it and the optimiser that changes it.
#[derive(Clone, Debug)]
pub struct Parameter {
    id: ParameterId,
    shape: Shape,
    value: Arc<RwLock<Arc<Buffer>>>,
}

impl Parameter {
    /// A parameter with a first value.
    pub fn new(value: Buffer, shape: impl Into<Shape>) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let Tensor { buffer, shape, .. } = Tensor::constant(value, shape)?;
        let id = ParameterId(NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(Self { id, shape, value: Arc::new(RwLock::new(buffer)) })
    }

    /// Its name within the process.
    pub fn id(&self) -> ParameterId {
        self.id
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its value now, as a tensor whose gradient is this parameter's.
    pub fn tensor(&self) -> Tensor {
        // A panic elsewhere cannot leave half an `Arc`: the value is whole even in a poisoned lock.
        let buffer = self.value.read().unwrap_or_else(PoisonError::into_inner).clone();
        Tensor::variable_of(buffer, self.shape.clone(), Some(Variable::Parameter(self.id)))
    }

    /// Change the value in place. An error where a tensor of it is still alive.
    pub fn update<T>(&self, change: impl FnOnce(&mut Buffer) -> Result<T>) -> Result<T> {
        let mut value = self.value.write().unwrap_or_else(PoisonError::into_inner);
        match Arc::get_mut(&mut value) {
            Some(buffer) => change(buffer),
            None => Err(Error::Held { shape: self.shape.clone() }),
        }
    }
}

/// A tensor of a model: as its file has it, or trained.
#[derive(Clone, Debug)]
pub enum Value {
    /// A constant.
    Frozen(Tensor),
    /// A parameter.
    Trained(Parameter),
}

impl Value {
    /// Its value now; a variable where it is trained.
    pub fn tensor(&self) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.detach(),
            Self::Trained(parameter) => parameter.tensor(),
        }
    }

    /// The parameter, where it is trained.
    pub fn parameter(&self) -> Option<&Parameter> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(parameter) => Some(parameter),
        }
    }
}

/// The matrix [outputs, inputs] of a linear layer.
#[derive(Clone, Debug)]
pub enum Base {
    /// Dense: frozen in its file's element type, or a parameter's tensor.
    Dense(Tensor),
    /// 4 bits: always frozen.
    Quantized(Arc<Quantized>),
}

impl Base {
    /// The matrix as kernels take it.
    pub fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(tensor) => Weight::Dense(tensor.view()),
            Self::Quantized(quantized) => Weight::Quantized(quantized),
        }
    }

    /// [outputs, inputs], where it is a matrix.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Dense(tensor) => tensor.shape().dims().try_into().map_err(|_| Error::Shape {
                op: "linear",
                tensor: "weight",
                expected: "[outputs, inputs]".into(),
                found: tensor.shape().clone(),
            }),
            Self::Quantized(quantized) => Ok(quantized.shape),
        }
    }

    /// The variable whose gradient is wanted, if any.
    pub fn variable(&self) -> Option<Variable> {
        match self {
            Self::Dense(tensor) => tensor.variable(),
            Self::Quantized(_) => None,
        }
    }
}
