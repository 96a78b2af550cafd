//! Where a command computes.

use crate::error::{Error, Result};
use crate::paging::{Paged, Tiers};
use clap::{Args, ValueEnum};
use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_cuda::CudaBackend;
use rankfold_reference::ReferenceBackend;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A backend by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// SIMD and threads.
    #[default]
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
    /// The GPU's kernels, run in fibres on the host: slow, for audit.
    CudaHost,
    /// The oracle: scalar, f64 sums, very slow.
    Reference,
}

impl Device {
    /// The precision of products where nobody asks for another: bf16 where there are units for it.
    pub fn computes_in(self, isa: Option<&str>) -> ComputeType {
        let units = match self {
            Self::Cuda => true,
            Self::Cpu => {
                isa.map_or_else(|| Isa::available().first().copied(), Isa::named).is_some_and(Isa::has_bf16_units)
            }
            Self::CudaHost | Self::Reference => false,
        };
        if units { ComputeType::Bf16 } else { ComputeType::F32 }
    }

    /// Whether its memory is not the process's.
    pub fn has_memory_of_its_own(self) -> bool {
        match self {
            Self::Cuda | Self::CudaHost => true,
            Self::Cpu | Self::Reference => false,
        }
    }

    /// The instruction sets that it may use on this machine, the fastest first; none where its bits depend on none.
    pub fn instruction_sets(self) -> Vec<String> {
        match self {
            Self::Cpu => Isa::available().iter().map(ToString::to_string).collect(),
            Self::Cuda | Self::CudaHost | Self::Reference => Vec::new(),
        }
    }
}

/// A compute type by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeType {
    /// Products of f32 values.
    #[default]
    F32,
    /// Products of values rounded to bf16, summed in f32.
    Bf16,
}

impl From<ComputeType> for Compute {
    fn from(compute: ComputeType) -> Self {
        match compute {
            ComputeType::F32 => Self::F32,
            ComputeType::Bf16 => Self::Bf16,
        }
    }
}

/// The flags of every command that runs a model.
#[derive(Clone, Debug, Default, Args)]
pub struct DeviceArgs {
    /// Where to compute.
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,
    /// Precision of the products' inputs [default: bf16 where the device has units for it; f32 for `logits` and `grads`
    /// and with --tokens].
    #[arg(long, value_enum)]
    pub compute: Option<ComputeType>,
    /// Instruction set, which a result's bits depend on; `doctor` lists them [default: the fastest].
    #[arg(long, value_name = "NAME")]
    pub isa: Option<String>,
    /// Threads; all cores if not given. Never changes a result.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// Precision of the products' inputs, of what is to be compared with another program's.
    pub fn exact(&self) -> Compute {
        self.compute.unwrap_or(ComputeType::F32).into()
    }

    /// The same of anything else.
    pub fn fast(&self) -> Compute {
        self.compute.unwrap_or_else(|| self.device.computes_in(self.isa.as_deref())).into()
    }

    /// The backend that the flags ask for.
    pub fn open(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.open_on(None)?.0)
    }

    /// The same, its memory paged, where the device can; and what is paged.
    pub fn open_on(&self, tiers: Option<Tiers>) -> Result<(Arc<dyn Backend>, Option<Paged>)> {
        check_threads(self.threads)?;
        let missing = |isa: &str| {
            let there = self.device.instruction_sets().join(", ");
            let expected = if there.is_empty() { "none" } else { &there };
            Error::Usage(format!("isa {isa}, which this device lacks: expected {expected}"))
        };
        if let (Some(name), true) = (self.isa.as_deref(), self.device != Device::Cpu) {
            return Err(missing(name));
        }
        Ok(match self.device {
            Device::Cpu => {
                let isa = self.isa.as_deref().map(|name| Isa::named(name).ok_or_else(|| missing(name))).transpose()?;
                let cpu =
                    isa.map_or_else(|| CpuBackend::new(self.threads), |isa| CpuBackend::with_isa(isa, self.threads));
                match tiers {
                    Some(Tiers { host, .. }) => (Arc::new(cpu.on_pager(host.clone())), Some(Paged::Host(host))),
                    None => (Arc::new(cpu), None),
                }
            }
            Device::Cuda => on_tiers(CudaBackend::on_gpu()?, tiers)?,
            Device::CudaHost => on_tiers(CudaBackend::on_host(self.threads)?, tiers)?,
            Device::Reference => (Arc::new(ReferenceBackend::new()), None),
        })
    }
}

fn on_tiers(device: CudaBackend, tiers: Option<Tiers>) -> Result<(Arc<dyn Backend>, Option<Paged>)> {
    let device = match tiers {
        Some(tiers) => tiers.under(device)?,
        None => device,
    };
    let paged = device.pager().cloned().map(Paged::Device);
    Ok((Arc::new(device), paged))
}

/// The most threads: beyond it, a typing error is likelier than a machine with as many cores.
const MOST_THREADS: usize = 1024;

/// That `--threads` is a number of threads.
pub fn check_threads(threads: Option<usize>) -> Result<()> {
    match threads {
        Some(n) if !(1..=MOST_THREADS).contains(&n) => {
            Err(Error::Usage(format!("--threads {n}: expected 1 to {MOST_THREADS}")))
        }
        _ => Ok(()),
    }
}
