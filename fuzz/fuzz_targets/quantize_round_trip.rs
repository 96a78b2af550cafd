#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rankfold_fuzz::quantize_round_trip::check(data));
