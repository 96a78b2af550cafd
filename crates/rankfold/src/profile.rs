//! `train --profile`: where the time of a run's steps goes, as a table, a file and a trace.

use crate::error::{Error, Result};
use crate::messages;
use crate::show::{say, table};
use rankfold_backend::Backend;
use rankfold_profile::{Bound, Profile, Report, Roof, Row, TRACED_STEPS};
use std::path::{Path, PathBuf};
use tracing_subscriber::layer::SubscriberExt;

/// The report's name in a run's folder.
const REPORT: &str = "profile.json";
/// The trace's, unless another path is given.
const TRACE: &str = "trace.json";
/// Rows with a smaller share are one in the table; the file has each.
const LEAST_SHARE: f64 = 1e-3;

/// What is to become of a profile.
#[derive(Debug)]
pub struct Profiling {
    profile: Profile,
    trace: PathBuf,
}

impl Profiling {
    /// Of a run in `out`; its trace in `trace`, or beside everything else.
    pub fn new(profile: Profile, out: &Path, trace: Option<PathBuf>) -> Self {
        Self { profile, trace: trace.unwrap_or_else(|| out.join(TRACE)) }
    }

    /// Do something whose spans are listened to.
    pub fn over<T>(&self, job: impl FnOnce() -> T) -> T {
        let listener = tracing_subscriber::registry().with(messages::layer()).with(self.profile.layer());
        tracing::subscriber::with_default(listener, job)
    }

    /// Measure the machine, in at most `room` bytes, and write and say what the run was beside it.
    pub fn finish(&self, backend: &dyn Backend, room: u64, out: &Path) -> Result<()> {
        let report = self.profile.report(Roof::measure(backend, room)?);
        let path = out.join(REPORT);
        write(&path, serde_json::to_string_pretty(&report))?;
        write(&self.trace, serde_json::to_string(&self.profile.trace()))?;
        show(&report)?;
        let trace = self.trace.display();
        let steps = format!("the first {TRACED_STEPS} steps at the most, for ui.perfetto.dev");
        eprintln!("the profile: {}; {steps}: {trace}", path.display());
        Ok(())
    }
}

fn write(path: &Path, json: serde_json::Result<String>) -> Result<()> {
    let why = |e| Error::Path { path: path.to_owned(), why: format!("no JSON can be made of the profile: {e}") };
    Ok(rankfold_files::write_atomically(path, format!("{}\n", json.map_err(why)?).as_bytes())?)
}

fn show(report: &Report) -> Result<()> {
    let Report { steps, seconds, in_kernels, roof, rows: all } = report;
    let header = ["kernel", "layer", "calls", "ms", "share", "GB/s", "GFLOP/s", "bound by", "of the roof"];
    let mut rows = vec![header.map(String::from).to_vec()];
    let (large, small): (Vec<&Row>, Vec<&Row>) = all.iter().partition(|row| row.share >= LEAST_SHARE);
    rows.extend(large.into_iter().map(cells));
    let sum = |title: String, calls: f64, took: f64| {
        let share = if *seconds > 0.0 { took / seconds } else { 0.0 };
        [title, String::new(), number(calls), milliseconds(took), percent(share)].to_vec()
    };
    if !small.is_empty() {
        let calls = small.iter().map(|row| row.calls).sum();
        rows.push(sum(format!("{} others", small.len()), calls, small.iter().map(|row| row.seconds).sum()));
    }
    rows.push(sum("in kernels".into(), all.iter().map(|row| row.calls).sum(), *in_kernels));
    let mut elsewhere = sum("in none".into(), 0.0, report.elsewhere());
    elsewhere[2].clear();
    rows.push(elsewhere);
    table(&rows)?;
    say!(
        "a step: {} ms, the mean of {steps}; the roofs: {:.1} GB/s, {:.1} GFLOP/s in f32, {:.1} in bf16; above 100 %: \
         operands in a cache, or a machine that was busy when it was measured",
        milliseconds(*seconds),
        roof.bandwidth() / 1e9,
        roof.f32 / 1e9,
        roof.bf16 / 1e9
    )
}

fn cells(row: &Row) -> Vec<String> {
    let Row { kernel, layer, calls, seconds, share, flops, bytes, bound, fraction } = row;
    let rate = |done: &f64| if *done > 0.0 { format!("{:.1}", done / seconds / 1e9) } else { String::new() };
    let bound = bound.map_or("", |bound| match bound {
        Bound::Memory => "memory",
        Bound::F32 => "f32",
        Bound::Bf16 => "bf16",
    });
    vec![
        (*kernel).to_owned(),
        layer.clone(),
        number(*calls),
        milliseconds(*seconds),
        percent(*share),
        rate(bytes),
        rate(flops),
        bound.to_owned(),
        fraction.map_or_else(String::new, percent),
    ]
}

fn percent(fraction: f64) -> String {
    format!("{:.1} %", 100.0 * fraction)
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3}", 1e3 * seconds)
}

/// Calls a step: mostly whole.
fn number(calls: f64) -> String {
    if calls.fract() == 0.0 { format!("{calls:.0}") } else { format!("{calls:.1}") }
}
