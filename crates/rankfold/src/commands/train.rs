//! `rankfold train`: the main job.

use crate::adapter;
use crate::builtin;
use crate::check::check;
use crate::choices::{Method, Prune};
use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::folder;
use crate::memory::{self, Subject};
use crate::open::Folder;
use crate::options::Options;
use crate::paging::{self, Paged};
use crate::profile::Profiling;
use crate::ranks::RankMap;
use crate::report;
use crate::sample::sample_prompt;
use crate::show::{Bar, bytes, count, say};
use crate::size::Size;
use clap::Args;
use rankfold_adapters::adalora::Allocator;
use rankfold_adapters::{PeftConfig, VirtualTokens, diff};
use rankfold_files::Checkpoint;
use rankfold_profile::Profile;
use rankfold_trainer::checkpoint::Checkpoints;
use rankfold_trainer::convert;
use rankfold_trainer::data::{Batch, Data, Evaluation, Loader, Shape, Source, Tokenizer, tokens};
use rankfold_trainer::model::{Model, Precision, Quantization};
use rankfold_trainer::objective::Terms;
use rankfold_trainer::optimizer::{AdamW, Hyper};
use rankfold_trainer::product::Kind;
use rankfold_trainer::run::{Cadence, Run};
use rankfold_trainer::schedule;
use rankfold_trainer::step::{Batches, Recipe};
use rankfold_trainer::traffic::Gauge;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Finetune a model. With no options: the built-in model on the built-in text, by QLoRA.
#[derive(Debug, Args)]
#[command(args_override_self = true, allow_negative_numbers = true)]
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
    /// Say where the steps' time went, by kernel and layer, and how near that is to the machine's limits, which are
    /// measured after the run: a table, OUT/profile.json, and a trace of the first 5 steps (100,000 events at the most)
    /// for ui.perfetto.dev, in FILE [default: OUT/trace.json]. Never changes a result.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    profile: Option<Option<PathBuf>>,
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
            // A kill after the run's last file but this one.
            if report::is_missing(out) {
                report::write(out, options.memory_limit.as_ref().map(Size::bytes))?;
            }
            say!("the run in {} is finished: nothing to do", out.display())?;
            return Ok(());
        }
        check(&options)?;
        if let Some(Some(trace)) = &self.profile {
            super::parent_exists("--profile", trace)?;
        }
        if let Some(out) = &self.out {
            folder::refuse_taken(out, self.resume, self.overwrite)?;
        }
        let done = match (&self.out, self.resume) {
            (Some(out), true) => Checkpoints::of(out).list()?.pop().map(|(_, path)| Done { out: out.clone(), path }),
            _ => None,
        };
        // The data and the model are opened before anything is written, so that a bad input leaves no folder.
        let profile = self.profile.as_ref().map(|_| Profile::default());
        let job = Job::open(&options, self.threads, done.as_ref(), profile.as_ref())?;
        let out = match self.out {
            Some(out) => out,
            None => folder::first_free(Path::new("runs"))?,
        };
        folder::claim(&out, self.resume, self.overwrite)?;
        rankfold_files::write_atomically(&out.join("run.toml"), options.to_toml()?.as_bytes())?;
        if done.is_none() {
            job.write_base(&out)?;
        }
        let profiling = profile.map(|profile| Profiling::new(profile, &out, self.profile.flatten()));
        job.run(&options, &out, self.resume, profiling.as_ref())
    }
}

/// What there is of a run that goes on: its folder, and its last checkpoint's.
struct Done {
    out: PathBuf,
    path: PathBuf,
}

impl Done {
    /// The base that was made for its adapter, if one was.
    fn base(&self) -> Option<PathBuf> {
        Some(self.out.join(folder::BASE)).filter(|base| base.exists())
    }
}

/// A run's parts, opened.
struct Job {
    model: Model,
    folder: Folder,
    tokenizer: Option<Tokenizer>,
    adapter: Option<PeftConfig>,
    batches: Batches,
    held_out: Vec<Batch>,
    paged: Option<Paged>,
}

impl Job {
    fn open(options: &Options, threads: Option<usize>, done: Option<&Done>, profile: Option<&Profile>) -> Result<Self> {
        let folder = Folder::open(options.model.as_deref().unwrap_or_default())?;
        let precision = precision(options, &folder)?;
        let adapter = adapter::asked_for(options)?;
        let alone = adapter.as_ref().is_some_and(|adapter| adapter.virtual_tokens().is_some());
        let (batches, held_out, tokenizer) = data(options, &folder, alone)?;
        let subject = Subject {
            config: &folder.config,
            stored: folder.stored()?,
            precision,
            adapter: adapter.as_ref(),
            folder: (!folder.builtin).then_some(&*folder.path),
        };
        let plan = memory::plan(options, &subject, batches.shape(), threads)?;
        memory::check(options, &plan)?;
        let tiers = paging::tiers(options, &plan)?;
        let device = DeviceArgs {
            device: options.device.unwrap_or_default(),
            compute: options.compute,
            isa: options.isa.clone(),
            threads,
        };
        let (backend, paged) = device.open_on(tiers)?;
        let backend = match profile {
            Some(profile) => profile.wrap(backend)?,
            None => backend,
        };
        let mut model = match done.and_then(Done::base) {
            // The base that the run made when it began.
            Some(base) => Model::load(backend, &Checkpoint::open(&base)?, folder.config.clone(), precision)?,
            None => folder.load(backend, precision)?,
        };
        let attach = |fresh: PeftConfig| attach(options, &fresh, &folder, precision, &mut model, done);
        let adapter = adapter.map(attach).transpose()?;
        describe(options, &folder, precision, &model, &batches);
        eprintln!("memory: {}", memory::summary(&plan));
        Ok(Self { model, folder, tokenizer, adapter, batches, held_out, paged })
    }

    /// Write the base that was made for the adapter, if one was, as a whole model, without which that is of no use.
    fn write_base(&self, out: &Path) -> Result<()> {
        let base = out.join(folder::BASE);
        if base.exists() {
            std::fs::remove_dir_all(&base).map_err(Error::io(&base))?;
        }
        if !self.model.has_own_base() {
            return Ok(());
        }
        let staged = super::stage(&base)?;
        convert::write_base(&self.model, &self.folder.checkpoint, staged.path())?;
        super::copy_tokenizer(&self.folder, staged.path())?;
        Ok(staged.commit()?)
    }

    fn run(self, options: &Options, out: &Path, resume: bool, profiling: Option<&Profiling>) -> Result<()> {
        let Self { mut model, folder, tokenizer, mut adapter, batches, held_out, paged } = self;
        let base = out.join(folder::BASE);
        let has_own_base = base.exists();
        if let Some(PeftConfig::Lora(config)) = adapter.as_mut().filter(|_| has_own_base) {
            config.base_model = Some(base.display().to_string());
        }
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
            saved_as: options.saved_activations.unwrap_or_default().into(),
            compute,
            terms: adapter.as_ref().map(Terms::of).unwrap_or_default(),
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
            lora_plus: options.lora_plus.unwrap_or(1.0),
            gates: options.diff_gate_lr.unwrap_or(diff::RATE) / schedule.lr,
            ..Hyper::default()
        };
        let moments = options.optimizer.unwrap_or_default().moments();
        let optimizer = AdamW::new(model.backend().clone(), moments, hyper, model.parameters())?;
        let kind = match &adapter {
            Some(config) => Kind::Adapter(config),
            None => Kind::Full { tokenizer: tokenizer.as_ref(), dtype: folder.dtype()? },
        };
        let allocator = adapter.as_ref().map(|config| allocator(options, config, &model)).transpose()?.flatten();
        let gauge = paged.as_ref().map(|paged| || paged.traffic());
        let gauge = gauge.as_ref().map(|gauge| gauge as Gauge);
        let run = Run { model: &mut model, kind, batches, held_out, recipe, cadence, optimizer, allocator, gauge };
        let (mut bar, begun) = (Bar::new(steps), Instant::now());
        let to_end = || run.to_end(out, resume, &mut bar);
        match profiling {
            Some(profiling) => profiling.over(to_end)?,
            None => to_end()?,
        }
        bar.finish();

        if let Some(prompt) = &prompt {
            eprintln!("a sample after:\n{}", prompt.text(&model, compute)?);
        }
        if let Some((first, last)) = bar.evals {
            let (from, to) = (first.eval_loss, last.eval_loss);
            eprintln!("held-out loss {from:.4} before, {to:.4} after: {:+.4} nat a token", to - from);
        }
        if !bar.ranks.is_empty() {
            let kept: usize = bar.ranks.iter().map(|(_, rank)| rank).sum();
            eprintln!("{kept} triplets kept:\n{}", RankMap::of(&bar.ranks).lines().join("\n"));
        }
        let memory = bar.peak_rss.map_or(String::new(), |rss| format!(", {} of memory at the most", bytes(rss)));
        eprintln!("{steps} steps in {:.0} s{memory}", begun.elapsed().as_secs_f64());
        if let Some(paged) = &paged {
            eprintln!("{}", paged.summary());
        }
        if let Some(profiling) = profiling {
            // A limit is kept: beside what else there is, an eighth of it is room that paging makes.
            let room = options.memory_limit.as_ref().map_or(u64::MAX, |limit| limit.bytes() / 8);
            profiling.finish(model.backend().as_ref(), room, out)?;
        }
        let report = report::write(out, options.memory_limit.as_ref().map(Size::bytes))?;
        eprintln!("how it went: {}", report.display());
        let (what, next) = match &adapter {
            Some(_) => {
                let (model, flags) = match has_own_base {
                    true => (base.display().to_string(), String::new()),
                    false => (options.model.clone().unwrap_or_default(), folder.flags(options)),
                };
                ("adapter", format!("rankfold generate --model {model}{flags} --adapter {} --prompt …", out.display()))
            }
            None => ("model", format!("rankfold generate --model {} --prompt …", out.display())),
        };
        say!("the {what} is in {}; next: {next}", out.display())?;
        Ok(())
    }
}

/// Training batches, held-out batches, and the tokenizer where there is text; rows of one document each where `alone`.
fn data(options: &Options, folder: &Folder, alone: bool) -> Result<(Batches, Vec<Batch>, Option<Tokenizer>)> {
    if let Some(path) = &options.tokens {
        return Ok((Batches::Fixed(tokens::read(path, folder.config.vocab)?), Vec::new(), folder.tokenizer_if_any()?));
    }
    let tokenizer = folder.tokenizer()?;
    let held_out: Vec<Source> = options.eval_data.iter().cloned().map(Source::File).collect();
    let data = Data::load(&tokenizer, &builtin::sources(&options.data), &held_out)?;
    let rows = options.batch.unwrap_or(1);
    let shape = Shape { rows, seq: options.seq.unwrap_or(2), accumulate: options.accumulate.unwrap_or(1) };
    let loader = Loader::new(data.train, shape, options.seed.unwrap_or_default(), tokenizer.end_of_text())?;
    let loader = if alone { loader.unpacked() } else { loader };
    let held_out = match (data.held_out.is_empty(), Evaluation::new(data.held_out, shape.seq, tokenizer.end_of_text()))
    {
        (true, _) => Vec::new(),
        (false, Ok(evaluation)) if alone => evaluation.unpacked().batches(rows).collect(),
        (false, Ok(evaluation)) => evaluation.batches(rows).collect(),
        // What nobody asked for need not stop the run.
        (false, Err(error)) if options.eval_data.is_empty() => {
            tracing::warn!("no held-out loss will be measured: the last tenth of the data: {error}");
            Vec::new()
        }
        (false, Err(error)) => return Err(error.into()),
    };
    Ok((Batches::Loader(Box::new(loader)), held_out, Some(tokenizer)))
}

fn precision(options: &Options, folder: &Folder) -> Result<Precision> {
    let as_asked = folder.precision(options.quantize, options.block, options.double_quant)?;
    Ok(if options.method == Some(Method::Full) { Precision::Trained } else { as_asked })
}

/// Put adapters on the model, new or from a folder.
fn attach(
    options: &Options,
    fresh: &PeftConfig,
    folder: &Folder,
    precision: Precision,
    model: &mut Model,
    done: Option<&Done>,
) -> Result<PeftConfig> {
    let name = options.model.as_deref().unwrap_or_default();
    // What was taken out of the base is kept with the checkpoint: no second decomposition need give the same bits.
    // A base of the run's own is the one that was left or made.
    if let Some((done, base)) = done.and_then(|done| Some((done, done.base()?))) {
        return crate::open::attach_saved(model, &base.to_string_lossy(), Precision::AsStored, &done.path);
    }
    match (done, &options.init_adapter) {
        (Some(done), _) if fresh.lora().is_some_and(|lora| lora.init.changes_the_base()) => {
            crate::open::attach_saved(model, name, precision, &done.path)
        }
        (_, Some(saved)) => crate::open::attach_saved(model, name, precision, saved),
        _ => crate::open::attach_fresh(model, fresh, &folder.checkpoint, options.seed.unwrap_or_default()),
    }
}

/// Who spends the budget, with AdaLoRA.
fn allocator(options: &Options, config: &PeftConfig, model: &Model) -> Result<Option<Allocator>> {
    let Some(adalora) = config.lora().and_then(|lora| lora.adalora.as_ref()) else { return Ok(None) };
    let prune = options.adalora_prune.unwrap_or(Prune::Mask).into();
    let (backend, steps) = (model.backend().as_ref(), options.steps.unwrap_or_default());
    let allocator = Allocator::new(backend, adalora, prune, steps, model.linears())?;
    match allocator.last_choice() {
        Some(last) if last > steps => tracing::warn!(
            "the last choice of ranks is due at step {last} and the run ends at step {steps}: over budget"
        ),
        None if allocator.triplets() > allocator.target() => tracing::warn!(
            "the adapter has lost ranks, so that an earlier run's choice of them stands: {} triplets, over the budget of {}",
            allocator.triplets(),
            allocator.target()
        ),
        _ => (),
    }
    Ok(Some(allocator))
}

/// Say what will be done, before it is.
fn describe(options: &Options, folder: &Folder, precision: Precision, model: &Model, batches: &Batches) {
    let adapted: Vec<_> = model.linears().filter_map(|linear| Some((linear, linear.attached()?))).collect();
    let trained: usize = model.parameters().iter().map(|n| n.parameter.shape().elements()).sum();
    let of_the_base: usize = model.trained_of_the_base().iter().map(|(_, p)| p.shape().elements()).sum();
    let total = match precision {
        Precision::Trained => trained,
        _ => folder.config.parameters() + trained - of_the_base,
    };
    let name = options.model.as_deref().unwrap_or_default();
    if !adapted.is_empty() {
        let mut names: Vec<&str> = adapted.iter().filter_map(|(linear, _)| linear.path().rsplit('.').next()).collect();
        names.sort_unstable();
        names.dedup();
        let layer = |path: &str| path.split('.').find_map(|part| part.parse::<usize>().ok());
        let mut layers: Vec<_> = adapted.iter().map(|(linear, _)| layer(linear.path())).collect();
        layers.dedup();
        eprintln!("{name}: {} modules matched: {} in {} layers", adapted.len(), names.join(", "), layers.len());
    }
    if let Some(tokens) = model.virtual_tokens().map(VirtualTokens::count) {
        eprintln!("{name}: {tokens} learned tokens before each row, which holds one document");
    }
    if let Precision::Quantized(Quantization { format, block, double }) = precision {
        let scales = if double { "doubly quantised scales" } else { "scales in f32" };
        eprintln!("frozen layers in {format}, blocks of {block}, {scales}");
    }
    let share = 100.0 * trained as f64 / total as f64;
    eprintln!("training {} of {} parameters ({share:.2} %)", count(trained), count(total));
    if let Batches::Loader(loader) = batches {
        let data = if options.data.is_empty() { vec![builtin::TEXT_NAME.into()] } else { options.data.clone() };
        let data: Vec<_> = data.iter().map(|path| path.display().to_string()).collect();
        let rows = loader.rows_an_epoch();
        eprintln!("{}: {rows} rows of {} tokens an epoch", data.join(", "), options.seq.unwrap_or_default());
        if loader.truncated() > 0 {
            tracing::warn!("{} examples are longer than a row and cut off there", loader.truncated());
        }
        if loader.dropped() > 0 {
            tracing::warn!("{} examples are left out: nothing to learn within the first row", loader.dropped());
        }
    }
    let lr = options.lr.unwrap_or_default();
    let optimizer = options.optimizer.unwrap_or_default();
    let (moments, pageable) = (optimizer.moments(), if optimizer.is_paged() { ", pageable" } else { "" });
    eprintln!("{} steps at a rate of {lr:e} at most", options.steps.unwrap_or_default());
    eprintln!("AdamW, its moments in {moments}{pageable}");
}
