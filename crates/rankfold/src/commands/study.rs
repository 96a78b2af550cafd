//! `rankfold study`: the claims about low-rank finetuning, run again.

use crate::check::count;
use crate::device::check_threads;
use crate::error::{Error, Result};
use crate::show::{say, table};
use crate::study::training::{Bench, Setting};
use crate::study::{Name, Report, plot};
use clap::{Args, ValueEnum};
use rankfold_files::write_atomically;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Run a claim about low-rank finetuning again on the built-in model and text: a table, NAME.json and NAME.svg.
///
/// Each takes minutes on two cores, and ends with whether the claim holds at this scale. One seed gives one table,
/// whatever the threads, but for what is said to be measured on this machine.
#[derive(Debug, Args)]
pub struct Study {
    /// Which.
    #[arg(value_enum)]
    name: Name,
    /// The folder to write: new or empty [default: studies/NAME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Runs of each kind, each with a seed of its own [default: the study's own].
    #[arg(long, value_name = "N")]
    seeds: Option<usize>,
    /// Steps of a run [default: the study's own].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Seconds instead of minutes, to see that it runs: two seeds, three steps, one rate, little text. Its verdict means nothing.
    #[arg(long)]
    quick: bool,
    /// Threads; all cores if not given. Never changes a result.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Study {
    pub fn run(self) -> Result<()> {
        check_threads(self.threads)?;
        count("seeds", self.seeds)?;
        count("steps", self.steps)?;
        let (seeds, steps) = self.name.extent();
        let full = Setting {
            seeds: self.seeds.unwrap_or(seeds) as u64,
            steps: self.steps.unwrap_or(steps),
            rows: 4,
            seq: 128,
            held_out: None,
            rates: None,
        };
        let setting = match self.quick {
            false => full,
            true => Setting {
                seeds: self.seeds.unwrap_or(2) as u64,
                steps: self.steps.unwrap_or(3),
                rows: 2,
                seq: 32,
                held_out: Some(4),
                rates: Some(1),
            },
        };
        let value = self.name.to_possible_value();
        let name = value.as_ref().map_or("study", |value| value.get_name());
        let out = match self.out {
            Some(out) => out,
            None => {
                let studies = Path::new("studies");
                std::fs::create_dir_all(studies).map_err(Error::io(studies))?;
                studies.join(name)
            }
        };
        // Before the work: a folder that cannot be written should not be found out after it.
        let staged = super::stage(&out)?;
        let report = self.name.run(&Bench::open(setting, self.threads)?)?;
        let Report { claim, table: rows, results, measured, plots, verdict, because } = report;
        let conclusion = format!("{verdict}: {because}");
        let json = json!({
            "study": name, "claim": claim, "setting": setting, "results": results, "measured": measured,
            "verdict": verdict, "conclusion": conclusion,
        });
        let write =
            |end: &str, text: String| write_atomically(&staged.path().join(format!("{name}.{end}")), text.as_bytes());
        let written = write("json", format!("{json:#}\n")).and_then(|()| write("svg", plot::file(&plots)));
        let written = written.and_then(|()| staged.commit());
        // Said even where nothing could be written: it took minutes.
        say!("the claim: {claim}\n")?;
        table(&rows)?;
        if rows.iter().flatten().any(|cell| cell.contains('±')) {
            say!("±: to either end of the 95 % interval of the mean")?;
        }
        if !measured.is_empty() {
            say!("\nmeasured on this machine in this run:")?;
            table(&measured)?;
        }
        say!("\n{conclusion}")?;
        written?;
        say!("{name}.json and {name}.svg in {}", out.display())?;
        Ok(())
    }
}
