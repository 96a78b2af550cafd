//! The seeds of the fuzz target that quantises on this backend.

#[macro_use]
#[path = "../../../fuzz/seeds.rs"]
mod seeds;
#[path = "../../../fuzz/src/quantize_round_trip.rs"]
mod quantize_round_trip;

seeds! { round_trip: quantize_round_trip of denormals fp4_bf16_double huge_double infinity int4_f16 nf4_f32
nf4_f32_double none one }
