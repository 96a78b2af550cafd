//! The conformance suite on a GPU; where there is none, the reason is printed and nothing is tested.
//!
//! `cargo test --release -p rankfold-cuda --features gpu --test gpu`
#![cfg(feature = "gpu")]

use rankfold_backend::conformance::{LAWS, Law, Verdict, few_cases};
use rankfold_cuda::CudaBackend;
use rankfold_cuda::gpu::GpuDriver;
use rankfold_reference::ReferenceBackend;
use std::io::Write;

/// A line that the test runner does not keep to itself where the test passes.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The device, or nothing and why.
fn gpu() -> Option<GpuDriver> {
    match GpuDriver::open() {
        Ok(driver) => Some(driver),
        Err(missing) => {
            say(&format!("skipped: {missing}"));
            None
        }
    }
}

/// That no law is broken; every law is tried.
fn judge(backend: &CudaBackend, laws: impl Iterator<Item = (&'static str, Law)>) {
    let oracle = ReferenceBackend::new();
    let mut broken = Vec::new();
    for (name, law) in laws {
        match law(backend, &oracle) {
            Verdict::Holds { .. } => say(&format!("{name}: holds")),
            Verdict::Skipped(why) => say(&format!("{name}: skipped, {why}")),
            Verdict::Broken(why) => {
                say(&format!("{name}: broken, {why}"));
                broken.push(name);
            }
        }
    }
    assert!(broken.is_empty(), "broken: {broken:?}");
}

#[test]
fn every_law_holds() {
    let Some(driver) = gpu() else { return };
    judge(&CudaBackend::new(driver).unwrap(), LAWS.iter().copied());
}

/// The project's own products, which cuBLASLt's stand in for.
#[test]
fn products_hold_without_cublaslt() {
    let Some(driver) = gpu() else { return };
    let products = |(name, _): &(&str, Law)| name.starts_with("matmul") || name.starts_with("linear");
    judge(&CudaBackend::new(driver.without_cublaslt()).unwrap(), LAWS.iter().copied().filter(products));
}

/// A few small cases of every kernel, short enough for a sanitizer to watch; of the project's own alone, for others'
/// libraries are not what it is to look at.
#[test]
fn small_cases_hold() {
    let Some(driver) = gpu() else { return };
    let small = |(name, _): &(&str, Law)| {
        !["published", "rank_as", "less_than_a_percent", "large_matrices"].iter().any(|part| name.contains(part))
    };
    let backend = CudaBackend::new(driver.without_cublaslt()).unwrap();
    few_cases(6, || judge(&backend, LAWS.iter().copied().filter(small)));
}
