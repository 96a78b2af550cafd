//! Everything that can be wrong with a pager.

use std::io;
use std::path::PathBuf;

/// The result of a call of the pager.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, and what was expected. All sizes are bytes.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A page size that the pager does not have.
    #[error("a page of {found} bytes: expected a power of two from 65536 to 4194304")]
    PageSize { found: usize },
    /// A tier too small to hold a page.
    #[error("a capacity of {found} bytes: expected at least a page, {page}")]
    Capacity { found: usize, page: usize },
    /// A range beyond its allocation.
    #[error("bytes {start}..{end} were asked of an allocation of {available}")]
    Range { start: usize, end: usize, available: usize },
    /// More than the tier has free, and nothing in it may leave.
    #[error(
        "out of memory: {asked} bytes were asked for; of a capacity of {capacity}, {pinned} are pinned and {free} free"
    )]
    Full { asked: usize, pinned: usize, free: usize, capacity: usize },
    /// The same, because the tier below cannot take what would leave.
    #[error(
        "out of memory: {asked} bytes were asked for; of a capacity of {capacity}, {pinned} are pinned and {free} \
         free, and what could leave cannot: {source}"
    )]
    Stuck { asked: usize, pinned: usize, free: usize, capacity: usize, source: Box<Error> },
    /// Address space that the system does not grant.
    #[error("{bytes} bytes of address space could not be reserved: {source}")]
    Address { bytes: usize, source: io::Error },
    /// The file tier's file.
    #[error("{}: cannot {action}: {source}", path.display())]
    File { path: PathBuf, action: &'static str, source: io::Error },
    /// More than the file tier may hold.
    #[error("{}: the file tier is full: {asked} bytes were asked for, {free} of {capacity} are free", path.display())]
    FileFull { path: PathBuf, asked: u64, free: u64, capacity: u64 },
    /// A disk that has no room for the file tier's pages.
    #[error(
        "{}: the disk is full: {asked} bytes of pages were to be written to a file in it, {free} are free",
        path.display()
    )]
    DiskFull { path: PathBuf, asked: u64, free: u64 },
    /// A page that the file tier does not hold: it was never stored, or storing it failed.
    #[error("{}: the page at byte {position} is not stored", path.display())]
    NotStored { path: PathBuf, position: u64 },
    /// A page that came back other than it went.
    #[error(
        "{}: the page at byte {position} came back damaged: its checksum is {found:08x}, expected {expected:08x}",
        path.display()
    )]
    Damaged { path: PathBuf, position: u64, expected: u32, found: u32 },
    /// A page that must leave, and nowhere to go.
    #[error("there is no file for pages that do not fit")]
    NoTier,
    /// A device behind the pager.
    #[error("{device}: {what}")]
    Device { device: &'static str, what: String },
}
