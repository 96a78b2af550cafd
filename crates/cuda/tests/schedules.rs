//! The laws of the suite, a few cases each, on many orders of threads, and with every access checked.

use rankfold_backend::conformance::{LAWS, Law, Verdict, few_cases};
use rankfold_cuda::CudaBackend;
use rankfold_cuda::host::{HostDriver, Options, Schedule};
use rankfold_reference::ReferenceBackend;

/// Of each kind of schedule.
const SEEDS: u64 = 10;

/// Laws of what N(0, 1) weights lose: large, and the same kernels as in the others.
fn is_small(name: &str) -> bool {
    !["published", "rank_as", "less_than_a_percent", "large_matrices"].iter().any(|part| name.contains(part))
}

fn small_laws() -> impl Iterator<Item = (&'static str, Law)> {
    LAWS.iter().copied().filter(|(name, _)| is_small(name))
}

fn verdict(options: Options, law: Law, cases: u32) -> Verdict {
    let candidate = CudaBackend::new(HostDriver::new(options).unwrap()).unwrap();
    few_cases(cases, || law(&candidate, &ReferenceBackend::new()))
}

/// Whatever the order of threads, warps and blocks, the bits are those of one thread after another.
#[test]
fn every_schedule_gives_the_same_bits() {
    for (name, law) in small_laws() {
        let in_order = verdict(Options::default(), law, 6);
        assert!(!matches!(in_order, Verdict::Broken(_)), "{name}: {in_order:?}");
        for schedule in (0..SEEDS).flat_map(|seed| [Schedule::Shuffled(seed), Schedule::Warps(seed)]) {
            let found = verdict(Options { schedule, ..Options::default() }, law, 6);
            assert_eq!(found, in_order, "{name}, {schedule:?}");
        }
    }
}

/// No access out of bounds, of what nobody wrote, or in a race, on any kind of schedule.
#[test]
fn every_access_is_in_bounds_initialised_and_ordered() {
    for (name, law) in small_laws() {
        for schedule in [Schedule::InOrder, Schedule::Shuffled(1), Schedule::Warps(1)] {
            let found = verdict(Options { schedule, ..Options::watched() }, law, 12);
            assert!(!matches!(found, Verdict::Broken(_)), "{name}, {schedule:?}: {found:?}");
        }
    }
}

/// A block of a GeForce has 99 KiB of shared memory, less than the widest tiles of an H100's take.
#[test]
fn a_device_of_little_shared_memory_serves_every_product() {
    for (name, law) in LAWS.iter().copied().filter(|(name, _)| name.starts_with("linear")) {
        let found = verdict(Options { shared_memory: 99 << 10, ..Options::default() }, law, 48);
        assert!(!matches!(found, Verdict::Broken(_)), "{name}: {found:?}");
    }
}
