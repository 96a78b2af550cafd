//! A model with its tokenizer and adapter, from what the command line names.

use crate::builtin;
use crate::choices::Quantize;
use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::folder;
use crate::options::Options;
use clap::{Args, ValueEnum};
use rankfold_adapters::algebra::Rack;
use rankfold_adapters::{AttachedPeft, Init, PeftConfig, Values};
use rankfold_autograd::Base;
use rankfold_backend::{Backend, DType, check_block};
use rankfold_files::{Checkpoint, quantized};
use rankfold_trainer::data::Tokenizer;
use rankfold_trainer::model::{Model, ModelConfig, Precision, Quantization};
use rankfold_trainer::plan::Stored;
use std::borrow::Cow;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// The name of the embedded model.
pub const BUILTIN: &str = "builtin";

/// Weights that share a scale, if nothing else is said.
pub const BLOCK: usize = 64;

/// A model's folder, on the disk or embedded: no file is made of what is embedded.
#[derive(Debug)]
pub struct Folder {
    /// Where its files are; of the embedded one, what messages call it.
    pub path: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Whether it is the embedded one.
    pub builtin: bool,
}

impl Folder {
    /// Open `builtin` or a folder.
    pub fn open(model: &str) -> Result<Self> {
        let path = PathBuf::from(model);
        if model == BUILTIN {
            let config = ModelConfig::parse(builtin::CONFIG, &path.join("config.json"))?;
            let checkpoint = Checkpoint::embedded(&path.join("model.safetensors"), builtin::MODEL)?;
            return Ok(Self { path, config, checkpoint, builtin: true });
        }
        if !path.is_dir() {
            let why = "no such folder: expected 'builtin' or a Hugging Face model's folder".into();
            return Err(Error::Path { path, why });
        }
        let config = ModelConfig::open(&path)?;
        let checkpoint = Checkpoint::open(&path)?;
        Ok(Self { path, config, checkpoint, builtin: false })
    }

    /// Its tokenizer.
    ///
    /// Errors: one with more tokens than the model has rows for.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match self.builtin {
            true => Tokenizer::from_bytes(builtin::TOKENIZER.as_bytes(), builtin::TOKENIZER_CONFIG.as_bytes())?,
            false => Tokenizer::from_file(&self.path)?,
        };
        let (tokens, vocab) = (tokenizer.vocab_size(), self.config.vocab);
        if tokens > vocab {
            let why = format!("its tokenizer has {tokens} tokens, its vocab_size is {vocab}");
            return Err(Error::Path { path: self.path.clone(), why });
        }
        Ok(tokenizer)
    }

    /// Its tokenizer, where it has one.
    pub fn tokenizer_if_any(&self) -> Result<Option<Tokenizer>> {
        if self.has("tokenizer.json") { self.tokenizer().map(Some) } else { Ok(None) }
    }

    fn has(&self, name: &str) -> bool {
        if self.builtin { builtin::file(name).is_some() } else { self.path.join(name).exists() }
    }

    /// A file of it, where it has one of that name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        if self.builtin {
            return Ok(builtin::file(name).map(Cow::Borrowed));
        }
        let path = self.path.join(name);
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(Cow::Owned(std::fs::read(&path).map_err(Error::io(path))?)))
    }

    /// Whether its linear layers are stored in 4 bits.
    pub fn is_quantized(&self) -> bool {
        !quantized::weights(&self.checkpoint).is_empty()
    }

    /// The element type of its dense weights.
    pub fn dtype(&self) -> Result<DType> {
        Ok(self.checkpoint.dtype("model.embed_tokens.weight")?)
    }

    /// The element types of its weights, as far as memory is concerned: all 4-bit weights are taken to be as the first.
    pub fn stored(&self) -> Result<Stored> {
        let first = quantized::weights(&self.checkpoint).into_iter().next();
        let state = first.map(|name| quantized::state(&self.checkpoint, name)).transpose()?.flatten();
        let four_bits = state.map(|s| Quantization { format: s.format, block: s.block, double: s.offset.is_some() });
        Ok(Stored { dense: self.dtype()?, four_bits })
    }

    /// The flags of [`Folder::precision`] that the commands which use a run's adapter need, where they differ from what
    /// these take by themselves.
    pub fn flags(&self, options: &Options) -> String {
        let quantize = options.quantize.unwrap_or(Quantize::of(self.builtin));
        let mut flags = String::new();
        if let Some(value) = quantize.to_possible_value().filter(|_| quantize != Quantize::of(self.builtin)) {
            flags += &format!(" --quantize {}", value.get_name());
        }
        if quantize != Quantize::None {
            if options.double_quant.is_some_and(|double| double != self.builtin) {
                flags += if self.builtin { " --double-quant false" } else { " --double-quant" };
            }
            if let Some(block) = options.block.filter(|&block| block != BLOCK) {
                flags += &format!(" --block {block}");
            }
        }
        flags
    }

    /// Read the model.
    pub fn load(&self, backend: Arc<dyn Backend>, precision: Precision) -> Result<Model> {
        Ok(Model::load(backend, &self.checkpoint, self.config.clone(), precision)?)
    }

    /// What the weights become, as [`precision`] has it.
    pub fn precision(
        &self,
        quantize: Option<Quantize>,
        block: Option<usize>,
        double: Option<bool>,
    ) -> Result<Precision> {
        precision(self.builtin, self.is_quantized(), quantize, block, double)
    }
}

/// What the weights become: what is asked for, or 4 bits for the embedded model and as stored for others. A 4-bit
/// checkpoint stays as it is, whatever is asked.
pub fn precision(
    builtin: bool,
    quantized: bool,
    quantize: Option<Quantize>,
    block: Option<usize>,
    double: Option<bool>,
) -> Result<Precision> {
    let quantize = quantize.unwrap_or(Quantize::of(builtin));
    let (block, double) = (block.unwrap_or(BLOCK), double.unwrap_or(builtin));
    check_block(block)?;
    if quantize == Quantize::None && double && !builtin {
        tracing::warn!("--double-quant without --quantize: nothing is quantised");
    }
    if quantize == Quantize::None || quantized {
        return Ok(Precision::AsStored);
    }
    Ok(Precision::Quantized(Quantization { format: quantize.format()?, block, double }))
}

/// The flags of every command that runs a model as it is.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// `builtin`, or the folder of a Hugging Face model.
    #[arg(long, value_name = "builtin|DIR", default_value = BUILTIN)]
    pub model: String,
    /// A PEFT adapter on it; given several times, their sum.
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// What each adapter is multiplied by, in their order [default: 1 each].
    #[arg(long = "weight", value_name = "X", allow_negative_numbers = true)]
    weights: Vec<f64>,
    /// Format of the linear layers: what the adapter was trained on [default: nf4 for builtin, else none].
    #[arg(long, value_enum)]
    quantize: Option<Quantize>,
    /// Weights that share a scale: a power of two from 32 to 4096 [default: 64].
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Quantise the scales too [default: true for builtin, else false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    double_quant: Option<bool>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl ModelArgs {
    /// The model's folder.
    pub fn folder(&self) -> Result<Folder> {
        Folder::open(&self.model)
    }

    /// Read the model, with the adapter on it if one is named, and that one's configuration.
    pub fn load(&self, folder: &Folder) -> Result<(Model, Option<PeftConfig>)> {
        let precision = folder.precision(self.quantize, self.block, self.double_quant)?;
        let mut model = folder.load(self.device.open()?, precision)?;
        let config = match (&*self.adapter, &*self.weights) {
            ([], []) => None,
            ([adapter], []) => Some(attach_saved(&mut model, &self.model, precision, adapter)?),
            (adapters, weights) => {
                attach_sum(&mut model, &self.model, precision, adapters, weights)?;
                None
            }
        };
        Ok((model, config))
    }

    /// For commands that do nothing without one.
    pub fn needs_adapter(&self) -> Result<()> {
        match self.adapter.is_empty() {
            false => Ok(()),
            true => Err(Error::Usage("--adapter is missing: expected a PEFT folder".into())),
        }
    }

    /// For commands that need one whose tensors are its own.
    pub fn needs_one_adapter(&self) -> Result<()> {
        self.needs_adapter()?;
        match (self.adapter.len(), self.weights.len()) {
            (1, 0) => Ok(()),
            _ => Err(Error::Usage("several adapters, or a --weight: expected one adapter as it is".into())),
        }
    }
}

/// Put a saved adapter onto a model that was read in `precision`; its configuration.
///
/// `name` is the model's: a base of another name is warned of.
///
/// Errors: LoftQ's on 4 bits that were made while reading, which are not those that it was made with.
pub fn attach_saved(model: &mut Model, name: &str, precision: Precision, adapter: &Path) -> Result<PeftConfig> {
    let config = PeftConfig::open(adapter)?;
    let is_loftq = config.lora().is_some_and(|lora| matches!(lora.init, Init::Loftq { .. }));
    if is_loftq && matches!(precision, Precision::Quantized(_)) {
        let why = "'init_lora_weights' is loftq, which made the base in 4 bits with it: expected that base as it is \
                   stored, not 4 bits made anew";
        return Err(Error::Path { path: adapter.into(), why: why.into() });
    }
    let config = attach(model, &config, Values::Saved(adapter))?;
    let here = Path::new(name).canonicalize();
    let name_here = here.as_ref().map_or(name.into(), |path| path.to_string_lossy());
    if let Some(base) = config.base_model().filter(|base| !is_the_same(base, &name_here)) {
        tracing::warn!("{}: the adapter was made for '{base}', and the model is '{name}'", adapter.display());
    }
    Ok(config)
}

/// Whether two models' names may mean one model: by their last parts, and, where these are runs' own bases, by those
/// before them, as far as both have any.
fn is_the_same(one: &str, other: &str) -> bool {
    let parts = |name| Path::new(name).components().rev().filter(|part| matches!(part, Component::Normal(_)));
    let compared = if parts(one).next() == Some(Component::Normal(folder::BASE.as_ref())) { 2 } else { 1 };
    parts(one).zip(parts(other)).take(compared).all(|(one, other)| one == other)
}

/// Put the sum of saved adapters onto a model, each times its weight.
fn attach_sum(model: &mut Model, of: &str, precision: Precision, adapters: &[PathBuf], weights: &[f64]) -> Result<()> {
    if !weights.is_empty() && weights.len() != adapters.len() {
        let (found, expected) = (weights.len(), adapters.len());
        return Err(Error::Usage(format!("{found} times --weight beside {expected} adapters: expected one for each")));
    }
    let (backend, mut rack) = (model.backend().clone(), Rack::default());
    let names: Vec<String> = (0..adapters.len()).map(|i| i.to_string()).collect();
    for (name, adapter) in names.iter().zip(adapters) {
        let config = attach_saved(model, of, precision, adapter)?;
        let no_sum =
            |why: String| Error::Path { path: adapter.clone(), why: format!("no sum can be made with it: {why}") };
        if config.lora().is_none() {
            return Err(no_sum("expected LoRA or AdaLoRA".into()));
        }
        rack.keep(name, &config, &mut model.linears_mut()).map_err(|why| no_sum(why.to_string()))?;
    }
    let weights = weights.iter().copied().chain(std::iter::repeat(1.0));
    let parts: Vec<(f64, &str)> = weights.zip(names.iter().map(String::as_str)).collect();
    Ok(rack.put_sum(backend.as_ref(), &parts, &mut model.linears_mut())?)
}

/// Put a new adapter onto a model; its configuration. A start that needs what was quantised reads it from `checkpoint`.
pub fn attach_fresh(model: &mut Model, config: &PeftConfig, checkpoint: &Checkpoint, seed: u64) -> Result<PeftConfig> {
    let in_4_bits = model.linears().any(|layer| matches!(layer.base(), Base::Quantized(_)));
    let needs_it = |init| matches!(init, Init::Loftq { .. }) || (init == Init::Pissa && in_4_bits);
    match config.lora().filter(|lora| needs_it(lora.init)) {
        Some(lora) => {
            let dense = |path: &str| Ok(checkpoint.read_f32(&format!("{path}.weight"))?);
            Ok(warned(model.attach_remade(lora, &dense)?))
        }
        None => attach(model, config, Values::New(seed)),
    }
}

/// Put an adapter onto a model; its configuration.
fn attach(model: &mut Model, config: &PeftConfig, values: Values) -> Result<PeftConfig> {
    Ok(warned(model.attach(config, values)?))
}

/// The configuration of what was attached, once what is to be said of it is said.
fn warned(attached: AttachedPeft) -> PeftConfig {
    for warning in &attached.warnings {
        tracing::warn!("{warning}");
    }
    attached.config
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What generation stops at may also stand in files that are not read of the embedded model.
    #[test]
    fn the_embedded_model_is_its_exported_folder() {
        let folder = tempfile::tempdir().unwrap();
        builtin::export(folder.path()).unwrap();
        let [embedded, exported] = [BUILTIN, folder.path().to_str().unwrap()].map(|of| Folder::open(of).unwrap());
        assert!(embedded.checkpoint.names().eq(exported.checkpoint.names()));
        let [stops, others] = [&embedded, &exported].map(|of| of.tokenizer().unwrap().stops().to_vec());
        assert_eq!(stops, others);
        for name in
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        {
            assert_eq!(embedded.file(name).unwrap(), exported.file(name).unwrap(), "{name}");
        }
    }

    #[test]
    fn models_are_told_apart_by_their_last_parts_and_runs_own_bases_by_their_runs() {
        for (one, other, same) in [
            ("meta/llama", "/models/llama/", true),
            ("meta/llama", "meta/mistral", false),
            ("runs/001/base", "/data/runs/001/base", true),
            ("runs/001/base", "runs/002/base", false),
            ("runs/001/base", "./base", true),
            ("runs/001/base", "runs/001/lora", false),
        ] {
            assert_eq!((is_the_same(one, other), is_the_same(other, one)), (same, same), "{one} and {other}");
        }
    }
}
