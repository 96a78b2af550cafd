//! The CUDA backend: the kernels of `kernels/`, run on a GPU or, from the same source, on the host.
//!
//! In reading order:
//! - `driver`: the seam, one small trait between launch code and a device, and `gemm`, its dense products;
//! - [`gpu`]: a GPU behind it, through cudarc;
//! - [`host`]: the kernels in fibres, with seeded schedules and a checker;
//! - `kernels`: the table of sources and entry points that `build.rs` writes;
//! - `backend`, `call`, and in `ops` a file an operation: launch code, the contract's kernels in terms of the seam's;
//! - `memory`, `paging`, `pool`: what is behind buffers, how the device's memory is paged, and how much of it;
//! - [`Crossover`]: which kernel a product with a 4-bit weight is given.

mod backend;
mod call;
mod crossover;
mod driver;
mod error;
mod gemm;
pub mod gpu;
#[cfg(host_kernels)]
pub mod host;
mod kernels;
mod memory;
mod ops;
mod paging;
mod pool;
mod site;
mod tables;

pub use backend::CudaBackend;
pub use crossover::Crossover;
pub use driver::{Argument, Driver, Event, Gemm, Launch, PagedMemory, Transposition};
pub use error::{Access, Error, Place, Result};
pub use kernels::{HEADERS, SOURCES, Source};
pub use paging::{DevicePager, Reservation, Vmm};
pub use site::Site;

/// This backend's name in errors.
pub(crate) const NAME: &str = "cuda";
