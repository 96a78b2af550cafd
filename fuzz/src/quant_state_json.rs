//! A state of any bytes is refused, or survives being written.

use rankfold_files::QuantState;

/// Panics where the law is broken.
pub fn check(json: &[u8]) {
    if let Ok(state) = QuantState::parse(json) {
        assert_eq!(QuantState::parse(state.to_json().as_bytes()), Ok(state));
    }
}
