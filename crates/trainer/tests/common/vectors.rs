//! Where the peers' vectors lie.

use std::path::{Path, PathBuf};

/// The project's own copy.
pub fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The folder that `RANKFOLD_GOLDEN` names, or the project's own copy.
pub fn golden() -> PathBuf {
    std::env::var_os("RANKFOLD_GOLDEN").map_or_else(own, PathBuf::from)
}
