//! Where a command computes.

use crate::error::{Error, Result};
use clap::{Args, ValueEnum};
use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
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
    /// The oracle: scalar, f64 sums, very slow.
    Reference,
}

/// A compute type by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeType {
    /// Products of f32 values.
    #[default]
    F32,
}

impl From<ComputeType> for Compute {
    fn from(compute: ComputeType) -> Self {
        match compute {
            ComputeType::F32 => Self::F32,
        }
    }
}

/// The flags of every command that runs a model.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct DeviceArgs {
    /// Where to compute.
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,
    /// Precision of the products' inputs.
    #[arg(long, value_enum, default_value_t)]
    pub compute: ComputeType,
    /// Threads; all cores if not given. Never changes a result.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// The backend that the flags ask for.
    pub fn open(self) -> Result<Arc<dyn Backend>> {
        if self.threads == Some(0) {
            return Err(Error::Usage("--threads 0: expected at least 1".into()));
        }
        Ok(match self.device {
            Device::Cpu => Arc::new(CpuBackend::new(self.threads)),
            Device::Reference => Arc::new(ReferenceBackend::new()),
        })
    }
}
