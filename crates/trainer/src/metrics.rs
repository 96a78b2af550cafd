//! `metrics.jsonl`: a line a step, a line a held-out evaluation; cut back to a checkpoint's step when a run resumes.

use crate::step::StepMetrics;
use crate::{Error, Result};
use rankfold_files::write_atomically;
use serde::Serialize;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A held-out evaluation, as a line.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct EvalMetrics {
    /// Steps taken before it.
    pub step: usize,
    /// Mean loss of a held-out target.
    pub eval_loss: f64,
    /// Held-out targets.
    pub eval_tokens: usize,
}

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Open for appending what follows step `after`; lines of later steps, and a last line cut short by a kill, are
    /// dropped first.
    pub fn open(path: &Path, after: usize) -> Result<Self> {
        if path.exists() {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let belongs = |line: &&str| {
                let value: Option<Value> = serde_json::from_str(line).ok();
                value.and_then(|value| value["step"].as_u64()).is_some_and(|step| step <= after as u64)
            };
            // An evaluation of step 0 belongs to a run from the start, which makes it again.
            let kept: Vec<&str> = if after == 0 { Vec::new() } else { text.lines().filter(belongs).collect() };
            let kept: String = kept.into_iter().flat_map(|line| [line, "\n"]).collect();
            write_atomically(path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Append a step.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.line(metrics)
    }

    /// Append an evaluation.
    pub fn eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.line(metrics)
    }

    /// Wait until the disk has all lines: before anything that is of a later step, or of the run's end, is written.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path))
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value).map_err(|e| Error::file(&self.path, e.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_keeps_the_lines_up_to_its_checkpoint_and_no_half_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let eval = |step| EvalMetrics { step, eval_loss: 1.5, eval_tokens: 3 };
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for step in [0, 2, 4, 6] {
            metrics.eval(&eval(step)).unwrap();
        }
        drop(metrics);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"step\":")).unwrap();
        let mut metrics = Metrics::open(&path, 4).unwrap();
        metrics.eval(&eval(5)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<Value> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].clone()).collect();
        assert_eq!(steps, [0, 2, 4, 5]);
    }
}
