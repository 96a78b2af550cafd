//! Everything that can be wrong with an adapter, its configuration or its folder.

use crate::peft::KNOWN;
use rankfold_backend::{DType, Shape};
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// The result of anything done with adapters.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, with which field, module or tensor, and what was expected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// An operation on tensors refused.
    #[error(transparent)]
    Autograd(#[from] rankfold_autograd::Error),
    /// A file of tensors could not be read or written.
    #[error(transparent)]
    Files(#[from] rankfold_files::Error),
    /// A kernel refused.
    #[error(transparent)]
    Backend(#[from] rankfold_backend::Error),
    /// The operating system refused.
    #[error("{path}: cannot {doing}: {source}")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    /// What is wrong with a configuration file, or with an adapter's folder.
    #[error("{path}: {source}")]
    In { path: PathBuf, source: Box<Error> },
    /// A text that is no configuration at all.
    #[error("not an adapter's configuration: {why}")]
    Json { why: String },
    /// A method that is not built.
    #[error("peft_type '{found}' is not supported yet, expected {KNOWN}")]
    Method { found: String },
    /// A field that would change the mathematics in a way that is not built.
    #[error("'{field}' is {value}: not supported yet")]
    Unsupported { field: String, value: String },
    /// A dimension that is not the model's.
    #[error("'{field}' is {found}, but the model's is {expected}: an adapter for another base?")]
    OtherModel { field: &'static str, found: usize, expected: usize },
    /// A field with an impossible value.
    #[error("'{field}' is {value}, expected {expected}")]
    Field { field: String, value: String, expected: &'static str },
    /// A regular expression that does not compile.
    #[error("'{field}': '{pattern}' is not a regular expression: {why}")]
    Pattern { field: &'static str, pattern: String, why: String },
    /// A target that is no linear layer's name.
    #[error("target '{target}' matches no linear layer of the model, which has {examples}")]
    NoMatch { target: String, examples: String },
    /// A target that takes no adapter.
    #[error("target '{target}' is the model's embedding or head: not supported yet, expected layers of its blocks")]
    Outside { target: String },
    /// Every target is excluded.
    #[error("'exclude_modules' leaves none of the {targeted} linear layers that 'target_modules' matches")]
    AllExcluded { targeted: usize },
    /// No targets given, and none known.
    #[error("'target_modules' is not given, and architecture '{architecture}' has no default")]
    NoDefault { architecture: String },
    /// A part of a layer whose shape does not fit its matrix.
    #[error("{module}: '{tensor}' has shape {found}, expected {expected}")]
    Shape { module: String, tensor: &'static str, expected: String, found: Shape },
    /// An adapter on a layer whose base is trained itself.
    #[error("{module}: an adapter needs a frozen base, and this one is trained")]
    TrainedBase { module: String },
    /// An adapter that cannot be taken off.
    #[error("{module}: its base was made for the adapter that began on it, and stays so: expected a model read anew")]
    PartialBase { module: String },
    /// An adapter that is more than what sits on the layers.
    #[error("the adapter comes with {with}, expected one that leaves the base as it is")]
    NotAlone { with: &'static str },
    /// An update that cannot be a term of a sum.
    #[error("{module}: what sits on it is no term of a sum, expected LoRA or AdaLoRA")]
    NoSum { module: String },
    /// A matrix that cannot be decomposed.
    #[error("{module}: the singular values of its matrix were not found")]
    Decomposition { module: String },
    /// A method that is no matrix beside a matrix.
    #[error("{module}: {method} does not merge into the base's weights")]
    NoMerge { module: String, method: &'static str },
    /// A method that sits on the model and not on its layers.
    #[error("{method} sits before the text and on no linear layer")]
    NoLayers { method: &'static str },
    /// A merged weight that its element type cannot hold.
    #[error("{module}: merging gives values that are not finite in {dtype}")]
    MergeOverflow { module: String, dtype: DType },
    /// A tensor that the configuration promises.
    #[error("{path}: no tensor '{tensor}', expected one because the configuration targets {module}")]
    MissingTensor { path: PathBuf, tensor: String, module: String },
    /// An entry that names nothing which can be trained whole.
    #[error("'modules_to_save' has '{name}', expected one of {known}")]
    NoModule { name: String, known: String },
    /// A tensor that the configuration does not explain.
    #[error("{path}: tensor '{tensor}' belongs to no layer that the configuration targets in this model")]
    ExtraTensor { path: PathBuf, tensor: String },
    /// A tensor whose shape is not the layer's.
    #[error("{path}: '{tensor}' has shape {found:?}, expected {expected:?} for {module}: an adapter for another base?")]
    OtherBase { path: PathBuf, tensor: String, module: String, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor whose rank is not the configuration's.
    #[error("{path}: '{tensor}' has rank {found}, expected {expected} by the configuration")]
    OtherRank { path: PathBuf, tensor: String, found: usize, expected: usize },
    /// A value that no training should have left.
    #[error("{path}: element {index} of '{tensor}' is {value}, expected a finite number")]
    NonFinite { path: PathBuf, tensor: String, index: usize, value: f32 },
}

impl Error {
    /// A field whose value is not `expected`.
    pub(crate) fn field(field: impl Into<String>, value: impl Display, expected: &'static str) -> Self {
        Self::Field { field: field.into(), value: value.to_string(), expected }
    }

    /// For `map_err`: an I/O error with the file it met and what was being done to it.
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.into(), doing, source }
    }

    /// This one with the folder that it was met in, if it does not say already where.
    pub fn in_folder(self, folder: &Path) -> Self {
        match self {
            Self::Io { .. }
            | Self::Files(_)
            | Self::In { .. }
            | Self::MissingTensor { .. }
            | Self::ExtraTensor { .. }
            | Self::OtherBase { .. }
            | Self::OtherRank { .. }
            | Self::NonFinite { .. } => self,
            other => Self::In { path: folder.into(), source: Box::new(other) },
        }
    }

    /// For `map_err`: the file in which a wrong field stands.
    pub(crate) fn within(path: &Path) -> impl FnOnce(Self) -> Self {
        move |source| Self::In { path: path.into(), source: Box::new(source) }
    }
}
