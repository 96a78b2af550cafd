//! The limit of the disk: bytes a second into a file as the pager's, out of it, and both at once.
//!
//! The file has no name, is written over and over and read whole, in runs as long as the pager's longest, from and to as
//! much memory, so that no run is found in the processor's cache; the memory in huge frames where the system has them,
//! and the runs by as many threads as is fastest, of one, two and four. A first pass gives the file its space and is not
//! counted; of those that follow the median is. Through the system's cache that is the speed of copies, as long as the
//! cache has room; directly, the medium's.

use crate::meter::median;
use crate::work::Failure;
use rankfold_pager::{FileOptions, Limit, Options, Pager};
use serde_json::{Value, json};
use std::fmt;
use std::fs::OpenOptions;
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
    /// Seconds for so many bytes each way: those that can go both ways at once, and the rest; or one way after the other,
    /// where that is faster.
    fn seconds(&self, written: f64, read: f64) -> f64 {
        let paired = written.min(read);
        let together = 2.0 * paired / self.both + (written - paired) / self.write + (read - paired) / self.read;
        together.min(written / self.write + read / self.read)
    }
}

/// What the disk can do.
pub struct Disk {
    direct: bool,
    run: usize,
    buffered: Rates,
    /// Where the file system can.
    unbuffered: Option<Rates>,
}

impl Disk {
    /// Measured in the pager's folder over `bytes` of a file.
    pub fn measure(file: &FileOptions, page: usize, bytes: usize) -> Result<Self, Failure> {
        let run = RUN * page;
        let rates = |direct| rates(&file.folder, direct, run, bytes.next_multiple_of(8 * run));
        let unbuffered = match rates(true) {
            Err(why) if file.direct => return Err(why),
            measured => measured.ok(),
        };
        Ok(Self { direct: file.direct, run, buffered: rates(false)?, unbuffered })
    }

    /// Seconds that it needs for what the pager moved.
    pub fn seconds(&self, written: f64, read: f64) -> f64 {
        self.unbuffered.filter(|_| self.direct).unwrap_or(self.buffered).seconds(written, read)
    }

    pub fn json(&self) -> Value {
        let rates = |rates: Rates| json!({ "write": rates.write, "read": rates.read, "both": rates.both });
        json!({ "run": self.run, "buffered": rates(self.buffered), "direct": self.unbuffered.map(rates) })
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the disk in runs of {} MiB", self.run as f64 / (1 << 20) as f64)?;
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

fn rates(folder: &Path, direct: bool, run: usize, bytes: usize) -> Result<Rates, Failure> {
    let flags = libc::O_TMPFILE | if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(folder)?;
    // Addresses that are good for direct I/O, and huge frames.
    let mut memory = Pager::new(Options::new(Limit::Pages(usize::MAX), None))?.alloc(bytes)?;
    let mut memory = memory.pin_mut(0..bytes)?;
    memory.fill(1);
    let half = bytes / 2;
    let seconds = |pass: &mut dyn FnMut() -> io::Result<()>| -> io::Result<f64> {
        let mut times = Vec::new();
        for _ in 0..=PASSES {
            let begun = Instant::now();
            pass()?;
            times.push(begun.elapsed().as_secs_f64());
        }
        Ok(median(&mut times[1..]))
    };
    let best = |pass: &mut dyn FnMut(usize) -> io::Result<()>| -> io::Result<f64> {
        THREADS.iter().try_fold(f64::INFINITY, |best, threads| Ok(best.min(seconds(&mut || pass(*threads))?)))
    };
    let write_all = best(&mut |threads| each(&mut memory, threads, 0, &|run, at| file.write_all_at(run, at), run))?;
    let read_all = best(&mut |threads| each(&mut memory, threads, 0, &|run, at| file.read_exact_at(run, at), run))?;
    let both = best(&mut |threads| {
        let (one, other) = memory.split_at_mut(half);
        thread::scope(|scope| {
            let writer = scope.spawn(|| each(one, threads, 0, &|run, at| file.write_all_at(run, at), run));
            each(other, threads, half, &|run, at| file.read_exact_at(run, at), run)?;
            writer.join().map_err(|_| io::Error::other("the writer panicked"))?
        })
    })?;
    let rate = |seconds: f64| bytes as f64 / seconds;
    Ok(Rates { write: rate(write_all), read: rate(read_all), both: rate(both) })
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
