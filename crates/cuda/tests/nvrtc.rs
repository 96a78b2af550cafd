//! Every source compiles for every architecture, without a GPU: no stack frame, no spills, and the registers that
//! `kernels/registers.txt` says. To renew the table: `cargo run --release -p rankfold-cuda --example registers`.
#![cfg(feature = "nvrtc")]

use rankfold_cuda::gpu::nvrtc::{ARCHITECTURES, Nvrtc};
use rankfold_cuda::{Error, SOURCES, Source};

#[test]
fn no_kernel_has_a_stack_frame_or_spills_registers() {
    let nvrtc = Nvrtc::load().unwrap();
    for (source, architecture) in SOURCES.iter().flat_map(|source| ARCHITECTURES.map(|arch| (source, arch))) {
        let compiled = nvrtc.compile(source, architecture).unwrap_or_else(|error| panic!("{error}"));
        let usage = compiled.usage();
        assert_eq!(usage.len(), source.kernels.len(), "{}, {architecture}: {}", source.file, compiled.log);
        for used in usage {
            assert_eq!(used.local, 0, "{} on {architecture}: bytes of local memory", used.kernel);
        }
    }
}

#[test]
fn registers_are_those_of_the_table() {
    let nvrtc = Nvrtc::load().unwrap();
    let (found, table) = (nvrtc.registers(SOURCES).unwrap(), include_str!("../../../kernels/registers.txt"));
    assert!(found == table, "kernels/registers.txt is not what NVRTC {:?} says:\n{found}", nvrtc.version);
}

#[test]
fn a_kernel_that_does_not_compile_is_an_error_with_its_log() {
    let source =
        Source { file: "broken", text: "extern \"C\" __global__ void f(float* x) { y[0] = 1; }", kernels: &["f"] };
    let error = Nvrtc::load().unwrap().compile(&source, "sm_80").unwrap_err();
    let Error::Compile { file, log } = &error else { panic!("{error}") };
    assert!(file == "broken" && log.contains("\"y\" is undefined"), "{log}");
}
