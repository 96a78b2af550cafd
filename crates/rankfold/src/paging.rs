//! A limit on the memory of a run, kept by paging: of the process, to a file; of a device with memory of its own, to
//! the process's memory and from there to the file.

use crate::choices::PageIo;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::available;
use crate::options::Options;
use crate::show::bytes;
use crate::size::Size;
use rankfold_cuda::{CudaBackend, DevicePager};
use rankfold_pager::{FileOptions, Limit, Pager, ProcessLimit, Stats};
use rankfold_trainer::plan::{PAGES, Plan, RESERVE};
use rankfold_trainer::traffic::Traffic;
use std::env::temp_dir;

/// The tiers of a run that has a limit.
#[derive(Debug)]
pub struct Tiers {
    /// The process's memory over a file.
    pub host: Pager,
    /// The most of the device's memory; all that it has free where not said. For devices with memory of their own.
    pub device: Option<u64>,
}

/// What is paged: the process's memory, or a device's.
#[derive(Debug)]
pub enum Paged {
    /// The process's buffers.
    Host(Pager),
    /// A device's, with the host's tier below it.
    Device(DevicePager),
}

/// The tiers of a run that has a limit: `--memory-limit`, or for a paged optimiser what the machine, or the device, has
/// left.
///
/// Errors: a device whose memory is not paged; a system that does not tell what memory a process has; a limit that
/// leaves no room beside what this one has already; a folder that cannot have the file, or whose disk has no room for
/// what the plan says is paged.
pub fn tiers(options: &Options, plan: &Plan) -> Result<Option<Tiers>> {
    let is_paged = options.optimizer.unwrap_or_default().is_paged();
    let asked = options.memory_limit.as_ref().map(Size::bytes);
    if asked.is_none() && !is_paged {
        return Ok(None);
    }
    let device = options.device.unwrap_or_default();
    let (of_the_process, of_the_device) = match device {
        Device::Cpu => (of_the_process(options), None),
        Device::Cuda | Device::CudaHost => (Some(available().unwrap_or(u64::MAX)), asked),
        Device::Reference if asked.is_some() => {
            return Err(Error::Usage("--memory-limit: the reference's memory is not paged".into()));
        }
        Device::Reference => {
            tracing::warn!("the reference's memory is not paged: the optimiser's states stay where they are");
            return Ok(None);
        }
    };
    let Some(limit) = of_the_process else {
        tracing::warn!("the system does not tell what memory is free: the optimiser's states stay where they are");
        return Ok(None);
    };
    let file = FileOptions {
        folder: options.page_folder.clone().unwrap_or_else(temp_dir),
        direct: options.page_io.unwrap_or_default() == PageIo::Direct,
        capacity: u64::MAX,
    };
    let process = ProcessLimit::new(limit as usize, RESERVE as usize);
    // The least pages divide any frame of a device.
    let mut page = PAGES[0];
    if !device.has_memory_of_its_own() {
        let taken = process.beside().ok_or_else(|| {
            let why = "/proc/self/statm, which says what memory the process has, cannot be read";
            Error::Usage(format!("--memory-limit, or a paged optimiser: {why}: expected neither on this system"))
        })?;
        page = plan.page(limit, taken as u64)?;
    }
    let page = page as usize;
    let pages =
        rankfold_pager::Options { page, ..rankfold_pager::Options::new(Limit::Process(process), Some(file.clone())) };
    let host = Pager::new(pages)?;
    if !device.has_memory_of_its_own() {
        has_room(&file, plan.under(limit)?.paged.sum())?;
    }
    Ok(Some(Tiers { host, device: of_the_device }))
}

/// That the file can take `needed` bytes, which is what is out of memory at the peak. (Copies of what is in memory may lie
/// in it besides.)
fn has_room(file: &FileOptions, needed: u64) -> Result<()> {
    let free = file.free();
    if needed <= free {
        return Ok(());
    }
    let (free, needed) = (bytes(free), bytes(needed));
    let why = format!(
        "{free} are free on its disk, and under this memory limit about {needed} are paged to a file in it: expected a \
         higher --memory-limit or another --page-folder"
    );
    Err(Error::Path { path: file.folder.clone(), why })
}

impl Tiers {
    /// A device with memory of its own on its tiers.
    ///
    /// Errors: a limit below a frame of the device's.
    pub fn under(self, device: CudaBackend) -> Result<CudaBackend> {
        // A sixteenth is left at the least: for the kernels' code, and for what lies between allocations.
        let free = device.driver().free_memory();
        let all = free - free / 16;
        let limit = self.device.map_or(all, |limit| all.min(limit as usize));
        Ok(device.on_pager(self.host, limit)?)
    }
}

impl Paged {
    /// What was paged so far: of a device's tiers, into the device's memory and out of it.
    pub fn traffic(&self) -> Traffic {
        let stats = match self {
            Self::Host(pager) => pager.stats(),
            Self::Device(pager) => pager.stats(),
        };
        let (paged_in, paged_out) = (stats.loaded, stats.stored);
        Traffic { paged_in, paged_out, stall_seconds: stats.stall.as_secs_f64() }
    }

    /// What paging came to.
    pub fn summary(&self) -> String {
        match self {
            Self::Host(pager) => summary(&pager.stats()),
            Self::Device(pager) => {
                let (device, host) = (pager.stats(), pager.memory().host().stats());
                format!("the device's memory: {}; the host's: {}", summary(&device), summary(&host))
            }
        }
    }
}

/// The limit on the process: the one asked for, or for a paged optimiser what the machine could give; none where neither
/// is, or the device has memory of its own.
pub fn of_the_process(options: &Options) -> Option<u64> {
    let is_paged = options.optimizer.unwrap_or_default().is_paged();
    let asked = options.memory_limit.as_ref().map(Size::bytes);
    let limit = asked.or_else(|| available().filter(|_| is_paged));
    limit.filter(|_| !options.device.unwrap_or_default().has_memory_of_its_own())
}

fn summary(stats: &Stats) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_tier_too_small_for_what_is_paged_is_refused_with_its_folder_and_both_sizes() {
        let file = |capacity| FileOptions { folder: temp_dir(), direct: false, capacity };
        has_room(&file(3 << 20), 3 << 20).unwrap();
        let refused = has_room(&file(3 << 20), 5 << 20).unwrap_err().to_string();
        for words in [temp_dir().to_str().unwrap(), "3.00 MiB are free", "5.00 MiB are paged"] {
            assert!(refused.contains(words), "'{words}' is not in: {refused}");
        }
        // Without a capacity, what the disk has: some, but no disk has all.
        has_room(&file(u64::MAX), 1).unwrap();
        has_room(&file(u64::MAX), u64::MAX).unwrap_err();
    }
}
