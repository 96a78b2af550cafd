//! The conformance suite on every instruction set of this machine, with one thread and, to the same bits, with two.

use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_reference::ReferenceBackend;

/// On the machine's n-th fastest instruction set; the portable one, which is the last, where there are fewer.
fn on(n: usize, threads: usize) -> CpuBackend {
    CpuBackend::with_isa(Isa::available().get(n).copied().unwrap_or(Isa::PORTABLE), Some(threads))
}

macro_rules! suites {
    ($($name:ident => $n:expr;)*) => {
        $(mod $name {
            rankfold_backend::conformance!(
                candidate: super::on($n, 1),
                oracle: super::ReferenceBackend::new(),
                twin: super::on($n, 2),
            );
        })*
    };
}

suites! {
    fastest => 0;
    second => 1;
    third => 2;
}
