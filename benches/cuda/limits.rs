//! What the device can do: copy its memory, multiply dense matrices, start a kernel. And dense products of any shape,
//! for those in 4 bits to stand beside.

use crate::meter::{Case, Meter};
use crate::sizes::{Numbers, Sizes, count};
use rankfold_backend::{Backend, DType, Result};
use rankfold_cuda::{CudaBackend, Driver, Gemm, Transposition};

/// Device memory by address, given back when it is dropped.
struct Memory<'a> {
    driver: &'a dyn Driver,
    address: u64,
}

impl<'a> Memory<'a> {
    fn new(driver: &'a dyn Driver, bytes: usize) -> Result<Self> {
        Ok(Self { driver, address: driver.alloc(bytes)? })
    }

    /// Full of these bytes, over and over.
    fn of(driver: &'a dyn Driver, pattern: &[u8], bytes: usize) -> Result<Self> {
        let memory = Self::new(driver, bytes)?;
        let mut full = pattern.len().min(bytes);
        driver.upload(&pattern[..full], memory.address)?;
        while full < bytes {
            let more = full.min(bytes - full);
            driver.copy(memory.address, memory.address + full as u64, more)?;
            full += more;
        }
        Ok(memory)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// The copy, the dense products of both types, and the launch of next to nothing.
pub fn measure(backend: &CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    let (driver, bytes) = (backend.driver(), sizes.copy_bytes);
    let (from, to) = (Memory::of(driver, &numbers.bytes(DType::F32), bytes)?, Memory::new(driver, bytes)?);
    let case = Case::new("copy", count(bytes)).bytes(2 * bytes);
    let seconds = meter.measure(driver, case, |_| Ok(driver.copy(from.address, to.address, bytes)?));
    meter.limits.copy = seconds.map(|seconds| 2.0 * bytes as f64 / seconds);
    drop((from, to));

    for &n in sizes.sides {
        for dtype in [DType::Bf16, DType::F32] {
            let product = Dense::new(driver, numbers, dtype, Transposition::Nt, [n, n, n], 1)?;
            let case = Case::new("gemm", format!("{n}x{n}x{n}"));
            let rate = product.measure(meter, case, n).map(|seconds| (2 * n * n * n) as f64 / seconds);
            let limit = if dtype == DType::Bf16 { &mut meter.limits.bf16 } else { &mut meter.limits.f32 };
            *limit = rate.or(*limit);
        }
    }

    let b: &dyn Backend = backend;
    let mut one = b.filled(DType::F32, 1, 1.0)?;
    meter.measure(driver, Case::new("launch", "1"), |_| b.scale_in_place(1.0, one.view_mut()));
    Ok(())
}

/// Dense products by the driver, which on a GPU are cuBLASLt's, with one of several second factors in turn.
pub struct Dense<'a> {
    driver: &'a dyn Driver,
    dtype: DType,
    transposition: Transposition,
    columns: usize,
    depth: usize,
    a: Memory<'a>,
    b: Vec<Memory<'a>>,
    c: Memory<'a>,
}

impl<'a> Dense<'a> {
    /// At most [rows, depth] by [depth, columns] or [columns, depth]ᵀ.
    pub fn new(
        driver: &'a dyn Driver,
        numbers: &Numbers,
        dtype: DType,
        transposition: Transposition,
        [rows, columns, depth]: [usize; 3],
        turns: usize,
    ) -> Result<Self> {
        let (pattern, size) = (numbers.bytes(dtype), dtype.size());
        let a = Memory::of(driver, &pattern, rows * depth * size)?;
        let b = (0..turns).map(|_| Memory::of(driver, &pattern, depth * columns * size)).collect::<Result<_>>()?;
        let c = Memory::new(driver, rows * columns * size_of::<f32>())?;
        Ok(Self { driver, dtype, transposition, columns, depth, a, b, c })
    }

    /// The product of the first `m` rows.
    pub fn measure(&self, meter: &mut Meter, case: Case, m: usize) -> Option<f64> {
        let (n, k, dtype) = (self.columns, self.depth, self.dtype);
        let case = case
            .with("compute", dtype.name())
            .bytes((m * k + k * n) * dtype.size() + m * n * size_of::<f32>())
            .flops(2 * m * n * k, dtype);
        let (a, c, transposition) = (self.a.address, self.c.address, self.transposition);
        meter.measure(self.driver, case, |turn| {
            let b = self.b[turn % self.b.len()].address;
            let product = Gemm { m, n, k, transposition, dtype, a, b, c, alpha: 1.0, accumulate: false };
            Ok(self.driver.gemm(&product)?)
        })
    }
}
