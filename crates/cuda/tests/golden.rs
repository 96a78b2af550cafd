//! The golden quantisation vectors, on the kernels of `kernels/`, run on the host.

#[path = "../../reference/tests/quant_vectors/mod.rs"]
mod quant_vectors;

use rankfold_cuda::CudaBackend;

fn backend() -> CudaBackend {
    CudaBackend::on_host(None).unwrap()
}

#[test]
fn golden_codebooks_equal_the_tables() {
    quant_vectors::tables_equal_the_codebooks();
}

#[test]
fn golden_four_bits_equal_bit_for_bit() {
    quant_vectors::four_bits_equal(&backend());
}

#[test]
fn golden_nested_scales_decode_bit_for_bit() {
    quant_vectors::nested_scales_decode_equal(&backend());
}

#[test]
fn golden_scales_quantise_to_the_nearest_codes() {
    quant_vectors::scales_quantise_equal(&backend());
}

#[test]
fn golden_eight_bits_are_the_nearest_codes() {
    quant_vectors::eight_bits_equal(&backend());
}
