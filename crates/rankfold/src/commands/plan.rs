//! `rankfold plan`: what memory a run will take, before the run.

use crate::adapter;
use crate::builtin;
use crate::check::check;
use crate::choices::Method;
use crate::device::check_threads;
use crate::error::{Error, Result};
use crate::memory::{self, Subject};
use crate::open::{BUILTIN, precision};
use crate::options::Options;
use crate::show::{bytes, count, mib, say, table};
use clap::Args;
use rankfold_files::Checkpoint;
use rankfold_trainer::model::{ModelConfig, Precision};
use rankfold_trainer::plan::{Category, Paging, Parameters, Phase, Plan, Stored};
use serde::Serialize;
use std::path::PathBuf;

/// Say what memory a run of these options takes, by what takes it, before the run. No weights are read: `--model` may
/// also be a `config.json` alone, of any size.
#[derive(Debug, Args)]
#[command(args_override_self = true, allow_negative_numbers = true)]
pub struct PlanArgs {
    /// A TOML file of these options; flags win over it.
    #[arg(long, value_name = "run.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    /// Threads; all cores if not given. Each has working memory of its own.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Write the plan as JSON, in bytes.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is written as JSON.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    plan: &'a Plan,
    without_checkpointing: &'a Plan,
    with_checkpointing: &'a Plan,
    paging: Option<&'a Paging>,
}

impl PlanArgs {
    pub fn run(self) -> Result<()> {
        let given = match &self.config {
            Some(path) => self.options.clone().or(Options::read(path)?)?,
            None => self.options.clone(),
        };
        let options = given.clone().or(given.defaults())?;
        check(&options)?;
        check_threads(self.threads)?;
        if let Some(path) = &self.json {
            super::parent_exists("--json", path)?;
        }
        let name = options.model.as_deref().unwrap_or(BUILTIN);
        let (config, path) = open(name)?;
        let stored = Stored::of(&config, &path)?;
        let Options { quantize, block, double_quant, .. } = options;
        let asked = precision(name == BUILTIN, stored.four_bits.is_some(), quantize, block, double_quant)?;
        let precision = if options.method == Some(Method::Full) { Precision::Trained } else { asked };
        let adapter = adapter::asked_for(&options)?;
        let folder = path.parent().filter(|_| name != BUILTIN);
        let subject = Subject { config: &config, stored, precision, adapter: adapter.as_ref(), folder };
        let shape = shape(&options)?;
        let plan_of = |checkpointing: bool| {
            let options = Options { checkpointing: Some(checkpointing), ..options.clone() };
            memory::plan(&options, &subject, shape, self.threads)
        };
        let [without, with] = [plan_of(false)?, plan_of(true)?];
        let plan = if options.checkpointing == Some(true) { &with } else { &without };
        // What a device of its own would page is not the plan's to say: kernels work in other memory there.
        let of_the_process = !options.device.unwrap_or_default().has_memory_of_its_own();
        let limit = options.memory_limit.as_ref().filter(|_| of_the_process);
        let paging = limit.map(|limit| plan.under(limit.bytes())).transpose()?;

        describe(name, plan, shape)?;
        side_by_side(&without, &with)?;
        if let Some(paging) = &paging {
            paged(paging)?;
        }
        beside(plan)?;
        let peak = plan.peak();
        let mut last = format!("{} at the most, in {}", bytes(peak.bytes.sum()), peak.phase.title());
        if let Some(path) = &self.json {
            let report = Report {
                model: name,
                plan,
                without_checkpointing: &without,
                with_checkpointing: &with,
                paging: paging.as_ref(),
            };
            let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Path {
                path: path.clone(),
                why: format!("no JSON can be made of the plan: {e}"),
            })?;
            rankfold_files::write_atomically(path, format!("{json}\n").as_bytes())?;
            last += &format!("; the plan is in {}", path.display());
        }
        say!("{last}")
    }
}

/// The configuration that a name means, and where it is: the embedded one, a folder's, or a file.
fn open(name: &str) -> Result<(ModelConfig, PathBuf)> {
    if name == BUILTIN {
        let path = PathBuf::from("config.json");
        return Ok((ModelConfig::parse(builtin::CONFIG, &path)?, path));
    }
    let path = PathBuf::from(name);
    let path = if path.is_dir() { path.join("config.json") } else { path };
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    Ok((ModelConfig::parse(&text, &path)?, path))
}

/// [rows, tokens a row] of a micro-batch.
fn shape(options: &Options) -> Result<[usize; 2]> {
    let Some(path) = &options.tokens else {
        return Ok([options.batch.unwrap_or(1), options.seq.unwrap_or(2)]);
    };
    let file = Checkpoint::open(path)?;
    let shape = &file.info("ids")?.shape;
    shape.as_slice().try_into().map_err(|_| {
        let why = format!("'ids' is {shape:?}, expected [rows, tokens]");
        Error::Path { path: path.clone(), why }
    })
}

fn describe(name: &str, plan: &Plan, [rows, seq]: [usize; 2]) -> Result<()> {
    let Parameters { model, trained, frozen } = plan.parameters;
    let share = 100.0 * trained as f64 / (trained + frozen) as f64;
    let [model, trained, frozen] = [model, trained, frozen].map(|n| count(n as usize));
    say!(
        "{name}: {model} parameters; {trained} trained ({share:.2} %), {frozen} frozen; {rows} × {seq} tokens at a time"
    )
}

/// The peak by category and the peaks of the phases, with and without checkpointing.
fn side_by_side(without: &Plan, with: &Plan) -> Result<()> {
    let header = |what: &str| [what, "without checkpointing", "", "with checkpointing", ""].map(String::from).to_vec();
    let cells = |title: &str, [a, b]: [u64; 2]| {
        let share = |n: u64, of: &Plan| format!("{:.1} %", 100.0 * n as f64 / of.peak().bytes.sum().max(1) as f64);
        vec![title.to_owned(), bytes(a), share(a, without), bytes(b), share(b, with)]
    };
    let category = |category: Category| [without, with].map(|plan| plan.peak().bytes[category]);
    let mut rows = vec![header("at the peak")];
    let taken = Category::ALL.into_iter().filter(|of| category(*of) != [0, 0]);
    rows.extend(taken.map(|of| cells(of.title(), category(of))));
    rows.push(cells("all", [without, with].map(|plan| plan.peak().bytes.sum())));
    rows.push(Vec::new());
    rows.push(header("in use, by phase"));
    let phases = Phase::ALL.into_iter().map(|phase| (phase, [without, with].map(|plan| plan.in_use(phase))));
    rows.extend(phases.filter(|(_, peaks)| *peaks != [0, 0]).map(|(phase, peaks)| cells(phase.title(), peaks)));
    table(&rows)
}

/// What leaves memory under a limit.
fn paged(paging: &Paging) -> Result<()> {
    let Paging { limit, resident, paged, page } = paging;
    let cells = |title: &str, a: u64, b: u64| vec![title.to_owned(), bytes(a), bytes(b)];
    let header = [format!("under {}", bytes(*limit)), "in memory".into(), format!("paged, by {}", bytes(*page))];
    let mut rows = vec![Vec::new(), header.to_vec()];
    let taken = Category::ALL.into_iter().filter(|of| resident[*of] + paged[*of] > 0);
    rows.extend(taken.map(|of| cells(of.title(), resident[of], paged[of])));
    rows.push(cells("all", resident.sum(), paged.sum()));
    table(&rows)
}

/// What there is to compare with.
fn beside(plan: &Plan) -> Result<()> {
    let paper = plan.full_16_bit_of_the_paper;
    let rows = [
        ("with the optimiser paged", bytes(plan.without_optimizer()), String::new()),
        ("the least memory limit", mib(plan.floor.bytes()), format!("for {}", plan.floor.needs())),
        (
            "full 16-bit finetuning as the QLoRA paper counts it",
            bytes(paper),
            format!("{:.2} GB: 12 bytes a parameter", paper as f64 / 1e9),
        ),
    ];
    say!("")?;
    for (title, figure, note) in rows {
        say!("{}", format!("{title}: {figure}  {note}").trim_end())?;
    }
    say!("")
}
