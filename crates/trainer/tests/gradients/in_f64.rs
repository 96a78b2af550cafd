//! `reference` with every new f32 buffer in f64.

use rankfold_backend::params::*;
use rankfold_backend::*;
use rankfold_reference::ReferenceBackend;
use std::sync::atomic::{AtomicBool, Ordering};

/// From [`InF64::begin`] on: what exists by then stays in f32, which `reference` reads exactly.
#[derive(Debug, Default)]
pub struct InF64(AtomicBool);

impl InF64 {
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Backend for InF64 {
    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        let widened = dtype == DType::F32 && self.0.load(Ordering::Relaxed);
        ReferenceBackend.alloc(if widened { DType::F64 } else { dtype }, len)
    }

    /// f32 from the host into what was to be f32.
    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()> {
        if out.dtype() != DType::F64 || bytes.len() != out.len() * size_of::<f32>() {
            return ReferenceBackend.write(bytes, out);
        }
        let wide: Vec<f64> = bytemuck::pod_collect_to_vec::<u8, f32>(bytes).into_iter().map(f64::from).collect();
        ReferenceBackend.write(bytemuck::cast_slice(&wide), out)
    }

    as_reference!(products);
    as_reference!(rest);
}
