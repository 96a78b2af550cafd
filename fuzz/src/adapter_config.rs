//! A configuration of any bytes is refused, or survives being written.

use rankfold_adapters::AdapterConfig;

/// Panics where the law is broken.
pub fn check(json: &[u8]) {
    let Ok(text) = std::str::from_utf8(json) else { return };
    if let Ok(config) = AdapterConfig::from_json(text) {
        assert_eq!(AdapterConfig::from_json(&config.to_json()).unwrap(), config);
    }
}
