//! What can go wrong below the contract: on the way to a device, and in a kernel that is watched.

use crate::Site;
use std::fmt;

/// The result of a driver.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a driver, or the checker behind the host's, has to say.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // of the fields: each message names its own
pub enum Error {
    /// A launch of what `kernels/` does not define.
    #[error("no kernel is called '{name}'")]
    UnknownKernel { name: String },
    /// A launch whose arguments are not the kernel's.
    #[error("{kernel}: called with arguments '{found}', expected '{expected}'")]
    Arguments { kernel: &'static str, expected: String, found: String },
    /// A launch that no device runs.
    #[error("{kernel}: {why}")]
    Geometry { kernel: &'static str, why: String },
    /// Two accesses of one byte, one of them a write, in no order.
    #[error("{kernel}: race on {place}: {second}; {first}, with no barrier between")]
    Race { kernel: &'static str, place: Place, second: Box<Access>, first: Box<Access> },
    /// An access beside every allocation, or beyond the array it belongs to.
    #[error("{kernel}: {access}, out of bounds: {place}")]
    OutOfBounds { kernel: &'static str, place: Place, access: Box<Access> },
    /// A read of what nobody wrote.
    #[error("{kernel}: {access}: {place} was never written")]
    Uninitialised { kernel: &'static str, place: Place, access: Box<Access> },
    /// An access of the host's own memory.
    #[error("{kernel}: {access}: {address:#x} is the host's memory, not the device's")]
    HostPointer { kernel: &'static str, address: usize, access: Box<Access> },
    /// Threads that wait for each other at different places, or for threads that have returned.
    #[error("{kernel}: block {block} cannot go on: {waiting}")]
    Divergence { kernel: &'static str, block: u32, waiting: String },
    /// Memory that the device does not have.
    #[error("{}", rankfold_backend::Error::DeviceMemory { asked: *asked, free: *free })]
    OutOfMemory { asked: usize, free: usize },
    /// Memory that the device would have, if what is paged could leave.
    #[error("{asked} bytes of device memory were asked for, {free} are free, and what could make room cannot: {why}")]
    NoRoom { asked: usize, free: usize, why: String },
    /// A device, or what it needs, that is not there.
    #[error("{0}")]
    Missing(String),
    /// A kernel that does not compile.
    #[error("kernels/{file}.cu does not compile: {log}")]
    Compile { file: String, log: String },
    /// An error of the device or of its libraries.
    #[error("{call}: {what}")]
    Device { call: &'static str, what: String },
}

/// Where in a device's memory: a shared array's byte, or an address of global memory.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// A byte of a shared array.
    Shared {
        /// The array's name in the source.
        array: String,
        /// Which byte of it.
        byte: usize,
    },
    /// A byte of shared memory that belongs to no array.
    SharedGap,
    /// A byte of an allocation.
    Global {
        /// The allocation's first address.
        allocation: usize,
        /// Its bytes.
        bytes: usize,
        /// Which byte, counted from the first.
        byte: isize,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared { array, byte } => write!(f, "'{array}' byte {byte}"),
            Self::SharedGap => write!(f, "shared memory between its arrays"),
            Self::Global { allocation, bytes, byte } => {
                write!(f, "byte {byte} of the {bytes} bytes at {allocation:#x}")
            }
        }
    }
}

/// Who did what where.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    /// The block's index in its grid.
    pub block: u32,
    /// The thread's index in its block.
    pub thread: u32,
    /// Whether it wrote.
    pub write: bool,
    /// The line.
    pub site: Site,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.write { "writes" } else { "reads" };
        write!(f, "thread {} of block {} {verb} at {}", self.thread, self.block, self.site)
    }
}

impl From<Error> for rankfold_backend::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::OutOfMemory { asked, free } => Self::DeviceMemory { asked, free },
            error => Self::Device { backend: crate::NAME, what: error.to_string() },
        }
    }
}
