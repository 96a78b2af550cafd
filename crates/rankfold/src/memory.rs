//! How much memory a run will take: its plan, from its options.

use crate::builtin;
use crate::choices::{Biases, Method, Start};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::paging;
use crate::show::bytes;
use rankfold_adapters::adalora::AdaLora;
use rankfold_adapters::bottleneck::Placement;
use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{
    AdapterConfig, Bias, Form, Init, LoraSpec, PeftConfig, Relative, RelativeConfig, Targets, VirtualConfig,
};
use rankfold_trainer::model::{ModelConfig, Precision};
use rankfold_trainer::plan::{Category, Machine, Plan, Setup, Stored};
use std::path::Path;
use std::str::FromStr;

/// The program with its libraries and threads. This and the figures below were measured (Linux, x86-64, glibc): what
/// the system says of a run beyond its counted buffers.
const PROGRAM: u64 = 9 << 20;
/// A tokenizer: a part that any has, and bytes in memory for each byte of its file.
const TOKENIZER: (u64, u64) = (2 << 20, 6);
/// Text: bytes in memory for each byte, as token ids,
const TEXT: u64 = 2;
/// and while it is encoded, a piece at a time, so that the most is soon reached.
const ENCODING: (u64, u64) = (36, 12 << 20);

/// The model of a run, as far as its memory is concerned.
pub struct Subject<'a> {
    /// Its dimensions.
    pub config: &'a ModelConfig,
    /// The element types of its files.
    pub stored: Stored,
    /// What they become.
    pub precision: Precision,
    /// What is attached to it.
    pub adapter: Option<&'a PeftConfig>,
    /// Its folder, where it has one.
    pub folder: Option<&'a Path>,
}

/// Count a run of `rows` rows of `seq` tokens a micro-batch.
pub fn plan(options: &Options, subject: &Subject, [rows, seq]: [usize; 2], threads: Option<usize>) -> Result<Plan> {
    let device = options.device.unwrap_or_default();
    let all = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let machine = Machine {
        program: program(options, subject.folder),
        cpu_threads: (device == Device::Cpu).then(|| threads.unwrap_or_else(all)),
    };
    Ok(Plan::of(&Setup {
        config: subject.config,
        stored: subject.stored,
        precision: subject.precision,
        adapter: subject.adapter,
        moments: options.optimizer.unwrap_or_default().moments(),
        rows,
        seq,
        accumulate: options.accumulate.unwrap_or(1),
        evaluates: options.tokens.is_none(),
        checkpointing: options.checkpointing.unwrap_or_default(),
        compute: options.compute.unwrap_or_default().into(),
        machine,
    })?)
}

/// The program with its text and tokenizer, by the sizes of their files.
fn program(options: &Options, folder: Option<&Path>) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let text = match (options.tokens.is_some(), options.data.is_empty()) {
        (true, _) => 0,
        (false, true) => builtin::TEXT.len() as u64,
        (false, false) => options.data.iter().chain(&options.eval_data).map(|path| size(path)).sum(),
    };
    let tokenizer = match folder {
        // The embedded model is a part of the program's file, which is in memory where it was read.
        None => builtin::MODEL.len() as u64 + TOKENIZER.0 + TOKENIZER.1 * builtin::TOKENIZER.len() as u64,
        Some(folder) => match size(&folder.join("tokenizer.json")) {
            0 => 0,
            bytes => TOKENIZER.0 + TOKENIZER.1 * bytes,
        },
    };
    PROGRAM + tokenizer + TEXT * text + ENCODING.1.min(ENCODING.0 * text)
}

/// The adapter that the options ask for: a new one, or a folder's; `None` for `--method full`.
pub fn adapter(options: &Options, builtin: bool) -> Result<Option<PeftConfig>> {
    if let Some(saved) = &options.init_adapter {
        return Ok(Some(PeftConfig::open(saved)?));
    }
    let base_model = options.model.clone().filter(|_| !builtin);
    let relative = |method| {
        let targets = options.targets.as_deref().map_or(Targets::Default, Targets::parse);
        PeftConfig::Relative(RelativeConfig { targets, base_model: base_model.clone(), ..RelativeConfig::new(method) })
    };
    let bottleneck = |placement| Relative::Bottleneck { placement, bottleneck: options.bottleneck.unwrap_or_default() };
    let learned = |kind| {
        let config = VirtualConfig::new(kind, options.virtual_tokens.unwrap_or_default());
        PeftConfig::Virtual(VirtualConfig { base_model: base_model.clone(), ..config })
    };
    Ok(Some(match options.method.unwrap_or(Method::Lora) {
        Method::Full => return Ok(None),
        Method::Lora => low_rank(options, Form::Plain, base_model)?,
        Method::Dora => low_rank(options, Form::Dora, base_model)?,
        Method::Adalora => low_rank(options, Form::AdaLora, base_model)?,
        Method::Ia3 => relative(Relative::Ia3 { feed_forward: None }),
        Method::Bitfit => relative(Relative::BitFit),
        Method::Houlsby => relative(bottleneck(Placement::Houlsby)),
        Method::Pfeiffer => relative(bottleneck(Placement::Pfeiffer)),
        Method::Diff => relative(Relative::Diff { penalty: options.diff_penalty.unwrap_or_default() }),
        Method::Prompt => learned(Kind::Prompt),
        Method::Prefix => learned(Kind::Prefix { projection: options.prefix_projection.unwrap_or_default() }),
    }))
}

/// A new low-rank update.
fn low_rank(options: &Options, form: Form, base_model: Option<String>) -> Result<PeftConfig> {
    Ok(PeftConfig::Lora(AdapterConfig {
        spec: LoraSpec {
            form,
            rank: options.rank.unwrap_or(1),
            alpha: options.alpha.unwrap_or(1.0),
            rslora: options.rslora.unwrap_or_default(),
            dropout: options.dropout.unwrap_or_default(),
        },
        adalora: (form == Form::AdaLora).then(|| adalora(options)),
        targets: Targets::parse(options.targets.as_deref().unwrap_or_default()),
        rank_pattern: pattern("rank-pattern", options.rank_pattern.as_deref())?,
        alpha_pattern: pattern("alpha-pattern", options.alpha_pattern.as_deref())?,
        init: match options.init {
            None | Some(Start::Kaiming) => Init::Kaiming,
            Some(Start::Gaussian) => Init::Gaussian,
            Some(Start::Pissa) => Init::Pissa,
            Some(Start::Olora) => Init::Olora,
            Some(Start::Loftq) => Init::Loftq { iterations: options.loftq_iter.unwrap_or(1) },
        },
        bias: match options.bias {
            None | Some(Biases::None) => Bias::None,
            Some(Biases::All) => Bias::All,
            Some(Biases::LoraOnly) => Bias::LoraOnly,
        },
        modules_to_save: list(options.modules_to_save.as_deref()).map(str::to_owned).collect(),
        base_model,
        ..AdapterConfig::default()
    }))
}

/// The parts of a text with commas.
fn list(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// 'KEY=NUMBER,…' of `flag`, in its order.
fn pattern<T: FromStr>(flag: &str, text: Option<&str>) -> Result<Vec<(String, T)>> {
    let pair = |part: &str| {
        let pair = part.rsplit_once('=').and_then(|(key, value)| Some((key.trim(), value.trim().parse().ok()?)));
        match pair.filter(|(key, _)| !key.is_empty()) {
            Some((key, value)) => Ok((key.to_owned(), value)),
            None => Err(Error::Usage(format!("--{flag} '{part}': expected NAME=NUMBER, with commas between"))),
        }
    };
    list(text).map(pair).collect()
}

/// AdaLoRA's own hyper-parameters.
fn adalora(o: &Options) -> AdaLora {
    let default = AdaLora::default();
    AdaLora {
        target_rank: o.adalora_target.unwrap_or(default.target_rank),
        tinit: o.adalora_tinit.unwrap_or(default.tinit),
        tfinal: o.adalora_tfinal.unwrap_or(default.tfinal),
        delta_t: o.adalora_delta.unwrap_or(default.delta_t),
        beta1: o.adalora_beta1.unwrap_or(default.beta1),
        beta2: o.adalora_beta2.unwrap_or(default.beta2),
        orthogonality: o.adalora_orthogonality.unwrap_or(default.orthogonality),
        squared: o.adalora_squared.unwrap_or(default.squared),
        total_step: o.steps,
        pattern: Vec::new(),
    }
}

/// The plan in one line.
pub fn summary(plan: &Plan) -> String {
    let peak = plan.peak();
    let sum = |of: &[Category]| bytes(of.iter().map(|category| peak.bytes[*category]).sum());
    use Category::*;
    format!(
        "weights {}, trained values with gradients and moments {}, activations {}, the program and its working memory \
         {}: {} at the most",
        sum(&[Codes, Scales, Dense]),
        sum(&[Weights, Adapters, Gradients, Optimizer]),
        sum(&[Saved, Head, Working, Batch]),
        sum(&[Program, Scratch, Pool]),
        bytes(peak.bytes.sum())
    )
}

/// That a limit is one that the run works under, or, without one, that the machine has as much, where the system tells.
/// (A GPU's memory is the GPU's own, and what its kernels work in is not the plan's.)
pub fn check(options: &Options, plan: &Plan) -> Result<()> {
    if let Some(limit) = paging::of_the_process(options) {
        plan.under(limit)?;
        return Ok(());
    }
    if options.memory_limit.is_some() {
        return Ok(());
    }
    let needed = plan.peak().bytes.sum();
    match of_the_machine().filter(|_| options.device != Some(Device::Cuda)) {
        Some(total) if needed > total => {
            let (needed, total) = (bytes(needed), bytes(total));
            let why = "expected a smaller --batch, --seq or --rank, --checkpointing or --memory-limit";
            Err(Error::Usage(format!("the run needs about {needed} of memory, this machine has {total}: {why}")))
        }
        _ => Ok(()),
    }
}

/// The machine's memory in bytes, where the system tells.
pub fn of_the_machine() -> Option<u64> {
    meminfo("MemTotal:")
}

/// What of it could still be had.
pub fn available() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// A figure of the system's, in bytes.
fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
