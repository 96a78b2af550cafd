//! The file tier: pages in one sparse file, each with a checksum that is kept in memory.
//!
//! Read [`extents`] (who has which addresses of the file), then [`tier`] (what is stored there, and what a failure
//! leaves), then [`disk`] (the file itself: made without a name, written directly or through the system's cache) and
//! [`staged`] (small frames on their way to it and back).

mod disk;
#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) mod faulty;
mod staged;
mod tier;

pub use staged::STAGE;
pub(crate) use tier::FileTier;
pub use tier::{FileFigures, FileOptions};
