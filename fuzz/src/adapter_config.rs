//! A configuration of any bytes, of any method, is refused, or survives being written.

use rankfold_adapters::PeftConfig;

/// Panics where the law is broken.
pub fn check(json: &[u8]) {
    let Ok(text) = std::str::from_utf8(json) else { return };
    if let Ok(config) = PeftConfig::from_json(text) {
        assert_eq!(PeftConfig::from_json(&config.to_json()).unwrap(), config);
    }
}
