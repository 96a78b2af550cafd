//! The backend to measure.

use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;

/// All cores, on the fastest instruction set or the one that `RANKFOLD_ISA` names.
pub fn backend() -> CpuBackend {
    let backend = match std::env::var("RANKFOLD_ISA") {
        Ok(name) => CpuBackend::with_isa(Isa::named(&name).expect("an instruction set of this machine"), None),
        Err(_) => CpuBackend::new(None),
    };
    println!("{} with {} threads", backend.isa(), backend.threads());
    backend
}
