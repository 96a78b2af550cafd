#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rankfold_fuzz::quant_state_json::check(data));
