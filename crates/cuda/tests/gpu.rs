//! The conformance suite on a GPU; where there is none, the reason is printed and nothing is tested.
//!
//! `cargo test --release -p rankfold-cuda --features gpu --test gpu`
#![cfg(feature = "gpu")]

use rankfold_backend::conformance::{LAWS, Law, Verdict, few_cases};
use rankfold_backend::{Backend, DType};
use rankfold_cuda::gpu::GpuDriver;
use rankfold_cuda::{CudaBackend, Driver, PagedMemory};
use rankfold_pager::{FileOptions, Limit, Options, Pager};
use rankfold_reference::ReferenceBackend;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

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
    let backend = CudaBackend::new(driver.without_cublaslt()).unwrap();
    few_cases(6, || judge(&backend, small_laws()));
}

fn small_laws() -> impl Iterator<Item = (&'static str, Law)> {
    let large = ["published", "rank_as", "less_than_a_percent", "large_matrices"];
    LAWS.iter().copied().filter(move |(name, _)| !large.iter().any(|part| name.contains(part)))
}

/// 64 MiB of the host over a file.
fn host() -> Pager {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
    let options = Options::new(Limit::Pages(64 << 20), Some(file));
    Pager::new(Options { page: 64 << 10, ..options }).unwrap()
}

/// Every buffer paged, and driven out whenever nobody holds it: while kernels that were launched on it still run.
#[test]
fn small_cases_hold_to_the_bit_while_pages_come_and_go() {
    let (Some(plain), Some(driver)) = (gpu(), gpu()) else { return };
    let plain = CudaBackend::new(plain).unwrap();
    let paged = CudaBackend::new(driver).unwrap().on_pager_from(host(), 512 << 20, 1).unwrap();
    let (pager, oracle, done) = (paged.pager().unwrap(), ReferenceBackend::new(), AtomicBool::new(false));
    let broken = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                pager.vacate().unwrap();
                thread::sleep(Duration::from_micros(50));
            }
        });
        let verdict = |on: &CudaBackend, law: Law| few_cases(4, || law(on, &oracle));
        let judged = small_laws().map(|(name, law)| (name, verdict(&plain, law), verdict(&paged, law)));
        let broken: Vec<_> = judged.filter(|(_, plain, paged)| plain != paged).collect();
        done.store(true, Ordering::Relaxed);
        broken
    });
    say(&format!("{:?}", pager.stats()));
    assert!(broken.is_empty(), "{broken:?}");
    assert!(pager.stats().loaded > 0);
}

/// Pages leave after the kernel that fills them, and come to new frames: a part more than the halves that copies go by.
#[test]
fn bytes_leave_after_their_kernel_and_come_back_elsewhere() {
    let Some(driver) = gpu() else { return };
    let frame = driver.frame().unwrap();
    let bytes = (12 << 20) / frame * frame + frame;
    let backend = CudaBackend::new(driver).unwrap().on_pager_from(host(), bytes + (8 << 20), 1).unwrap();
    let on: &dyn Backend = &backend;
    let values: Vec<u32> = (0..bytes as u32 / 4).collect();
    let x = on.upload(&values).unwrap();
    for _ in 0..3 {
        let mut y = on.alloc(DType::U32, values.len()).unwrap();
        // Each drives out the other.
        on.copy(x.view(), y.view_mut()).unwrap_err();
        on.fill(7.0, y.view_mut()).unwrap();
        backend.pager().unwrap().vacate().unwrap();
        assert_eq!(backend.pager().unwrap().stats().resident, 0);
        assert!(on.download::<u32>(y.view()).unwrap().iter().all(|element| *element == 7));
        assert!(on.download::<u32>(x.view()).unwrap() == values);
    }
}

/// Buffers of four times the limit: each is written, leaves, and comes back.
#[test]
fn more_than_the_limit_is_paged_and_no_more_is_taken() {
    let Some(driver) = gpu() else { return };
    let (free, limit, len) = (driver.free_memory(), 256 << 20, (16 << 20) / 4);
    let backend = CudaBackend::new(driver).unwrap().on_pager(host(), limit).unwrap();
    let on: &dyn Backend = &backend;
    let mut buffers: Vec<_> = (0..64).map(|_| on.alloc(DType::F32, len).unwrap()).collect();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        on.fill(i as f64, buffer.view_mut()).unwrap();
        on.scale_in_place(2.0, buffer.view_mut()).unwrap();
    }
    for (i, buffer) in buffers.iter().enumerate() {
        assert!(on.download::<f32>(buffer.view()).unwrap().iter().all(|x| *x == 2.0 * i as f32));
    }
    let stats = backend.pager().unwrap().stats();
    say(&format!("{stats:?}"));
    assert!(stats.high_water <= limit && stats.stored >= (3 * limit) as u64);
    // Modules and the driver's own take some, far less than the buffers that are not there.
    assert!(free.saturating_sub(backend.driver().free_memory()) < 2 * limit);
}
