//! `rankfold doctor`: what the machine can do, measured.

use crate::device::{Device, check_threads};
use crate::error::Result;
use crate::show::{bytes, say};
use clap::Args;
use rankfold_backend::params::{Layout, MatMul};
use rankfold_backend::{Backend, Compute, DType};
use rankfold_cpu::CpuBackend;
use rankfold_cuda::CudaBackend;
use std::time::Instant;

/// Measure the machine's read and write rates and those of its products, and name the instruction set chosen.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Threads; all cores if not given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Elements of the buffers that memory is measured on: 256 MiB, beyond any cache.
const ELEMENTS: usize = 64 << 20;
/// Edge of the product that arithmetic is measured on.
const EDGE: usize = 1024;

impl Doctor {
    pub fn run(self) -> Result<()> {
        check_threads(self.threads)?;
        let backend = CpuBackend::new(self.threads);
        let known = Device::Cpu.instruction_sets();
        say!("instruction set   {} (this machine has: {})", backend.isa(), known.join(", "))?;
        say!("threads           {}", backend.threads())?;
        if let Some(memory) = crate::memory::of_the_machine() {
            say!("memory            {}", bytes(memory))?;
        }
        match CudaBackend::on_gpu() {
            Ok(gpu) => say!("gpu               {}", gpu.driver().name())?,
            Err(missing) => say!("gpu               none: {missing}")?,
        }
        let buffer = |value| (&backend as &dyn Backend).filled(DType::F32, ELEMENTS, value);
        let mut x = buffer(1.0)?;
        let size = (4 * ELEMENTS) as f64;
        let read = best(|| backend.sum_squares(x.view()).map(drop))?;
        let write = best(|| backend.fill(0.5, x.view_mut()))?;
        say!("read              {:.1} GB/s", size / read / 1e9)?;
        say!("write             {:.1} GB/s", size / write / 1e9)?;

        let square = || (&backend as &dyn Backend).filled(DType::F32, EDGE * EDGE, 1.0);
        let (a, b, mut c) = (square()?, square()?, square()?);
        for (name, compute) in [("f32", Compute::F32), ("bf16", Compute::Bf16)] {
            let p = MatMul { m: EDGE, n: EDGE, k: EDGE, layout: Layout::Nn, accumulate: false, compute };
            let product = best(|| backend.matmul(&p, a.view(), b.view(), c.view_mut()))?;
            let rate = 2.0 * (EDGE * EDGE * EDGE) as f64 / product;
            say!("{:<18}{:.1} GFLOP/s", format!("{name} products"), rate / 1e9)?;
        }
        say!("this machine runs Rankfold on {} threads with {}", backend.threads(), backend.isa())?;
        Ok(())
    }
}

/// The shortest of several runs, in seconds.
fn best(mut f: impl FnMut() -> rankfold_backend::Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let begun = Instant::now();
        f()?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    Ok(best)
}
