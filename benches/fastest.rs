//! The fastest call of a kernel, under criterion.

use crate::machine;
use criterion::BenchmarkGroup;
use criterion::measurement::WallTime;
use std::time::Instant;

/// Runs a kernel in the group; seconds of its fastest call, `None` where the command line passes it over.
pub fn fastest_of(group: &mut BenchmarkGroup<WallTime>, name: &str, mut kernel: impl FnMut()) -> Option<f64> {
    let mut best = f64::INFINITY;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let begun = Instant::now();
            best = best.min(machine::fastest(iterations, &mut kernel));
            begun.elapsed()
        });
    });
    best.is_finite().then_some(best)
}
