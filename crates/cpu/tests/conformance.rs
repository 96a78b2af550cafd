//! The conformance suite on every instruction set of this machine, with one thread and with two.

use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_reference::ReferenceBackend;

/// On the machine's n-th fastest instruction set; the portable one, which is the last, where there are fewer.
fn on(n: usize, threads: usize) -> CpuBackend {
    CpuBackend::with_isa(Isa::available().get(n).copied().unwrap_or(Isa::Portable), Some(threads))
}

macro_rules! suites {
    ($($name:ident => $n:expr, $threads:expr;)*) => {
        $(mod $name {
            rankfold_backend::conformance!(
                candidate: super::on($n, $threads),
                oracle: super::ReferenceBackend::new(),
            );
        })*
    };
}

suites! {
    fastest_on_one_thread => 0, 1;
    fastest_on_two_threads => 0, 2;
    second_on_one_thread => 1, 1;
    second_on_two_threads => 1, 2;
    third_on_one_thread => 2, 1;
    third_on_two_threads => 2, 2;
}
