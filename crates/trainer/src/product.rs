//! What a run makes: an adapter folder, or a whole model's.

use crate::data::Tokenizer;
use crate::model::Model;
use crate::{Error, Result};
use rankfold_adapters::{PeftConfig, Purpose};
use rankfold_backend::{DType, View};
use rankfold_files::{Spec, Writer, write_atomically};
use std::path::{Path, PathBuf};

/// The model with what is saved of it.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Its trained parameters are what is saved.
    pub model: &'a Model,
    /// Which of the two.
    pub kind: Kind<'a>,
}

/// Which folder is written.
#[derive(Clone, Copy, Debug)]
pub enum Kind<'a> {
    /// An adapter's folder with this configuration.
    Adapter(&'a PeftConfig),
    /// A Hugging Face folder of the whole model.
    Full {
        /// Written along.
        tokenizer: Option<&'a Tokenizer>,
        /// The element type of a finished model's weights; checkpoints are f32.
        dtype: DType,
    },
}

impl Product<'_> {
    /// Write it into `folder`, which exists; in a checkpoint the weights are exact, and all is there to go on from.
    pub fn save(&self, folder: &Path, checkpoint: bool) -> Result<()> {
        match &self.kind {
            Kind::Adapter(config) => {
                let (model, backend) = (self.model, self.model.backend());
                let purpose = if checkpoint { Purpose::Resume } else { Purpose::Exchange };
                let (layers, modules, tokens) = (model.linears(), model.trained_modules(), model.virtual_tokens());
                Ok(config.write(backend, folder, layers, modules, tokens, purpose)?)
            }
            Kind::Full { tokenizer, dtype } => {
                self.save_model(folder, *tokenizer, if checkpoint { DType::F32 } else { *dtype })
            }
        }
    }

    /// The file of the weights in a folder that [`Product::save`] wrote.
    pub fn weights(&self, folder: &Path) -> PathBuf {
        folder.join(match self.kind {
            Kind::Adapter(_) => "adapter_model.safetensors",
            Kind::Full { .. } => "model.safetensors",
        })
    }

    fn save_model(&self, folder: &Path, tokenizer: Option<&Tokenizer>, dtype: DType) -> Result<()> {
        let (named, backend) = (self.model.parameters(), self.model.backend());
        let spec = |n: &crate::optimizer::Named| Spec::new(&*n.name, dtype, n.parameter.shape().dims());
        let mut writer = Writer::create(&folder.join("model.safetensors"), named.iter().map(spec).collect())?;
        for n in &named {
            let tensor = n.parameter.tensor();
            let mut write = |view: View| writer.write_view(&n.name, backend.as_ref(), view);
            if tensor.dtype() == dtype {
                write(tensor.view())?;
            } else {
                let mut cast = backend.alloc(dtype, tensor.shape().elements())?;
                backend.cast(tensor.view(), cast.view_mut())?;
                write(cast.view())?;
            }
        }
        writer.finish()?;
        if let Some(tokenizer) = tokenizer {
            write_tokenizer(folder, tokenizer)?;
        }
        // The last file: a folder with a config is a whole model.
        write_config(folder, &self.model.config.raw, dtype)
    }
}

/// The tokenizer's files into a model's folder.
pub fn write_tokenizer(folder: &Path, tokenizer: &Tokenizer) -> Result<()> {
    for (name, text) in tokenizer.files()? {
        write_atomically(&folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// `config.json` of a dense model in `dtype`, all else as it was.
pub fn write_config(folder: &Path, raw: &serde_json::Value, dtype: DType) -> Result<()> {
    let mut config = raw.clone();
    let path = folder.join("config.json");
    if let Some(object) = config.as_object_mut() {
        object.remove("quantization_config");
        // transformers 4 says torch_dtype, 5 says dtype: whichever was there.
        let key = if object.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        object.insert(key.into(), dtype_name(dtype).into());
    }
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(&path, e.to_string()))?;
    Ok(write_atomically(&path, format!("{text}\n").as_bytes())?)
}

/// torch's name of an element type.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}
