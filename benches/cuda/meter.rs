//! Times of calls on a device, by its own clock, and the rows of the record that they make.

use crate::sizes::Sizes;
use rankfold_backend::{DType, Result};
use rankfold_cuda::Driver;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// What a kernel is called on, and the least that it must do there.
pub struct Case {
    row: Map<String, Value>,
    bytes: usize,
    flops: usize,
    compute: DType,
}

impl Case {
    /// What a peer's row is found by, with what [`Case::with`] adds.
    pub fn new(kernel: impl Into<Value>, shape: impl Into<Value>) -> Self {
        let row = [("kernel", kernel.into()), ("shape", shape.into())];
        let row = row.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { row, bytes: 0, flops: 0, compute: DType::F32 }
    }

    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.row.insert(key.into(), value.into());
        self
    }

    /// Bytes of every input, read once, and of every output, written once.
    pub fn bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// The same of so many elements, each of which has `bytes` in and out.
    pub fn elements(self, n: usize, bytes: f64) -> Self {
        self.with("bytes_an_element", bytes).bytes((n as f64 * bytes) as usize)
    }

    /// Operations, a multiply-add being two, and the type whose dense products they are compared with.
    pub fn flops(self, flops: usize, compute: DType) -> Self {
        Self { flops, compute, ..self }
    }
}

/// What the device can do, once it has been measured.
#[derive(Default)]
pub struct Limits {
    /// Bytes read and written a second by a copy on the device.
    pub copy: Option<f64>,
    /// Operations a second of the largest dense product.
    pub bf16: Option<f64>,
    pub f32: Option<f64>,
}

impl Limits {
    fn dense(&self, compute: DType) -> Option<f64> {
        if compute == DType::Bf16 { self.bf16 } else { self.f32 }
    }
}

/// The rows so far.
pub struct Meter {
    pub limits: Limits,
    pub rows: Vec<Value>,
    rounds: usize,
    round: Duration,
}

/// Calls between two events that stand for many: what they tell of a call's length.
const TRIAL: usize = 3;
/// Calls of a round at most: more would wait for room in the device's queue.
const MOST_CALLS: usize = 1000;

impl Meter {
    pub fn new(sizes: &Sizes) -> Self {
        Self { limits: Limits::default(), rows: Vec::new(), rounds: sizes.rounds, round: sizes.round }
    }

    /// Adds the row of a case; its median in seconds. A call that fails makes a row that says so.
    ///
    /// `call(i)` launches the kernel for the i-th time, on inputs that it may choose by i.
    pub fn measure(&mut self, driver: &dyn Driver, case: Case, call: impl FnMut(usize) -> Result<()>) -> Option<f64> {
        let Case { mut row, bytes, flops, compute } = case;
        let name =
            row.iter().map(|(key, value)| value.as_str().map_or_else(|| format!("{key} {value}"), str::to_owned));
        let name = name.collect::<Vec<_>>().join(", ");
        let median = match self.time(driver, call) {
            Ok((median, spread)) => {
                let of = |amount: f64, limit: Option<f64>| limit.filter(|_| amount > 0.0).map(|l| amount / median / l);
                let copy = of(bytes as f64, self.limits.copy);
                let dense = of(flops as f64, self.limits.dense(compute));
                let part = |part: Option<f64>, limit: &str| {
                    part.map_or_else(String::new, |part| format!(", {:.0} % of {limit}", 100.0 * part))
                };
                let (of_copy, of_dense) = (part(copy, "the copy"), part(dense, "dense"));
                println!("{name}: {:.2} µs ± {:.0} %{of_copy}{of_dense}", 1e6 * median, 100.0 * spread);
                let figures = json!({
                    "median_us": 1e6 * median,
                    "spread": spread,
                    "bytes": bytes,
                    "flops": flops,
                    "bytes_per_s": bytes as f64 / median,
                    "flops_per_s": flops as f64 / median,
                    "fraction_of_copy": copy,
                    "fraction_of_dense": dense,
                });
                row.extend(figures.as_object().cloned().unwrap_or_default());
                Some(median)
            }
            Err(error) => {
                println!("{name}: {error}");
                row.insert("error".into(), json!(error.to_string()));
                None
            }
        };
        self.rows.push(Value::Object(row));
        median
    }

    /// More of the last row.
    pub fn note(&mut self, key: &str, value: impl Into<Value>) {
        if let Some(Value::Object(row)) = self.rows.last_mut() {
            row.insert(key.into(), value.into());
        }
    }

    /// Whether every call went through.
    pub fn whole(&self) -> bool {
        self.rows.iter().all(|row| row.get("error").is_none())
    }

    /// The median of the rounds, in seconds a call, and how far the rounds lie apart as a fraction of it.
    ///
    /// A round is as many calls as fill its time, between two events. The first call compiles and loads; a round that
    /// is not counted warms the caches and the clock.
    fn time(&self, driver: &dyn Driver, mut call: impl FnMut(usize) -> Result<()>) -> Result<(f64, f64)> {
        let mut turn = 0;
        let mut round = |calls: usize| {
            let from = driver.record()?;
            for _ in 0..calls {
                call(turn)?;
                turn += 1;
            }
            let to = driver.record()?;
            // An interval of the clock's own step at least: rates stay finite.
            Ok::<f64, rankfold_backend::Error>((driver.elapsed(&from, &to)?.as_secs_f64() / calls as f64).max(1e-9))
        };
        round(1)?;
        let calls = if self.round.is_zero() {
            1
        } else {
            let one = round(TRIAL)?;
            ((self.round.as_secs_f64() / one) as usize).clamp(1, MOST_CALLS)
        };
        round(calls)?;
        let mut times = (0..self.rounds).map(|_| round(calls)).collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        Ok((median, (times[times.len() - 1] - times[0]) / median))
    }
}
