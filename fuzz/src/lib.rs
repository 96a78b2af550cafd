//! The laws that the targets try on any bytes, one a file. The tests of the crates that they are about include the
//! same files, and try the laws on the committed seeds.

pub mod adapter_config;
pub mod quant_state_json;
pub mod quantize_round_trip;
pub mod quantized_checkpoint;
pub mod safetensors_header;
