//! The seeds of the fuzz targets that read files.

#[macro_use]
#[path = "../../../fuzz/seeds.rs"]
mod seeds;
#[path = "../../../fuzz/src/quant_state_json.rs"]
mod quant_state_json;
#[path = "../../../fuzz/src/quantized_checkpoint.rs"]
mod quantized_checkpoint;
#[path = "../../../fuzz/src/safetensors_header.rs"]
mod safetensors_header;

seeds! { state: quant_state_json of int4 nested plain }
seeds! { checkpoint: quantized_checkpoint of fp4_plain int4_nested nf4_lying_shape nf4_nested nf4_nested_in_part
nf4_one_block }
seeds! { header: safetensors_header of empty foreign metadata scalar_and_empty two }
