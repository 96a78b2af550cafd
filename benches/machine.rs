//! The backend to measure, what the machine can do, and how near a kernel comes.

use criterion::BenchmarkGroup;
use criterion::measurement::WallTime;
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use std::hint::black_box;
use std::time::Instant;

/// All cores, on the fastest instruction set or the one that `RANKFOLD_ISA` names.
pub fn backend() -> CpuBackend {
    let backend = match std::env::var("RANKFOLD_ISA") {
        Ok(name) => CpuBackend::with_isa(Isa::named(&name).expect("an instruction set of this machine"), None),
        Err(_) => CpuBackend::new(None),
    };
    println!("{} with {} threads", backend.isa(), backend.threads());
    backend
}

/// Bytes a second.
#[derive(Clone, Copy)]
pub struct Bandwidth {
    pub read: f64,
    pub write: f64,
}

/// Seconds of the fastest of `times` calls.
pub fn fastest(times: u64, mut f: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let begun = Instant::now();
        f();
        best = best.min(begun.elapsed().as_secs_f64());
    }
    best
}

/// How fast all threads read memory, and how fast they write it (with plain stores: a fill), printed too: 256 MiB, an
/// equal part to each.
pub fn bandwidth(threads: usize) -> Bandwidth {
    const WORDS: usize = 32 << 20;
    let mut memory = vec![1u64; WORDS];
    let part = WORDS.div_ceil(threads);
    let read = fastest(20, || {
        std::thread::scope(|scope| {
            for part in memory.chunks(part) {
                // Thirty-two sums beside each other: additions do not wait for one another.
                scope.spawn(move || {
                    let mut sums = [0u64; 32];
                    for words in part.chunks_exact(32) {
                        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                    }
                    black_box(sums)
                });
            }
        });
    });
    let write = fastest(20, || {
        std::thread::scope(|scope| {
            for part in memory.chunks_mut(part) {
                scope.spawn(move || black_box(part).fill(2));
            }
        });
    });
    let bytes = (WORDS * size_of::<u64>()) as f64;
    let found = Bandwidth { read: bytes / read, write: bytes / write };
    println!("read {:.1} GB/s, write {:.1} GB/s", found.read * 1e-9, found.write * 1e-9);
    found
}

/// Runs a kernel in the group; seconds of its fastest call, `None` where the command line passes it over.
pub fn fastest_of(group: &mut BenchmarkGroup<WallTime>, name: &str, mut kernel: impl FnMut()) -> Option<f64> {
    let mut best = f64::INFINITY;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let begun = Instant::now();
            best = best.min(fastest(iterations, &mut kernel));
            begun.elapsed()
        });
    });
    best.is_finite().then_some(best)
}
