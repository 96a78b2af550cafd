//! `rankfold doctor`: what the machine can do, measured.

use crate::device::{Device, check_threads};
use crate::error::Result;
use crate::show::{bytes, say};
use clap::Args;
use rankfold_cpu::CpuBackend;
use rankfold_cuda::CudaBackend;
use rankfold_profile::Roof;

/// Measure the machine's read and write rates and those of its products, and name the instruction set chosen.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Threads; all cores if not given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

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
        let Roof { read, write, f32, bf16 } = Roof::measure(&backend, u64::MAX)?;
        say!("read              {:.1} GB/s", read / 1e9)?;
        say!("write             {:.1} GB/s", write / 1e9)?;
        say!("f32 products      {:.1} GFLOP/s", f32 / 1e9)?;
        say!("bf16 products     {:.1} GFLOP/s", bf16 / 1e9)?;
        say!("this machine runs Rankfold on {} threads with {}", backend.threads(), backend.isa())?;
        Ok(())
    }
}
