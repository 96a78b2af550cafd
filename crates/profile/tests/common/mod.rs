//! A backend whose calls are noted, and what was noted.
#![allow(dead_code)] // each test file uses a part

use rankfold_backend::Backend;
use rankfold_cpu::CpuBackend;
use rankfold_profile::{Profile, Report, Roof, Row};
use std::sync::Arc;
use tracing::subscriber::with_default;
use tracing_subscriber::layer::SubscriberExt;

/// A machine of 1 GB/s, and so on.
pub const ROOF: Roof = Roof { read: 1e9, write: 0.5e9, f32: 10e9, bf16: 40e9 };

/// The profile of `run`, whose spans are listened to.
pub fn profile(run: impl FnOnce(&Arc<dyn Backend>)) -> Profile {
    let profile = Profile::default();
    let backend = profile.wrap(Arc::new(CpuBackend::new(Some(1)))).unwrap();
    with_default(tracing_subscriber::registry().with(profile.layer()), || run(&backend));
    profile
}

/// A step of a run.
pub fn step(number: u64, run: impl FnOnce()) {
    tracing::debug_span!(target: "rankfold", "step", number).in_scope(run);
}

/// A layer of a model.
pub fn layer<T>(kind: &str, run: impl FnOnce() -> T) -> T {
    tracing::debug_span!(target: "rankfold", "layer", kind).in_scope(run)
}

/// The row of a kernel that was called in one kind of layer.
pub fn row(report: &Report, kernel: &str) -> Row {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.kernel == kernel).collect();
    assert_eq!(rows.len(), 1, "{kernel} in {:?}", report.rows);
    rows[0].clone()
}

/// What one call of a kernel is said to do: operations and bytes.
pub fn work(kernel: &str, run: impl FnOnce(&Arc<dyn Backend>)) -> [f64; 2] {
    let report = profile(|backend| step(1, || run(backend))).report(ROOF);
    let row = row(&report, kernel);
    assert_eq!(row.calls, 1.0);
    [row.flops, row.bytes]
}
