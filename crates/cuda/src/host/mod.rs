//! The host as a device: the kernels of `kernels/`, compiled by the host's C++ compiler, in fibres.
//!
//! In reading order: `memory` (what stands for the device's) and `pages` (by frames), `shared` (a block's),
//! [`Schedule`], `block` (its threads as fibres), `calls` (what kernels call), `copies` (asynchronous ones), `checker`
//! (races, bounds, initialisation).

mod block;
mod calls;
mod checker;
mod copies;
mod memory;
mod pages;
mod schedule;
mod shared;

pub use schedule::Schedule;

use crate::kernels::{self, Entry};
use crate::{Argument, Driver, Error, Event, Gemm, Launch, Result, Site, gemm};
use block::{Block, MOST_THREADS, Work};
use checker::Checker;
use memory::Memory;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use schedule::WARP;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How the host plays a device.
#[derive(Clone, Debug)]
pub struct Options {
    /// In which order threads run.
    pub schedule: Schedule,
    /// Whether every access is checked.
    pub watched: bool,
    /// Bytes of device memory.
    pub capacity: usize,
    /// Bytes of addresses, which may be more than there is memory.
    pub addresses: usize,
    /// The most shared memory of a block: an H100's 227 KiB where not said otherwise.
    pub shared_memory: usize,
    /// OS threads, each with a block at a time; all cores where not given. Checked launches have one.
    pub threads: Option<usize>,
    /// A barrier or meeting of warps that is passed over, for tests that want to see it missed.
    pub left_out: Option<Site>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::InOrder,
            watched: false,
            capacity: 64 << 30,
            addresses: 64 << 30,
            shared_memory: shared::CAPACITY,
            threads: None,
            left_out: None,
        }
    }
}

impl Options {
    /// Checked, on a device that its shadow fits beside.
    pub fn watched() -> Self {
        Self { watched: true, capacity: 1 << 30, addresses: 1 << 30, ..Self::default() }
    }
}

/// The host as a device.
pub struct HostDriver {
    options: Options,
    memory: Arc<Memory>,
    pool: ThreadPool,
    checker: Option<Mutex<Checker>>,
    /// How many there were; held while one runs, for a device runs one after another.
    launches: Mutex<u64>,
}

thread_local! {
    /// What an OS thread keeps between the blocks that it runs.
    static BLOCK: RefCell<Option<Block>> = const { RefCell::new(None) };
}

/// A kernel's entry point of one flavour.
fn entry(watched: bool, name: &'static str) -> Result<&'static Entry> {
    static ENTRIES: OnceLock<[HashMap<&'static str, &'static Entry>; 2]> = OnceLock::new();
    let index = |entries: Vec<&'static Entry>| entries.into_iter().map(|entry| (entry.name(), entry)).collect();
    let entries = ENTRIES.get_or_init(|| [index(kernels::plain()), index(kernels::watched())]);
    entries[usize::from(watched)].get(name).copied().ok_or_else(|| Error::UnknownKernel { name: name.into() })
}

impl HostDriver {
    /// A device of these options.
    pub fn new(options: Options) -> Result<Self> {
        #[cfg(host_kernels_use_avx2)]
        if !std::arch::is_x86_feature_detected!("avx2") || !std::arch::is_x86_feature_detected!("fma") {
            let why = "the kernels were built for a CPU with AVX2 and FMA, which this one lacks".into();
            return Err(Error::Missing(why));
        }
        if options.shared_memory > shared::CAPACITY {
            let most = shared::CAPACITY;
            return Err(Error::Missing(format!("a device with more than {most} bytes of shared memory a block")));
        }
        let memory = Arc::new(Memory::new(options.addresses, options.capacity)?);
        let pool = ThreadPoolBuilder::new().num_threads(options.threads.unwrap_or(0)).build();
        let pool = pool.map_err(|why| Error::Missing(format!("the host's threads: {why}")))?;
        let checker = options.watched.then(|| Checker::new(Arc::clone(&memory))).transpose()?.map(Mutex::new);
        Ok(Self { options, memory, pool, checker, launches: Mutex::new(0) })
    }

    fn checker(&self) -> Option<MutexGuard<'_, Checker>> {
        self.checker.as_ref().map(|checker| checker.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn check(&self, launch: &Launch) -> Result<&'static Entry> {
        let entry = entry(self.options.watched, launch.kernel)?;
        let found = Argument::types(launch.arguments);
        if found != entry.types() {
            return Err(Error::Arguments { kernel: launch.kernel, expected: entry.types().into(), found });
        }
        let threads: usize = launch.block.iter().map(|n| *n as usize).product();
        let refuse = |why: String| Err(Error::Geometry { kernel: launch.kernel, why });
        if threads == 0 || threads > MOST_THREADS || !threads.is_multiple_of(WARP) {
            return refuse(format!(
                "blocks of {threads} threads: expected whole warps, at most {MOST_THREADS} threads"
            ));
        }
        if launch.grid.contains(&0) || launch.grid[0] > i32::MAX as u32 || launch.grid[1..].iter().any(|n| *n > 65535) {
            return refuse(format!("a grid of {:?} blocks: expected 1 to [2³¹ − 1, 65535, 65535]", launch.grid));
        }
        let most = self.options.shared_memory;
        if launch.shared as usize > most {
            return refuse(format!("{} bytes of dynamic shared memory: expected at most {most}", launch.shared));
        }
        Ok(entry)
    }
}

/// Runs one block on this OS thread.
fn run(work: &Work, index: u32, checker: Option<&mut Checker>) -> Result<()> {
    BLOCK.with_borrow_mut(|block| {
        if block.is_none() {
            *block = Some(Block::new()?);
        }
        block.as_mut().expect("it was made above").run(work, index, checker)
    })
}

impl Driver for HostDriver {
    fn name(&self) -> String {
        "host".into()
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let address = self.memory.alloc(bytes)?;
        if let Some(mut checker) = self.checker() {
            checker.allocated(address, bytes);
        }
        Ok(address)
    }

    fn free(&self, address: u64) {
        // The checker first: freed memory may be handed out again at once.
        let mut checker = self.checker();
        let freed = self.memory.free(address);
        if let (Some(bytes), Some(checker)) = (freed, checker.as_mut()) {
            checker.freed(address, bytes);
        }
    }

    fn free_memory(&self) -> usize {
        self.memory.free_bytes()
    }

    /// Nothing is kept.
    fn trim(&self) -> Result<()> {
        Ok(())
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<()> {
        let out = self.memory.range(to, bytes.len())?;
        // SAFETY: a range of one live allocation; who owns the buffer lends it to one call at a time.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out, bytes.len()) };
        if let Some(mut checker) = self.checker() {
            checker.uploaded(to, bytes.len());
        }
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let x = self.memory.range(from, bytes.len())?;
        // SAFETY: as in upload.
        unsafe { std::ptr::copy_nonoverlapping(x, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let (x, out) = (self.memory.range(from, bytes)?, self.memory.range(to, bytes)?);
        // SAFETY: as in upload; the two do not overlap, being parts of two buffers.
        unsafe { std::ptr::copy(x, out, bytes) };
        if let Some(mut checker) = self.checker() {
            checker.copied(from, to, bytes);
        }
        Ok(())
    }

    fn shared_memory(&self) -> usize {
        self.options.shared_memory
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let entry = self.check(launch)?;
        let (count, values) = (launch.arguments.len(), launch.arguments.iter().map(Argument::value));
        let mut arguments: Vec<u64> = std::iter::repeat_n(0, count).chain(values).collect();
        for i in 0..count {
            arguments[i] = std::ptr::from_ref(&arguments[count + i]) as u64;
        }
        let schedule = self.options.schedule;
        let mut launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        *launches += 1;
        let work = Work {
            kernel: launch.kernel,
            entry,
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared as usize,
            shared_memory: self.options.shared_memory,
            arguments: &arguments,
            schedule,
            launch: *launches,
            left_out: self.options.left_out.as_ref(),
        };
        let blocks = launch.grid.iter().product::<u32>();
        // Blocks are in no order on a device; every other launch begins with the last.
        let nth =
            |i: u32| if schedule == Schedule::InOrder || work.launch.is_multiple_of(2) { i } else { blocks - 1 - i };
        match self.checker() {
            Some(mut checker) => {
                checker.begin_launch();
                (0..blocks).try_for_each(|i| run(&work, nth(i), Some(&mut checker)))
            }
            None if blocks == 1 => run(&work, 0, None),
            None => self.pool.install(|| (0..blocks).into_par_iter().try_for_each(|i| run(&work, nth(i), None))),
        }
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        gemm::tiled(self, gemm)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        Ok(Box::new(Instant::now()))
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        match (from.downcast_ref::<Instant>(), to.downcast_ref::<Instant>()) {
            (Some(from), Some(to)) => Ok(to.duration_since(*from)),
            _ => Err(Error::Device { call: "elapsed", what: "an event of another driver".into() }),
        }
    }
}

impl fmt::Debug for HostDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostDriver").field("options", &self.options).finish_non_exhaustive()
    }
}
