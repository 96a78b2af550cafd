//! A kernel's line: its time, its rate, and the fraction of the limit that binds it.

use crate::machine::Bandwidth;
use criterion::BenchmarkGroup;
use criterion::measurement::WallTime;
use rankfold_backend::{Compute, Result};
use std::time::{Duration, Instant};

/// Samples whose median is taken.
pub const SAMPLES: usize = 15;

/// What the machine can do.
pub struct Limits {
    pub memory: Bandwidth,
    /// Operations a second of dense products, with inputs in f32 and in bf16.
    pub products: [f64; 2],
}

/// The least that a call must do.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    /// Bytes.
    pub read: usize,
    pub written: usize,
    /// Operations of products, and the precision of their inputs.
    pub products: Option<(usize, Compute)>,
}

impl Cost {
    /// So many f32 numbers in and out.
    pub fn f32s(read: usize, written: usize) -> Self {
        Self { read: size_of::<f32>() * read, written: size_of::<f32>() * written, products: None }
    }
}

pub struct Meter<'a> {
    pub group: BenchmarkGroup<'a, WallTime>,
    pub size: &'static str,
    pub limits: Limits,
}

impl Meter<'_> {
    /// Adds the line of a kernel: `make` brings what it is called on, if the command line does not pass it over.
    pub fn measure<K>(&mut self, name: &str, cost: Cost, make: impl Fn() -> Result<K>)
    where
        K: FnMut() -> Result<()>,
    {
        let (mut kernel, mut times) = (None, Vec::new());
        self.group.bench_function(name, |bencher| {
            let kernel = kernel.get_or_insert_with(|| make().expect("shapes that agree"));
            bencher.iter_custom(|calls| {
                let begun = Instant::now();
                (0..calls).for_each(|_| kernel().expect("a right call"));
                let elapsed = begun.elapsed();
                times.push(elapsed.as_secs_f64() / calls as f64);
                elapsed
            });
        });
        // The warm-up came first.
        let samples = times.len().min(SAMPLES);
        let Some(median) = median(times.split_off(times.len() - samples)) else { return };
        println!("{}/{name}: {:.2?}, {}", self.size, Duration::from_secs_f64(median), self.limits.rate(cost, median));
    }
}

impl Limits {
    /// What so many seconds come to.
    fn rate(&self, cost: Cost, seconds: f64) -> String {
        let memory = cost.read as f64 / self.memory.read + cost.written as f64 / self.memory.write;
        let (operations, precision) = cost.products.unwrap_or((0, Compute::F32));
        let (dense, name) = match precision {
            Compute::F32 => (self.products[0], "f32"),
            Compute::Bf16 => (self.products[1], "bf16"),
        };
        let products = operations as f64 / dense;
        if products > memory {
            let (rate, part) = (1e-9 * operations as f64 / seconds, 100.0 * products / seconds);
            format!("{rate:.1} GFLOP/s, {part:.0} % of {name} products")
        } else {
            let (rate, part) = (1e-9 * (cost.read + cost.written) as f64 / seconds, 100.0 * memory / seconds);
            format!("{rate:.1} GB/s, {part:.0} % of memory")
        }
    }
}

/// The middle one.
fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}
