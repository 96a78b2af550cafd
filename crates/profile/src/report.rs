//! The table: what the calls of a step took, and how near that is to the machine's limits.

use crate::profile::{Key, Steps, Sum};
use crate::roof::Roof;
use rankfold_backend::Compute;
use serde::Serialize;

/// A profile's figures, those of a step where nothing else is said: the mean over the steps that count.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Steps that count.
    pub steps: u64,
    /// Seconds of a step.
    pub seconds: f64,
    /// Those in kernels: the sum over the rows.
    pub in_kernels: f64,
    /// What the machine can do.
    pub roof: Roof,
    /// Calls by kernel and layer, those that took longest first.
    pub rows: Vec<Row>,
}

/// What bounds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// The bytes of its operands.
    Memory,
    /// Its operations, in f32.
    F32,
    /// Its operations, of products of bf16 values.
    Bf16,
}

/// The calls of one kernel in one kind of layer.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The kernel's name in the contract.
    pub kernel: &'static str,
    /// The kind of layer, forward and backward; empty outside all of them.
    pub layer: String,
    /// Calls.
    pub calls: f64,
    /// Seconds.
    pub seconds: f64,
    /// Those over the step's.
    pub share: f64,
    /// Floating-point operations of the kernel's formula.
    pub flops: f64,
    /// Bytes of its operands, each read or written once.
    pub bytes: f64,
    /// Which roof binds it; none where it has nothing to do.
    pub bound: Option<Bound>,
    /// The time that this roof allows over the time taken. Above 1 the operands were in a cache, or the machine was
    /// busy with something else when it was measured.
    pub fraction: Option<f64>,
}

impl Report {
    pub(crate) fn new(steps: &Steps, layers: &[String], roof: Roof) -> Self {
        let n = steps.steps.max(1) as f64;
        let step = steps.seconds / n;
        let row = |(&(kernel, layer, is_bf16), sum): (&Key, &Sum)| {
            let Sum { calls, seconds, flops, bytes } = *sum;
            let compute = if is_bf16 { Compute::Bf16 } else { Compute::F32 };
            let limit = limit(&roof, compute, flops, bytes);
            Row {
                kernel,
                layer: layers.get(layer).cloned().unwrap_or_default(),
                calls: calls as f64 / n,
                seconds: seconds / n,
                share: share(seconds / n, step),
                flops: flops / n,
                bytes: bytes / n,
                bound: limit.map(|(bound, _)| bound),
                fraction: limit.map(|(_, least)| share(least, seconds)),
            }
        };
        let mut rows: Vec<Row> = steps.sums.iter().map(row).collect();
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self { steps: steps.steps, seconds: step, in_kernels: rows.iter().map(|row| row.seconds).sum(), roof, rows }
    }

    /// Seconds of a step in no kernel.
    pub fn elsewhere(&self) -> f64 {
        self.seconds - self.in_kernels
    }
}

/// The roof that binds some work, and the least seconds that it takes under it.
fn limit(roof: &Roof, compute: Compute, flops: f64, bytes: f64) -> Option<(Bound, f64)> {
    let arithmetic = match compute {
        Compute::F32 => Bound::F32,
        Compute::Bf16 => Bound::Bf16,
    };
    let (by_flops, by_bytes) = (flops / roof.arithmetic(compute), bytes / roof.bandwidth());
    match (flops > 0.0 || bytes > 0.0, by_flops > by_bytes) {
        (false, _) => None,
        (_, true) => Some((arithmetic, by_flops)),
        (_, false) => Some((Bound::Memory, by_bytes)),
    }
}

/// A part over the whole; 0 of nothing.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
