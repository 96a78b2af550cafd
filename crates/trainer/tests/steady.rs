//! A step without waste: once it is warm, a training step takes nothing from the system.
//!
//! What is counted is the process's, so this test has a process of its own, and all of it is one test.

#[path = "../../../benches/llama.rs"]
mod llama;

use llama::Step;
use rankfold_adapters::{AdapterConfig, LoraSpec, Targets, Values};
use rankfold_autograd::SavedAs;
use rankfold_backend::{Backend, Compute, Format};
use rankfold_cpu::{CpuBackend, MemoryFigures};
use rankfold_trainer::model::{Precision, Quantization};
use rankfold_trainer::optimizer::Moments;
use rankfold_trainer::step::Recipe;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Vocabulary, width, layers, heads, heads of keys, feed-forward.
const MODEL: [usize; 6] = [2048, 256, 2, 4, 2, 704];
/// Rows of a batch, and tokens of a row: the smallest activation, keys of 128 columns, takes 512 KiB.
const BATCH: [usize; 2] = [4, 256];
const NF4: Precision = Precision::Quantized(Quantization { format: Format::Nf4, block: 64, double: true });

/// Steps before any is counted, and those that are.
const WARM: usize = 3;
const COUNTED: usize = 5;

/// Bytes of an allocation that is counted as a large one.
const LARGE: usize = 4 << 10;
/// Large allocations that a step may make, each of 4 or 8 bytes a token, which no kernel works on: the batch on the
/// host (ids, labels, positions, starts), as the model takes it (positions, starts, targets), and the tokens' losses.
const OF_THE_BATCH: usize = 8;
/// Minor faults that a step may have: the allocator's own pages, those of the stack and of the program where they are
/// first touched. The smallest activation alone, if it were new, would be 128.
const FEW: usize = 16;

/// The system's allocator, which counts.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LARGE_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    LARGE_ALLOCATIONS.fetch_add((bytes >= LARGE).into(), Ordering::Relaxed);
}

// SAFETY: each method is the system allocator's of that name, on the caller's arguments; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's part.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's part.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's part.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's part.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Minor faults of the process so far, where the system tells: the tenth field of its figures, and the eighth after the
/// name in brackets.
fn faults() -> Option<usize> {
    let figures = std::fs::read_to_string("/proc/self/stat").ok()?;
    figures.rsplit_once(") ")?.1.split(' ').nth(7)?.parse().ok()
}

/// What one step took.
#[derive(Debug)]
struct Taken {
    allocations: usize,
    large: usize,
    /// 0 where the system does not tell.
    faults: usize,
    /// Of the backend, after the step.
    memory: MemoryFigures,
}

fn taken(cpu: &CpuBackend, step: &mut Step) -> Taken {
    let before = faults();
    let [allocations, large] = [&ALLOCATIONS, &LARGE_ALLOCATIONS].map(|count| count.load(Ordering::Relaxed));
    step(&mut || ()).unwrap();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - allocations;
    let large = LARGE_ALLOCATIONS.load(Ordering::Relaxed) - large;
    let faults = faults().zip(before).map_or(0, |(after, before)| after - before);
    Taken { allocations, large, faults, memory: cpu.memory() }
}

/// Steps of QLoRA, or of full finetuning, on one batch.
fn training(cpu: &Arc<CpuBackend>, precision: Precision, recipe: Recipe) -> Step {
    let backend: Arc<dyn Backend> = cpu.clone();
    let mut model = llama::random(backend, MODEL, precision).unwrap();
    if precision != Precision::Trained {
        let (spec, targets) = (LoraSpec::new(16, 16.0), Targets::AllLinear);
        let adapter = AdapterConfig { spec, targets, ..AdapterConfig::default() };
        model.attach(&adapter.into(), Values::New(1)).unwrap();
    }
    llama::training(model, Moments::F32, recipe, BATCH).unwrap()
}

/// A thread of the crew gets its working memory when it first comes in time for a kernel that needs as much, and that
/// may be late on a busy machine: a step in which it does proves nothing. On the caller's thread alone there is none.
#[test]
fn a_warm_step_takes_nothing_from_the_system() {
    let plain = llama::recipe(Compute::F32);
    let cases = [
        ("qlora", NF4, plain),
        ("qlora, checkpointing", NF4, Recipe { checkpointing: true, ..plain }),
        ("qlora, activations in bf16", NF4, Recipe { saved_as: SavedAs::Bf16, ..plain }),
        ("full", Precision::Trained, plain),
    ];
    for (case, precision, recipe) in cases {
        for threads in [1, 2] {
            let cpu = Arc::new(CpuBackend::new(Some(threads)));
            let mut step = training(&cpu, precision, recipe);
            let first = taken(&cpu, &mut step);
            assert!(first.large > OF_THE_BATCH, "what a step takes is counted: {first:?}");
            (1..WARM).for_each(|_| step(&mut || ()).unwrap());

            let mut before = cpu.memory();
            let mut calm = Vec::new();
            for _ in 0..COUNTED {
                let taken = taken(&cpu, &mut step);
                let MemoryFigures { scratch, .. } = taken.memory;
                assert_eq!(taken.memory, MemoryFigures { scratch, ..before }, "{case}: the pool grows");
                if scratch == before.scratch {
                    calm.push(taken);
                }
                before.scratch = scratch;
            }
            let least = if threads == 1 { COUNTED } else { 2 };
            assert!(calm.len() >= least, "{case}, threads {threads}: working memory is taken step by step");
            for taken in &calm {
                assert!(taken.large <= OF_THE_BATCH, "{case}, threads {threads}: {taken:?}");
                assert_eq!(taken.allocations, calm[0].allocations, "{case}, threads {threads}: {calm:?}");
            }
            // The system may take pages away and bring them back in any one step.
            let faults = calm.iter().map(|taken| taken.faults).min().unwrap();
            assert!(faults <= FEW, "{case}, threads {threads}: {calm:?}");
        }
    }
}
