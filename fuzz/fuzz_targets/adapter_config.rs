#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rankfold_fuzz::adapter_config::check(data));
