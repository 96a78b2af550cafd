//! Paged memory: allocations that never move, whose pages go to a slower tier when memory runs short, and come back.
//!
//! An [`Allocation`] reserves contiguous addresses. Its pages have frames while they are pinned ([`Allocation::pin`]),
//! and as long after as nobody else needs the frames more; then they are written to the tier below and the frames given
//! back. The addresses stay, so that who has a pin sees a plain slice.
//!
//! ```
//! use rankfold_pager::{FileOptions, Limit, Options, Pager};
//!
//! # fn main() -> rankfold_pager::Result<()> {
//! let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
//! // 1 MiB in memory at once, in pages of 64 KiB; what does not fit lies in the file.
//! let pager = Pager::new(Options { page: 64 << 10, ..Options::new(Limit::Pages(1 << 20), Some(file)) })?;
//! let mut layers = (0..8).map(|_| pager.alloc(1 << 20)).collect::<Result<Vec<_>, _>>()?;
//! for (i, layer) in layers.iter_mut().enumerate() {
//!     layer.pin_mut(0..1 << 20)?.fill(i as u8);
//! }
//! assert_eq!(layers[3].pin(1000..1004)?[..], [3; 4]);
//! let stats = pager.stats();
//! assert!(stats.resident <= 1 << 20 && stats.away >= 7 << 20);
//! # Ok(())
//! # }
//! ```
//!
//! In reading order:
//! - [`memory`](Memory), `space`, `frames`, `host`: the memory behind a pager, and the host's: address space over a file;
//! - `file`, `extents`: pages in a file, each with its checksum;
//! - `forecast`: which page is needed when, and so which may leave;
//! - `table`, `core`, `room`: the books, and how pages come and go; `limit`: how many may stay;
//! - `worker`: the threads that bring pages in ahead of their use;
//! - [`device`](OnHost): a device's memory over a pager of the host's, three tiers; [`Simulated`], one that is not there;
//! - [`handle`](Pager): pagers, allocations, pins; [`Stats`]; [`Error`].

mod core;
mod device;
mod error;
mod extents;
mod file;
mod forecast;
mod frames;
#[cfg(test)]
mod guarded;
mod handle;
mod heap;
mod host;
mod limit;
mod memory;
mod room;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;
mod simulated;
mod space;
mod stats;
mod sync;
mod table;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
mod worker;

pub use core::BOOKS;
pub use device::{Device, DeviceRegion, OnHost};
pub use error::{Error, Result};
pub use file::{FileFigures, FileOptions, STAGE};
pub use handle::{Access, Allocation, Hold, Options, PAGES, Pager, Pin, PinMut};
pub use heap::give_back_what_is_freed;
pub use host::{Host, HostRegion};
pub use limit::{Limit, ProcessLimit};
pub use memory::Memory;
pub use simulated::{Frames, Simulated};
pub use stats::Stats;
