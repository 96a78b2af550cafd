//! The seam between launch code and a device: one small trait, two implementations.

use crate::Result;
use rankfold_backend::DType;
use std::fmt;
use std::time::Duration;

/// A device that holds memory and runs kernels in the order in which they are launched.
///
/// Addresses are the device's own; 0 is none.
pub trait Driver: PagedMemory + fmt::Debug + Send + Sync {
    /// For messages: "host", or the device's name.
    fn name(&self) -> String;

    /// The address of `bytes` bytes of unspecified value, aligned to 256; an error says what is free.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Gives back what [`Driver::alloc`] gave.
    fn free(&self, address: u64);

    /// Bytes that [`Driver::alloc`] and [`PagedMemory::map`] could still give.
    fn free_memory(&self) -> usize;

    /// Gives what was freed and is kept back to the system, after everything that was launched before.
    fn trim(&self) -> Result<()>;

    /// Host bytes to the device.
    fn upload(&self, bytes: &[u8], to: u64) -> Result<()>;

    /// Bytes of the device to the host, after everything that was launched before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Bytes from one place of the device to another, which do not overlap.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// The most shared memory that a block may have, static and dynamic: 227 KiB on an H100, 99 KiB on a GeForce.
    fn shared_memory(&self) -> usize;

    /// Starts a kernel.
    fn launch(&self, launch: &Launch) -> Result<()>;

    /// A dense product: the vendor's where there is one.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Waits for everything that was launched; an error of any of it is found here at the latest.
    fn synchronize(&self) -> Result<()>;

    /// A point in the order of launches.
    fn record(&self) -> Result<Event>;

    /// The time between two points, waiting for both.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration>;
}

/// Addresses of a device that have memory behind them by whole frames, as long as they need it.
///
/// Kernels touch only what is mapped. Addresses and lengths are multiples of a frame.
pub trait PagedMemory {
    /// Bytes of a frame.
    fn frame(&self) -> Result<usize>;

    /// Addresses without memory.
    fn reserve(&self, bytes: usize) -> Result<u64>;

    /// Gives back what [`PagedMemory::reserve`] gave, of which nothing is mapped.
    fn unreserve(&self, address: u64, bytes: usize);

    /// Puts memory of unspecified value behind reserved addresses that have none; where it fails, they have none still.
    fn map(&self, address: u64, bytes: usize) -> Result<()>;

    /// Takes it back, after everything that was launched before has run: one allocation's, all of it mapped.
    fn unmap(&self, address: u64, bytes: usize);

    /// Host bytes to mapped addresses that nothing launched touches; it may overtake what was launched.
    fn page_in(&self, bytes: &[u8], to: u64) -> Result<()>;

    /// Bytes of mapped addresses, which nothing launched later writes, to the host: as everything launched before
    /// leaves them. What is launched meanwhile may run meanwhile.
    fn page_out(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
}

/// A point in the order of a driver's launches.
pub type Event = Box<dyn std::any::Any + Send + Sync>;

/// A kernel with its geometry and arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The entry point's name.
    pub kernel: &'static str,
    /// Blocks, in three dimensions.
    pub grid: [u32; 3],
    /// Threads a block: whole warps.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// In the order of the kernel's parameters.
    pub arguments: &'a [Argument],
}

/// A value of a kernel's parameter, and its type as `host/thunk.h` spells it.
#[derive(Clone, Copy, PartialEq)]
pub struct Argument {
    /// `*` for an address that is written through, `&` for one that is only read through, 0 for a value.
    prefix: u8,
    letter: u8,
    /// The value in its lowest bytes.
    bits: u64,
}

const fn letter(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => b'f',
        DType::F64 => b'd',
        DType::Bf16 => b'b',
        DType::F16 => b'h',
        DType::U8 => b'c',
        DType::U32 => b'u',
        DType::I64 => b'l',
    }
}

impl Argument {
    /// An address that the kernel reads elements of this type from; 0 where there are none.
    pub fn input(dtype: DType, address: u64) -> Self {
        Self { prefix: b'&', letter: letter(dtype), bits: address }
    }

    /// An address that the kernel writes elements of this type to; 0 where they are not asked for.
    pub fn output(dtype: DType, address: u64) -> Self {
        Self { prefix: b'*', letter: letter(dtype), bits: address }
    }

    /// An output of bits that stand for elements of any type of this many bytes.
    pub fn output_bits(size: usize, address: u64) -> Self {
        Self { letter: Self::bits(size, 0).letter, ..Self::output(DType::U8, address) }
    }

    /// An output of 64-bit counters.
    pub fn counters(address: u64) -> Self {
        Self::output_bits(8, address)
    }

    /// The bits of a value of 1, 2, 4 or 8 bytes.
    pub fn bits(size: usize, bits: u64) -> Self {
        let letter = match size {
            1 => b'c',
            2 => b's',
            4 => b'u',
            _ => b'q',
        };
        Self { prefix: 0, letter, bits }
    }

    /// The value's bits.
    pub fn value(&self) -> u64 {
        self.bits
    }

    /// Types of several arguments as one word.
    pub fn types(arguments: &[Self]) -> String {
        let letters = arguments.iter().flat_map(|argument| [argument.prefix, argument.letter]);
        letters.filter(|letter| *letter != 0).map(char::from).collect()
    }
}

impl fmt::Debug for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:#x}", Self::types(&[*self]), self.bits)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self { prefix: 0, letter: b'f', bits: value.to_bits().into() }
    }
}

impl From<f64> for Argument {
    fn from(value: f64) -> Self {
        Self { prefix: 0, letter: b'd', bits: value.to_bits() }
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::bits(4, value.into())
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::bits(8, value)
    }
}

/// How the inputs of a [`Gemm`] are stored, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transposition {
    /// a [m, k] · b [k, n]
    Nn,
    /// a [m, k] · b [n, k]ᵀ
    Nt,
    /// a [k, m]ᵀ · b [k, n]
    Tn,
}

/// c [m, n] = alpha·a·b + beta·c, sums and c in f32; beta is 0 or 1, and where it is 0 c is not read.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
    /// How a and b are stored.
    pub transposition: Transposition,
    /// The type of a and b: f32 or bf16.
    pub dtype: DType,
    /// Addresses of a, b and c.
    pub a: u64,
    /// The second factor.
    pub b: u64,
    /// The result.
    pub c: u64,
    /// The product's factor.
    pub alpha: f32,
    /// Whether the product is added to c.
    pub accumulate: bool,
}
