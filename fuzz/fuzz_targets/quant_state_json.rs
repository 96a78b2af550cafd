//! A state of any bytes is refused, or survives being written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rankfold_files::QuantState;

fuzz_target!(|json: &[u8]| {
    if let Ok(state) = QuantState::parse(json) {
        assert_eq!(QuantState::parse(state.to_json().as_bytes()), Ok(state));
    }
});
