//! The laws of the suite, a few cases each, with every buffer paged and every page that is not held gone whenever the
//! device is asked for anything: a kernel that touched what its call does not hold would find zeros, or what it wrote
//! would be lost; and where accesses are checked, it is out of bounds.

use rankfold_backend::conformance::{LAWS, Law, Verdict, few_cases};
use rankfold_backend::{Backend, Buffer, DType};
use rankfold_cuda::host::{HostDriver, Options, Schedule};
use rankfold_cuda::{Argument, CudaBackend, DevicePager, Driver, Error, Event, Gemm, Launch, PagedMemory, Result};
use rankfold_pager::{FileOptions, Limit, Options as Pages, Pager};
use rankfold_reference::ReferenceBackend;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const FRAME: usize = 64 << 10;

/// A driver without a page but those that are held.
#[derive(Debug)]
struct Restless {
    inner: HostDriver,
    pager: Arc<OnceLock<DevicePager>>,
}

impl Restless {
    fn vacate(&self) -> &HostDriver {
        if let Some(pager) = self.pager.get() {
            pager.vacate().unwrap();
        }
        &self.inner
    }
}

impl Driver for Restless {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.inner.alloc(bytes)
    }
    fn free(&self, address: u64) {
        self.inner.free(address)
    }
    fn free_memory(&self) -> usize {
        self.inner.free_memory()
    }
    fn trim(&self) -> Result<()> {
        self.inner.trim()
    }
    fn upload(&self, bytes: &[u8], to: u64) -> Result<()> {
        self.vacate().upload(bytes, to)
    }
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.vacate().download(from, bytes)
    }
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.vacate().copy(from, to, bytes)
    }
    fn shared_memory(&self) -> usize {
        self.inner.shared_memory()
    }
    fn launch(&self, launch: &Launch) -> Result<()> {
        self.vacate().launch(launch)
    }
    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.vacate().gemm(gemm)
    }
    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
    fn record(&self) -> Result<Event> {
        self.inner.record()
    }
    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        self.inner.elapsed(from, to)
    }
}

impl PagedMemory for Restless {
    fn frame(&self) -> Result<usize> {
        self.inner.frame()
    }
    fn reserve(&self, bytes: usize) -> Result<u64> {
        self.inner.reserve(bytes)
    }
    fn unreserve(&self, address: u64, bytes: usize) {
        self.inner.unreserve(address, bytes)
    }
    fn map(&self, address: u64, bytes: usize) -> Result<()> {
        self.inner.map(address, bytes)
    }
    fn unmap(&self, address: u64, bytes: usize) {
        self.inner.unmap(address, bytes)
    }
    fn page_in(&self, bytes: &[u8], to: u64) -> Result<()> {
        self.inner.page_in(bytes, to)
    }
    fn page_out(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.inner.page_out(from, bytes)
    }
}

/// A host tier of so many frames, over a file.
fn host(frames: usize) -> Pager {
    host_over(frames, u64::MAX)
}

/// The same over a file of at most so many bytes.
fn host_over(frames: usize, capacity: u64) -> Pager {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity };
    let options = Pages::new(Limit::Pages(frames * FRAME), Some(file));
    Pager::new(Pages { page: FRAME, look_ahead: 0, ..options }).unwrap()
}

fn unpaged(options: &Options) -> CudaBackend {
    CudaBackend::new(HostDriver::new(options.clone()).unwrap()).unwrap()
}

/// On a device of 32 MiB over a host of 2 MiB.
fn restless(options: &Options) -> CudaBackend {
    let pager = Arc::new(OnceLock::new());
    let driver = Restless { inner: HostDriver::new(options.clone()).unwrap(), pager: pager.clone() };
    let backend = CudaBackend::new(driver).unwrap().on_pager_from(host(32), 512 * FRAME, 1).unwrap();
    pager.set(backend.pager().unwrap().clone()).unwrap();
    backend
}

/// All but the laws of what N(0, 1) weights lose: large, and the same kernels as in the others.
fn small_laws() -> impl Iterator<Item = (&'static str, Law)> {
    let large = ["published", "rank_as", "less_than_a_percent", "large_matrices"];
    LAWS.iter().copied().filter(move |(name, _)| !large.iter().any(|part| name.contains(part)))
}

fn verdict(backend: &CudaBackend, law: Law) -> Verdict {
    few_cases(4, || law(backend, &ReferenceBackend::new()))
}

#[test]
fn what_is_not_held_may_leave_before_every_launch_and_no_bit_changes() {
    let options = Options { threads: Some(1), ..Options::default() };
    let (plain, paged) = (unpaged(&options), restless(&options));
    for (name, law) in small_laws() {
        let expected = verdict(&plain, law);
        assert!(!matches!(expected, Verdict::Broken(_)), "{name}: {expected:?}");
        assert_eq!(verdict(&paged, law), expected, "{name}");
    }
    let stats = paged.pager().unwrap().stats();
    assert!(stats.stored > 0 && stats.loaded > 0 && stats.resident <= stats.allocated, "{stats:?}");
}

#[test]
fn no_kernel_touches_what_its_call_does_not_hold() {
    let options = Options { schedule: Schedule::Warps(1), ..Options::watched() };
    let paged = restless(&options);
    for (name, law) in small_laws() {
        let found = verdict(&paged, law);
        assert!(!matches!(found, Verdict::Broken(_)), "{name}: {found:?}");
    }
}

/// The law above can fail: this is what it would find.
#[test]
fn a_kernel_on_what_has_no_frame_is_out_of_bounds() {
    let driver = HostDriver::new(Options::watched()).unwrap();
    let at = driver.reserve(2 * FRAME).unwrap();
    driver.map(at, FRAME).unwrap();
    let fill = |n: u64| {
        let arguments = [0u32.into(), Argument::output_bits(4, at), n.into()];
        let launch = Launch { kernel: "fill_u32", grid: [1; 3], block: [256, 1, 1], shared: 0, arguments: &arguments };
        driver.launch(&launch)
    };
    let elements = (FRAME / 4) as u64;
    fill(elements).unwrap();
    assert!(matches!(fill(elements + 1), Err(Error::OutOfBounds { .. })));
    driver.unmap(at, FRAME);
    assert!(matches!(fill(1), Err(Error::OutOfBounds { .. })));
    assert!(driver.download(at, &mut [0]).is_err());
}

/// Twelve buffers on a device that has room for four of them, and for none where it has other work.
#[test]
fn a_limit_is_on_all_that_the_device_holds() {
    let (frames, len) = (8, 2 * FRAME / 4);
    let options = Options { capacity: frames * FRAME, threads: Some(1), ..Options::default() };
    // A frame's room for the tables and the counters, which were there before.
    let backend = unpaged(&options).on_pager(host(64), (frames - 1) * FRAME).unwrap();
    let on: &dyn Backend = &backend;
    let mut buffers: Vec<_> = (0..12).map(|_| on.alloc(DType::F32, len).unwrap()).collect();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        on.fill(i as f64, buffer.view_mut()).unwrap();
    }
    for (i, buffer) in buffers.iter().enumerate() {
        assert!(on.download::<f32>(buffer.view()).unwrap().iter().all(|x| *x == i as f32));
    }
    let pager = backend.pager().unwrap();
    assert_eq!(pager.stats().capacity, (frames - 1) * FRAME);
    // A buffer of less than a frame is not paged: it takes its room from those that are.
    let small = on.filled(DType::F32, FRAME / 4 - 1, 1.0).unwrap();
    assert_eq!(pager.stats().capacity, (frames - 2) * FRAME);
    assert!(backend.driver().free_memory() < 2 * FRAME);
    drop(small);
    let error = on.alloc(DType::F32, (frames * FRAME) / 4).and_then(|mut x| on.fill(0.0, x.view_mut())).unwrap_err();
    assert!(error.to_string().starts_with("fill: 'out': out of memory"), "{error}");
}

/// Buffers that fill a device of eight frames, over a host and a file of a frame each: there is room for two frames of
/// other work, and for no more.
#[test]
fn what_there_is_no_room_for_changes_no_limit_and_is_told_with_its_cause() {
    let (frames, len) = (8, FRAME / 4);
    let options = Options { capacity: 2 * frames * FRAME, threads: Some(1), ..Options::default() };
    let backend = unpaged(&options).on_pager(host_over(1, FRAME as u64), frames * FRAME).unwrap();
    let on: &dyn Backend = &backend;
    let buffers: Vec<_> = (0..frames).map(|i| on.filled(DType::F32, len, i as f64).unwrap()).collect();
    let capacity = || backend.pager().unwrap().stats().capacity;
    let (mut others, mut before) = (Vec::new(), capacity());
    let error = loop {
        match on.alloc(DType::F32, len - 1) {
            Ok(other) => {
                others.push(other);
                before = capacity();
            }
            Err(error) => break error.to_string(),
        }
    };
    assert!(others.len() == 2 && capacity() == before, "{} others, {before} became {}", others.len(), capacity());
    for words in ["65532 bytes of device memory were asked for", "the file tier is full: 65536 bytes were asked for"] {
        assert!(error.contains(words), "{error}");
    }
    // With every tier full, what is away cannot come back; the rest is what it was.
    let read = |buffer: &Buffer| on.download::<f32>(buffer.view());
    let there = buffers.iter().enumerate().filter_map(|(i, buffer)| Some((i, read(buffer).ok()?)));
    let there: Vec<_> = there.collect();
    assert!(there.len() >= frames - 3 && there.iter().all(|(i, values)| values.iter().all(|x| *x == *i as f32)));
}
