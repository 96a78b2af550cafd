//! A model with its tokenizer and adapter, from what the command line names.

use crate::builtin;
use crate::error::{Error, Result};
use rankfold_adapters::{AdapterConfig, AdapterFolder, Attached, attach_folder, attach_new};
use rankfold_backend::{Backend, DType, Format};
use rankfold_files::{Checkpoint, quantized};
use rankfold_trainer::data::Tokenizer;
use rankfold_trainer::model::{Model, ModelConfig, Precision, Quantization};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of the embedded model.
pub const BUILTIN: &str = "builtin";

/// A model's folder, on the disk or embedded.
#[derive(Debug)]
pub struct Folder {
    /// Where its files are.
    pub path: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Whether it is the embedded one.
    pub builtin: bool,
    /// Holds the embedded model's files while they are read.
    _temporary: Option<tempfile::TempDir>,
}

impl Folder {
    /// Open `builtin` or a folder.
    pub fn open(model: &str) -> Result<Self> {
        let builtin = model == BUILTIN;
        let (path, temporary) = if builtin {
            let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
            builtin::export(folder.path())?;
            (folder.path().to_owned(), Some(folder))
        } else {
            (PathBuf::from(model), None)
        };
        if !path.is_dir() {
            let why = "no such folder: expected 'builtin' or a Hugging Face model's folder".into();
            return Err(Error::Path { path, why });
        }
        let config = ModelConfig::open(&path)?;
        let checkpoint = Checkpoint::open(&path)?;
        Ok(Self { path, config, checkpoint, builtin, _temporary: temporary })
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::from_file(&self.path)?)
    }

    /// Its tokenizer, where it has one.
    pub fn tokenizer_if_any(&self) -> Result<Option<Tokenizer>> {
        if self.path.join("tokenizer.json").exists() { self.tokenizer().map(Some) } else { Ok(None) }
    }

    /// Whether its linear layers are stored in 4 bits.
    pub fn is_quantized(&self) -> bool {
        !quantized::weights(&self.checkpoint).is_empty()
    }

    /// The element type of its dense weights.
    pub fn dtype(&self) -> Result<DType> {
        Ok(self.checkpoint.dtype("model.embed_tokens.weight")?)
    }

    /// Read the model.
    pub fn load(&self, backend: Arc<dyn Backend>, precision: Precision) -> Result<Model> {
        Ok(Model::load(backend, &self.checkpoint, self.config.clone(), precision)?)
    }

    /// Read the model with an adapter on it, if one is named.
    pub fn load_with(&self, backend: Arc<dyn Backend>, precision: Precision, adapter: Option<&Path>) -> Result<Model> {
        let mut model = self.load(backend, precision)?;
        if let Some(adapter) = adapter {
            attach_saved(&mut model, adapter)?;
        }
        Ok(model)
    }

    /// What is done where nothing is said: 4 bits for the embedded model, as stored for others.
    pub fn default_precision(&self) -> Precision {
        if self.builtin { Precision::Quantized(DEFAULT_QUANTIZATION) } else { Precision::AsStored }
    }
}

/// NF4, block 64, double: QLoRA's own choice.
pub const DEFAULT_QUANTIZATION: Quantization = Quantization { format: Format::Nf4, block: 64, double: true };

/// Put a saved adapter onto a model; its configuration.
pub fn attach_saved(model: &mut Model, adapter: &Path) -> Result<AdapterConfig> {
    let (backend, family) = (model.backend().clone(), model.config.architecture.model_type());
    let folder = AdapterFolder::open(adapter)?;
    let attached = attach_folder(backend.as_ref(), &mut model.linears_mut(), &folder, family)?;
    warn_of(&attached);
    Ok(attached.config)
}

/// Put new adapters onto a model; their configuration.
pub fn attach_fresh(model: &mut Model, config: &AdapterConfig, seed: u64) -> Result<AdapterConfig> {
    let (backend, family) = (model.backend().clone(), model.config.architecture.model_type());
    let attached = attach_new(backend.as_ref(), &mut model.linears_mut(), config, family, seed)?;
    warn_of(&attached);
    Ok(attached.config)
}

fn warn_of(attached: &Attached) {
    for module in attached.modules.iter().filter(|module| module.is_wasteful) {
        let (path, rank) = (&module.path, module.spec.rank);
        tracing::warn!("{path}: rank {rank} is above the smaller side of its matrix: legal, and wasteful");
    }
    for unused in &attached.unused {
        tracing::warn!("{unused} means no layer of this model");
    }
}
