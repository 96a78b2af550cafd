//! A limit on the memory of a run, kept by paging to a file.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::options::{Options, PageIo};
use crate::show::bytes;
use rankfold_pager::{FileOptions, Limit, Pager, ProcessLimit, Stats};
use rankfold_trainer::plan::RESERVE;
use std::env::temp_dir;

/// The pager of a run that has a limit: `--memory-limit`, or for a paged optimiser what the machine has left.
///
/// Errors: a device whose memory is not paged; a limit that the process is beyond already; a folder that cannot have the
/// file.
pub fn pager(options: &Options) -> Result<Option<Pager>> {
    let is_paged = options.optimizer.unwrap_or_default().is_paged();
    let limit = match (&options.memory_limit, available()) {
        (Some(limit), _) => limit.bytes(),
        (None, Some(available)) if is_paged => available,
        _ => return Ok(None),
    };
    let device = options.device.unwrap_or_default();
    if device != Device::Cpu {
        if options.memory_limit.is_some() {
            return Err(Error::Usage("--memory-limit: only the cpu's memory is paged".into()));
        }
        tracing::warn!("only the cpu's memory is paged: the optimiser's states stay where they are");
        return Ok(None);
    }
    let file = FileOptions {
        folder: options.page_folder.clone().unwrap_or_else(temp_dir),
        direct: options.page_io.unwrap_or_default() == PageIo::Direct,
        capacity: u64::MAX,
    };
    let process = ProcessLimit::new(limit as usize, RESERVE as usize);
    let pages = rankfold_pager::Options {
        page: page(limit),
        ..rankfold_pager::Options::new(Limit::Process(process), Some(file))
    };
    Ok(Some(Pager::new(pages)?))
}

/// Bytes of a page: the larger, the fewer buffers are large enough to be paged; the smaller, the more pages to keep the
/// books of. So that a limit is some thousands of them.
fn page(limit: u64) -> usize {
    (limit / 8192).next_power_of_two().clamp(64 << 10, 4 << 20) as usize
}

/// Memory that the machine could give, where the system tells.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What paging came to.
pub fn summary(stats: &Stats) -> String {
    let Stats { stored, loaded, faults, hits, stall, high_water, .. } = stats;
    if *stored == 0 {
        return format!("nothing was paged: {} of buffers at the most", bytes(*high_water as u64));
    }
    let share = 100.0 * *faults as f64 / (hits + faults).max(1) as f64;
    format!(
        "paged: {} written, {} read, {share:.1} % of the pages waited for, {:.1} s in all",
        bytes(*stored),
        bytes(*loaded),
        stall.as_secs_f64()
    )
}
