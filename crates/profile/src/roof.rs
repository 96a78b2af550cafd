//! What a machine can do, measured: the roofs of the roofline model (Williams et al. 2009, "Roofline: an insightful
//! visual performance model").
//!
//! A kernel that must do F operations and move B bytes takes at least max(F / rate, B / bandwidth). The rates are those
//! of dense products of the same backend, through the same trait; the bandwidth is that of long buffers, the larger of
//! what is read and what is written.

use crate::fence::Fence;
use rankfold_backend::params::{Layout, MatMul};
use rankfold_backend::{Backend, Compute, DType, Result};
use serde::Serialize;
use std::time::Instant;

/// Rates in operations and bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// Bytes read.
    pub read: f64,
    /// Bytes written.
    pub write: f64,
    /// Operations of a product in f32.
    pub f32: f64,
    /// Operations of one whose inputs are bf16.
    pub bf16: f64,
}

/// Bytes of the buffer that memory is measured on, beyond any cache; those that are begun with.
const BYTES: [usize; 2] = [256 << 20, 1 << 20];
/// Edge of the product that arithmetic is measured on; that which is begun with.
const EDGE: [usize; 2] = [1024, 64];
/// Seconds that one call may take. Backends made for reading are measured on less.
const LONG: f64 = 0.1;
/// Seconds that the repetitions of a call may take.
const PATIENCE: f64 = 1.0;

impl Roof {
    /// Measure a backend, in at most `room` bytes of its memory at a time.
    pub fn measure(backend: &dyn Backend, room: u64) -> Result<Self> {
        let (room, fence) = (usize::try_from(room).unwrap_or(usize::MAX), Fence::new(backend)?);
        let seconds = |f: &mut dyn FnMut() -> Result<()>| {
            fastest(|| {
                f()?;
                fence.wait(backend)
            })
        };
        let memory = |f: &dyn Fn(&mut rankfold_backend::Buffer) -> Result<()>| {
            largest(BYTES, room, |bytes| {
                let mut x = backend.filled(DType::F32, bytes / 4, 1.0)?;
                Ok((bytes as f64, seconds(&mut || f(&mut x))?))
            })
        };
        let product = |compute| {
            largest(EDGE, (room / 12).isqrt(), |edge| {
                let square = || backend.filled(DType::F32, edge * edge, 1.0);
                let (a, b, mut c) = (square()?, square()?, square()?);
                let p = MatMul { m: edge, n: edge, k: edge, layout: Layout::Nn, accumulate: false, compute };
                let took = seconds(&mut || backend.matmul(&p, a.view(), b.view(), c.view_mut()))?;
                Ok((2.0 * (edge as f64).powi(3), took))
            })
        };
        Ok(Self {
            read: memory(&|x| backend.sum_squares(x.view()).map(drop))?,
            write: memory(&|x| backend.fill(0.5, x.view_mut()))?,
            f32: product(Compute::F32)?,
            bf16: product(Compute::Bf16)?,
        })
    }

    /// Bytes a second that no kernel is expected to exceed with operands in memory.
    pub fn bandwidth(&self) -> f64 {
        self.read.max(self.write)
    }

    /// Operations a second.
    pub fn arithmetic(&self, compute: Compute) -> f64 {
        match compute {
            Compute::F32 => self.f32,
            Compute::Bf16 => self.bf16,
        }
    }
}

/// The rate at the largest size within `room` that does not take long: `run` gives what was done and the seconds.
fn largest([most, least]: [usize; 2], room: usize, run: impl Fn(usize) -> Result<(f64, f64)>) -> Result<f64> {
    let most = most.min(room.max(least));
    let mut size = least;
    loop {
        let (done, seconds) = run(size)?;
        if size == most || seconds > LONG {
            return Ok(done / seconds);
        }
        size = most.min(2 * size);
    }
}

/// The shortest of several runs, in seconds.
fn fastest(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut best, all) = (f64::INFINITY, Instant::now());
    for _ in 0..7 {
        let begun = Instant::now();
        f()?;
        best = best.min(begun.elapsed().as_secs_f64());
        if all.elapsed().as_secs_f64() > PATIENCE {
            break;
        }
    }
    Ok(best)
}
