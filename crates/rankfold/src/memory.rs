//! How much memory a run will take: its plan, from its options.

use crate::builtin;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::paging;
use crate::show::bytes;
use rankfold_adapters::PeftConfig;
use rankfold_trainer::model::{ModelConfig, Precision};
use rankfold_trainer::plan::{Category, Machine, Plan, Setup, Stored};
use std::path::Path;

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
        saved_as: options.saved_activations.unwrap_or_default().into(),
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
