//! The limit of the disk: bytes a second into a file as the pager's, out of it, and both at once.
//!
//! The file has no name, is written over and over and read whole, in runs as long as the pager's longest, from and to
//! as much memory, so that no run is found in the processor's cache; the memory in huge frames where the system has
//! them, and the runs by as many threads as is fastest, of one, two and four. A first pass gives the file its space and
//! is not counted; of those that follow the median is. Through the system's cache that is the speed of copies, as long
//! as the cache has room; directly, the medium's.
//!
//! Then, beside the work, a quarter of the file is moved again each time that somebody asks how fast the disk is now.

use crate::meter::median;
use crate::work::Failure;
use rankfold_pager::{Allocation, FileOptions, Limit, Options, Pager};
use serde_json::{Value, json};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Instant;

/// Pages of a run: the pager's most.
const RUN: usize = 32;
/// Passes that are counted.
const PASSES: usize = 5;
/// Threads that read, or write, at once.
const THREADS: [usize; 3] = [1, 2, 4];

/// Bytes a second.
#[derive(Clone, Copy)]
pub struct Rates {
    pub write: f64,
    pub read: f64,
    /// Written and read together, as many bytes each way.
    pub both: f64,
}

impl Rates {
    /// Seconds for so many bytes each way: those that can go both ways at once, and the rest; or one way after the
    /// other, where that is faster.
    pub fn seconds(&self, written: f64, read: f64) -> f64 {
        let paired = written.min(read);
        let together = 2.0 * paired / self.both + (written - paired) / self.write + (read - paired) / self.read;
        together.min(written / self.write + read / self.read)
    }
}

/// What the disk can do.
pub struct Disk {
    buffered: Rates,
    /// Where the file system can.
    unbuffered: Option<Rates>,
    /// As the pager uses it.
    pub probe: Probe,
}

impl Disk {
    /// Measured in the pager's folder over `bytes` of a file.
    pub fn measure(file: &FileOptions, page: usize, bytes: usize) -> Result<Self, Failure> {
        let bytes = bytes.next_multiple_of(8 * RUN * page);
        let measured = |direct| -> Result<(Probe, Rates), Failure> {
            let mut probe = Probe::new(&file.folder, direct, page, bytes)?;
            let rates = probe.measure()?;
            Ok((probe, rates))
        };
        let without = |why| format!("direct I/O in {}: {why}; --buffered does without", file.folder.display());
        let (probe, buffered, unbuffered) = match file.direct {
            true => {
                let (probe, rates) = measured(true).map_err(without)?;
                (probe, measured(false)?.1, Some(rates))
            }
            false => {
                let (probe, rates) = measured(false)?;
                (probe, rates, measured(true).ok().map(|(_, rates)| rates))
            }
        };
        Ok(Self { buffered, unbuffered, probe })
    }

    pub fn json(&self) -> Value {
        let rates = |rates: Rates| json!({ "write": rates.write, "read": rates.read, "both": rates.both });
        json!({ "run": self.probe.run, "buffered": rates(self.buffered), "direct": self.unbuffered.map(rates) })
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the disk in runs of {} MiB", self.probe.run as f64 / (1 << 20) as f64)?;
        for (name, rates) in [("buffered", Some(self.buffered)), ("direct", self.unbuffered)] {
            match rates.map(|Rates { write, read, both }| [write, read, both].map(|rate| rate * 1e-9)) {
                Some([write, read, both]) => {
                    write!(f, "; {name}: write {write:.2}, read {read:.2}, both at once {both:.2} GB/s")?;
                }
                None => write!(f, "; {name}: not in this folder")?,
            }
        }
        Ok(())
    }
}

/// A file and memory to move to it and from it.
pub struct Probe {
    pub file: File,
    pub memory: Allocation,
    /// Bytes of a page, and of a run.
    pub page: usize,
    pub run: usize,
    /// With how many threads it writes, reads, and does both (each way as many), fastest.
    pub threads: [usize; 3],
}

impl Probe {
    fn new(folder: &Path, direct: bool, page: usize, bytes: usize) -> Result<Self, Failure> {
        let flags = libc::O_TMPFILE | if direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(folder)?;
        // Addresses that are good for direct I/O, and huge frames.
        let mut memory = Pager::new(Options::new(Limit::Pages(usize::MAX), None))?.alloc(bytes)?;
        memory.pin_mut(0..bytes)?.fill(1);
        Ok(Self { file, memory, page, run: RUN * page, threads: [1; 3] })
    }

    /// All of the file, with as many threads as is fastest.
    fn measure(&mut self) -> Result<Rates, Failure> {
        let bytes = self.memory.bytes();
        let mut rates = [0.0; 3];
        for (way, rate) in rates.iter_mut().enumerate() {
            for threads in THREADS {
                self.pass(way, bytes, threads)?;
                let seconds = (0..PASSES).map(|_| self.pass(way, bytes, threads)).collect::<Result<Vec<_>, _>>();
                let found = bytes as f64 / median(&mut seconds?);
                if found > *rate {
                    (*rate, self.threads[way]) = (found, threads);
                }
            }
        }
        let [write, read, both] = rates;
        Ok(Rates { write, read, both })
    }

    /// What the disk can do now: a quarter of the file, once, with as many threads as was fastest.
    pub fn rates(&mut self) -> Result<Rates, Failure> {
        let bytes = self.memory.bytes() / 4;
        let mut rate = |way| self.pass(way, bytes, self.threads[way]).map(|seconds| bytes as f64 / seconds);
        Ok(Rates { write: rate(0)?, read: rate(1)?, both: rate(2)? })
    }

    /// Seconds to write so many bytes, to read them, or to write half of them and read the other half.
    fn pass(&mut self, way: usize, bytes: usize, threads: usize) -> Result<f64, Failure> {
        let (file, run) = (&self.file, self.run);
        let write = |run: &mut [u8], at| file.write_all_at(run, at);
        let read = |run: &mut [u8], at| file.read_exact_at(run, at);
        let mut memory = self.memory.pin_mut(0..bytes)?;
        let begun = Instant::now();
        match way {
            0 => each(&mut memory, threads, 0, &write, run)?,
            1 => each(&mut memory, threads, 0, &read, run)?,
            _ => {
                let half = bytes / 2;
                let (one, other) = memory.split_at_mut(half);
                thread::scope(|scope| {
                    let writer = scope.spawn(|| each(one, threads, 0, &write, run));
                    each(other, threads, half, &read, run)?;
                    writer.join().map_err(|_| io::Error::other("the writer panicked"))?
                })?;
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// Move `bytes`, which lie in the file from `from` on, run by run and by several threads, each a part of them.
fn each(
    bytes: &mut [u8],
    threads: usize,
    from: usize,
    go: &(dyn Fn(&mut [u8], u64) -> io::Result<()> + Sync),
    run: usize,
) -> io::Result<()> {
    let part = bytes.len() / threads;
    thread::scope(|scope| {
        let parts = bytes.chunks_mut(part).zip((from..).step_by(part));
        let movers: Vec<_> = parts
            .map(|(bytes, from)| {
                let mut runs = bytes.chunks_mut(run).zip((from..).step_by(run));
                scope.spawn(move || runs.try_for_each(|(bytes, at)| go(bytes, at as u64)))
            })
            .collect();
        let mut joined = movers.into_iter().map(|mover| mover.join());
        joined.try_for_each(|moved| moved.map_err(|_| io::Error::other("a mover panicked"))?)
    })
}
