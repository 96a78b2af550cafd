//! The golden quantisation vectors, on every instruction set of this machine.

#[path = "../../reference/tests/quant_vectors/mod.rs"]
mod quant_vectors;

use rankfold_backend::Backend;
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;

fn everywhere(check: fn(&dyn Backend)) {
    for isa in Isa::available() {
        check(&CpuBackend::with_isa(isa, Some(2)));
    }
}

#[test]
fn golden_codebooks_equal_the_tables() {
    quant_vectors::tables_equal_the_codebooks();
}

#[test]
fn golden_four_bits_equal_bit_for_bit() {
    everywhere(quant_vectors::four_bits_equal);
}

#[test]
fn golden_nested_scales_decode_bit_for_bit() {
    everywhere(quant_vectors::nested_scales_decode_equal);
}

#[test]
fn golden_scales_quantise_to_the_nearest_codes() {
    everywhere(quant_vectors::scales_quantise_equal);
}

#[test]
fn golden_eight_bits_are_the_nearest_codes() {
    everywhere(quant_vectors::eight_bits_equal);
}
