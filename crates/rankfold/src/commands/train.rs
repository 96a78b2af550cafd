//! `rankfold train`: the main job.

use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::folder;
use crate::open::{DEFAULT_QUANTIZATION, Folder};
use crate::options::{Method, Options, Quantize};
use crate::show::{Bar, bytes, count};
use clap::Args;
use rankfold_adapters::{AdapterConfig, LoraSpec, Targets};
use rankfold_backend::Compute;
use rankfold_trainer::data::{Batch, Data, Evaluation, Loader, Shape, Source, Tokenizer, tokens};
use rankfold_trainer::generate::{Sampling, generate};
use rankfold_trainer::model::{Model, Precision, Quantization};
use rankfold_trainer::optimizer::{AdamW, Hyper};
use rankfold_trainer::product::{Kind, Product};
use rankfold_trainer::run::{Cadence, Run};
use rankfold_trainer::schedule;
use rankfold_trainer::step::{Batches, Recipe};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Finetune a model. With no options: the built-in model on the built-in text, by QLoRA.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct Train {
    /// A TOML file of these options; flags win over it.
    #[arg(long, value_name = "run.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    /// The run's folder [default: the first free runs/NNN].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the last whole checkpoint of --out, with the run's own options.
    #[arg(long, requires = "out", conflicts_with = "overwrite")]
    resume: bool,
    /// Remove the run that --out holds.
    #[arg(long)]
    overwrite: bool,
    /// Threads; all cores if not given. Never changes a result.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Train {
    pub fn run(self) -> Result<()> {
        let given = match &self.config {
            Some(path) => self.options.clone().or(Options::read(path)?)?,
            None => self.options.clone(),
        };
        let options = match self.resume {
            true => folder::options_to_resume(self.out.as_deref().unwrap_or(Path::new("")), &given)?,
            false => given.clone().or(given.defaults())?,
        };
        if let Some(out) = self.out.as_deref().filter(|out| self.resume && folder::is_finished(out)) {
            println!("the run in {} is finished: nothing to do", out.display());
            return Ok(());
        }
        check(&options)?;
        // The data and the model are opened before anything is written, so that a bad input leaves no folder.
        let job = Job::open(&options, self.threads)?;
        let out = match self.out {
            Some(out) => out,
            None => folder::first_free(Path::new("runs"))?,
        };
        folder::claim(&out, self.resume, self.overwrite)?;
        rankfold_files::write_atomically(&out.join("run.toml"), options.to_toml()?.as_bytes())?;
        job.run(&options, &out, self.resume)
    }
}

/// Ranges that no later step checks.
fn check(options: &Options) -> Result<()> {
    let at_least = |name: &str, value: Option<usize>, least: usize| match value {
        Some(value) if value < least => Err(Error::Usage(format!("--{name} {value}: expected at least {least}"))),
        _ => Ok(()),
    };
    at_least("rank", options.rank, 1)?;
    at_least("steps", options.steps, 1)?;
    at_least("batch", options.batch, 1)?;
    at_least("accumulate", options.accumulate, 1)?;
    at_least("keep", options.keep, 1)?;
    let number = |name: &str, value: Option<f64>, fits: fn(f64) -> bool, expected: &str| match value {
        Some(value) if !fits(value) => Err(Error::Usage(format!("--{name} {value}: expected {expected}"))),
        _ => Ok(()),
    };
    number("lr", options.lr, |x| x > 0.0 && x.is_finite(), "a positive number")?;
    number("alpha", options.alpha, f64::is_finite, "a finite number")?;
    number("clip", options.clip, |x| x >= 0.0, "0 or more")?;
    number("weight-decay", options.weight_decay, |x| x >= 0.0 && x.is_finite(), "0 or more")?;
    number("dropout", options.dropout, |x| (0.0..1.0).contains(&x), "at least 0 and below 1")?;
    number("beta2", options.beta2, |x| (0.0..1.0).contains(&x), "at least 0 and below 1")?;
    match (options.warmup, options.steps) {
        (Some(warmup), Some(steps)) if warmup > steps => {
            Err(Error::Usage(format!("--warmup {warmup}: expected no more than the {steps} steps")))
        }
        _ => Ok(()),
    }
}

/// A run's parts, opened.
struct Job {
    model: Model,
    folder: Folder,
    tokenizer: Option<Tokenizer>,
    adapter: Option<AdapterConfig>,
    batches: Batches,
    held_out: Vec<Batch>,
}

impl Job {
    fn open(options: &Options, threads: Option<usize>) -> Result<Self> {
        let device = options.device.unwrap_or_default();
        let backend = DeviceArgs { device, threads, ..DeviceArgs::default() }.open()?;
        let folder = Folder::open(options.model.as_deref().unwrap_or_default())?;
        let (batches, held_out, tokenizer) = data(options, &folder)?;
        let mut model = folder.load(backend, precision(options, &folder)?)?;
        let adapter = attach(options, &folder, &mut model)?;
        describe(options, &folder, &model, &batches);
        Ok(Self { model, folder, tokenizer, adapter, batches, held_out })
    }

    fn run(self, options: &Options, out: &Path, resume: bool) -> Result<()> {
        let Self { model, folder, tokenizer, adapter, batches, held_out } = self;
        let compute = options.compute.unwrap_or_default().into();
        let prompt = sample_prompt(&folder, tokenizer.as_ref(), options);
        if let (Some(prompt), false) = (&prompt, resume) {
            eprintln!("a sample before:\n{}", prompt.text(&model, compute)?);
        }
        let steps = options.steps.unwrap_or_default();
        let schedule = schedule::Schedule {
            lr: options.lr.unwrap_or_default(),
            decay: options.schedule.map(Into::into).unwrap_or_default(),
            warmup: options.warmup.unwrap_or_default(),
            steps,
        };
        let recipe = Recipe {
            schedule,
            accumulate: options.accumulate.unwrap_or(1),
            clip: options.clip.unwrap_or_default(),
            seed: options.seed.unwrap_or_default(),
            checkpointing: options.checkpointing.unwrap_or_default(),
            compute,
        };
        let cadence = Cadence {
            steps,
            eval_every: options.eval_every.unwrap_or_default(),
            checkpoint_every: options.checkpoint_every.unwrap_or_default(),
            keep: options.keep.unwrap_or(1),
        };
        let hyper = Hyper {
            weight_decay: options.weight_decay.unwrap_or_default(),
            beta2: options.beta2.unwrap_or(Hyper::default().beta2),
            ..Hyper::default()
        };
        let optimizer = AdamW::new(model.backend().clone(), hyper, model.parameters())?;
        let kind = match &adapter {
            Some(config) => Kind::Adapter(config),
            None => Kind::Full { tokenizer: tokenizer.as_ref(), dtype: folder.dtype()? },
        };
        let product = Product { model: &model, kind };
        let run = Run { product, batches, held_out, recipe, cadence, optimizer };
        let (mut bar, begun) = (Bar::new(steps), Instant::now());
        run.to_end(out, resume, &mut bar)?;
        bar.finish();

        if let Some(prompt) = &prompt {
            eprintln!("a sample after:\n{}", prompt.text(&model, compute)?);
        }
        if let Some((first, last)) = bar.evals {
            let (from, to) = (first.eval_loss, last.eval_loss);
            eprintln!("held-out loss {from:.4} before, {to:.4} after: {:+.4} nat a token", to - from);
        }
        let memory = bar.peak_rss.map_or(String::new(), |rss| format!(", {} of memory at the most", bytes(rss)));
        eprintln!("{steps} steps in {:.0} s{memory}", begun.elapsed().as_secs_f64());
        let (what, next) = match &adapter {
            Some(_) => (
                "adapter",
                format!(
                    "rankfold generate --model {} --adapter {} --prompt …",
                    options.model.as_deref().unwrap_or_default(),
                    out.display()
                ),
            ),
            None => ("model", format!("rankfold generate --model {} --prompt …", out.display())),
        };
        println!("the {what} is in {}; next: {next}", out.display());
        Ok(())
    }
}

/// Training batches, held-out batches, and the tokenizer where there is text.
fn data(options: &Options, folder: &Folder) -> Result<(Batches, Vec<Batch>, Option<Tokenizer>)> {
    if let Some(path) = &options.tokens {
        return Ok((Batches::Fixed(tokens::read(path, folder.config.vocab)?), Vec::new(), folder.tokenizer_if_any()?));
    }
    let tokenizer = folder.tokenizer()?;
    if tokenizer.vocab_size() > folder.config.vocab {
        let why =
            format!("its tokenizer has {} tokens, its vocab_size is {}", tokenizer.vocab_size(), folder.config.vocab);
        return Err(Error::Path { path: folder.path.clone(), why });
    }
    let held_out: Vec<Source> = options.eval_data.iter().cloned().map(Source::File).collect();
    let data = Data::load(&tokenizer, &super::eval::sources(&options.data), &held_out)?;
    let rows = options.batch.unwrap_or(1);
    let shape = Shape { rows, seq: options.seq.unwrap_or(2), accumulate: options.accumulate.unwrap_or(1) };
    let loader = Loader::new(data.train, shape, options.seed.unwrap_or_default(), tokenizer.end_of_text())?;
    let held_out = if data.held_out.is_empty() {
        Vec::new()
    } else {
        Evaluation::new(data.held_out, shape.seq, tokenizer.end_of_text())?.batches(rows).collect()
    };
    Ok((Batches::Loader(Box::new(loader)), held_out, Some(tokenizer)))
}

fn precision(options: &Options, folder: &Folder) -> Result<Precision> {
    let quantize = options.quantize.unwrap_or(Quantize::None);
    if options.method == Some(Method::Full) {
        if quantize != Quantize::None {
            return Err(Error::Usage("--quantize with --method full: 4-bit weights cannot be trained".into()));
        }
        return Ok(Precision::Trained);
    }
    // A 4-bit checkpoint stays as it is, whatever is asked.
    if quantize == Quantize::None || folder.is_quantized() {
        return Ok(Precision::AsStored);
    }
    let quantization = Quantization {
        format: quantize.format()?,
        block: options.block.unwrap_or(DEFAULT_QUANTIZATION.block),
        double: options.double_quant.unwrap_or_default(),
    };
    quantization.check()?;
    Ok(Precision::Quantized(quantization))
}

/// Put adapters on the model, new or from a folder; `None` for `--method full`.
fn attach(options: &Options, folder: &Folder, model: &mut Model) -> Result<Option<AdapterConfig>> {
    if options.method == Some(Method::Full) {
        return Ok(None);
    }
    if let Some(saved) = &options.init_adapter {
        return crate::open::attach_saved(model, saved).map(Some);
    }
    let config = AdapterConfig {
        spec: LoraSpec {
            rank: options.rank.unwrap_or(1),
            alpha: options.alpha.unwrap_or(1.0),
            rslora: options.rslora.unwrap_or_default(),
            dropout: options.dropout.unwrap_or_default(),
        },
        targets: Targets::parse(options.targets.as_deref().unwrap_or_default()),
        base_model: options.model.clone().filter(|_| !folder.builtin),
        ..AdapterConfig::default()
    };
    crate::open::attach_fresh(model, &config, options.seed.unwrap_or_default()).map(Some)
}

/// Say what will be done, before it is.
fn describe(options: &Options, folder: &Folder, model: &Model, batches: &Batches) {
    let adapted: Vec<_> = model.linears().filter_map(|linear| Some((linear, linear.adapter()?))).collect();
    let trained: usize = model.parameters().iter().map(|n| n.parameter.shape().elements()).sum();
    let total = folder.config.parameters() + adapted.iter().map(|(_, lora)| lora.elements()).sum::<usize>();
    let name = options.model.as_deref().unwrap_or_default();
    if !adapted.is_empty() {
        let mut names: Vec<&str> = adapted.iter().filter_map(|(linear, _)| linear.path().rsplit('.').next()).collect();
        names.sort_unstable();
        names.dedup();
        eprintln!("{name}: {} modules matched: {} in {} layers", adapted.len(), names.join(", "), folder.config.layers);
    }
    let share = 100.0 * trained as f64 / total as f64;
    eprintln!("training {} of {} parameters ({share:.2} %)", count(trained), count(total));
    if let Batches::Loader(loader) = batches {
        eprintln!("{} rows of {} tokens an epoch", loader.rows_an_epoch(), options.seq.unwrap_or_default());
        if loader.truncated() > 0 {
            tracing::warn!("{} examples are longer than a row and cut off there", loader.truncated());
        }
        if loader.dropped() > 0 {
            tracing::warn!("{} examples are left out: nothing to learn within the first row", loader.dropped());
        }
    }
    eprintln!("memory: {}", Memory::estimate(options, model, trained));
}

/// A prompt for the samples before and after, where the model has a tokenizer and the default text.
struct Prompt<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
}

const PROMPT: &str = "The LORD is my ";

fn sample_prompt<'a>(folder: &Folder, tokenizer: Option<&'a Tokenizer>, options: &Options) -> Option<Prompt<'a>> {
    let tokenizer = tokenizer.filter(|_| folder.builtin && options.data.is_empty() && options.tokens.is_none())?;
    let ids = tokenizer.encode(PROMPT, true).ok()?;
    Some(Prompt { tokenizer, ids })
}

impl Prompt<'_> {
    fn text(&self, model: &Model, compute: Compute) -> Result<String> {
        let sampling = Sampling { temperature: 0.7, top_p: 0.95, seed: 1 };
        let made = generate(model, &self.ids, 60, self.tokenizer.stops(), sampling, compute)?;
        let text = format!("{PROMPT}{}", self.tokenizer.decode(&made, false)?);
        Ok(text.lines().map(|line| format!("    {line}\n")).collect())
    }
}

/// Bytes that a run will take, by what takes them.
struct Memory {
    weights: usize,
    training: usize,
    activations: usize,
}

impl Memory {
    /// Weights, adapters, gradients and moments are counted; activations are what the tape saves of each block, for
    /// the tokens of a micro-batch, and the head's chunk of logits.
    fn estimate(options: &Options, model: &Model, trained: usize) -> Self {
        let c = &model.config;
        let tokens = match (&options.tokens, options.batch, options.seq) {
            (None, Some(batch), Some(seq)) => batch * seq,
            _ => 0,
        };
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        // Inputs and outputs of the norms, q k v before and after rotation, attention's output, gate, up, product.
        let saved = 6 * c.width + 3 * q + 3 * kv + 3 * c.feed_forward;
        let blocks = if options.checkpointing == Some(true) { 1 } else { c.layers };
        let kept = if options.checkpointing == Some(true) { c.layers * c.width } else { 0 };
        let logits = tokens.min((16 << 20) / (4 * c.vocab)).max(tokens.min(128)) * c.vocab;
        Self {
            weights: model.base_bytes(),
            // Value, gradient and two moments, f32 each.
            training: 16 * trained,
            activations: 4 * (tokens * (blocks * saved + kept + 2 * c.width) + logits),
        }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [weights, training, activations, sum] =
            [self.weights, self.training, self.activations, self.weights + self.training + self.activations]
                .map(|n| bytes(n as u64));
        write!(
            f,
            "weights {weights}, trained values with gradients and moments {training}, activations {activations}: about {sum} and the program itself"
        )
    }
}
