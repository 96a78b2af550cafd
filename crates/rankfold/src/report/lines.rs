//! The lines of a run, parsed.

use serde_json::Value;

/// What `metrics.jsonl` holds: a line a step, a line a held-out evaluation.
#[derive(Debug, Default)]
pub struct Lines {
    steps: Vec<Value>,
    evaluations: Vec<Value>,
    /// The most memory that the run was allowed, in bytes.
    pub limit: Option<u64>,
}

impl Lines {
    /// From the file's text.
    ///
    /// Errors: a line that is no JSON object with a `step`.
    pub fn parse(text: &str, limit: Option<u64>) -> Result<Self, String> {
        let mut lines = Self { limit, ..Self::default() };
        for (number, line) in (1..).zip(text.lines()) {
            let value: Value = serde_json::from_str(line).map_err(|e| format!("line {number}: {e}"))?;
            if value["step"].as_u64().is_none() {
                return Err(format!("line {number}: expected an object with a 'step'"));
            }
            let of_its_kind = if value["eval_loss"].is_null() { &mut lines.steps } else { &mut lines.evaluations };
            of_its_kind.push(value);
        }
        Ok(lines)
    }

    /// The last step.
    pub fn last(&self) -> u64 {
        self.steps.iter().chain(&self.evaluations).filter_map(|line| line["step"].as_u64()).max().unwrap_or(0)
    }

    /// The line of the last step.
    pub fn last_step(&self) -> Option<&Value> {
        self.steps.last()
    }

    /// A figure of the steps that have it: (step, figure).
    pub fn steps(&self, field: &str) -> Vec<(f64, f64)> {
        self.steps_by(|line| line[field].as_f64())
    }

    /// The same of what a step's line gives.
    pub fn steps_by(&self, of: impl Fn(&Value) -> Option<f64>) -> Vec<(f64, f64)> {
        points(&self.steps, of)
    }

    /// A figure of the evaluations: (steps before it, figure).
    pub fn evaluations(&self, field: &str) -> Vec<(f64, f64)> {
        points(&self.evaluations, |line| line[field].as_f64())
    }
}

fn points(lines: &[Value], of: impl Fn(&Value) -> Option<f64>) -> Vec<(f64, f64)> {
    lines.iter().filter_map(|line| Some((line["step"].as_f64()?, of(line)?))).collect()
}
