//! A file of any bytes is refused, or describes tensors that fill it exactly.

use rankfold_files::header;
use std::path::Path;

/// Panics where the law is broken.
pub fn check(file: &[u8]) {
    if let Ok(tensors) = header::read(Path::new("fuzz"), &mut &file[..], file.len() as u64) {
        let header = u64::from_le_bytes(file[..8].try_into().expect("a file that was read has a length"));
        let data: usize = tensors.values().map(|tensor| tensor.bytes).sum();
        assert_eq!(8 + header + data as u64, file.len() as u64);
    }
}
