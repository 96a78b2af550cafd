//! The backend to measure, and how fast the machine's memory is.

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

/// More than any cache holds.
pub const MEMORY: usize = 256 << 20;

/// How fast all threads read so many bytes, and how fast they write them (with plain stores: a fill), printed too: an
/// equal part to each, over and over where they are few, so that what a cache holds comes from there.
pub fn bandwidth(threads: usize, bytes: usize) -> Bandwidth {
    let mut memory = vec![1u64; bytes / size_of::<u64>()];
    let (part, passes) = (memory.len().div_ceil(threads), (MEMORY / bytes).max(1));
    let read = fastest(20, || {
        std::thread::scope(|scope| {
            for part in memory.chunks(part) {
                scope.spawn(move || (0..passes).for_each(|_| _ = black_box(sum(black_box(part)))));
            }
        });
    });
    let write = fastest(20, || {
        std::thread::scope(|scope| {
            for part in memory.chunks_mut(part) {
                scope.spawn(move || (0..passes).for_each(|_| black_box(&mut *part).fill(2)));
            }
        });
    });
    let bytes = (passes * size_of_val(&*memory)) as f64;
    let found = Bandwidth { read: bytes / read, write: bytes / write };
    println!("read {:.1} GB/s, write {:.1} GB/s", found.read * 1e-9, found.write * 1e-9);
    found
}

/// Thirty-two sums beside each other: additions do not wait for one another.
fn sum(part: &[u64]) -> [u64; 32] {
    let mut sums = [0u64; 32];
    for words in part.chunks_exact(32) {
        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
    }
    sums
}
