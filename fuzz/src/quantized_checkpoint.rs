//! A file of any bytes is refused, or every 4-bit weight in it is refused or decodes. What is asked of memory is in
//! proportion to the file: `run` sets a limit that an absurd shape would pass.

use rankfold_backend::{Backend, DType, Error as Kernel};
use rankfold_files::{Checkpoint, Error, quantized};
use rankfold_reference::ReferenceBackend;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::NamedTempFile;

thread_local! {
    /// One file for all inputs, rewritten in place: making a new one for each would take most of the time.
    static FILE: NamedTempFile = NamedTempFile::new().expect("a folder for temporary files");
}

/// Panics where the law is broken.
pub fn check(data: &[u8]) {
    FILE.with(|file| {
        let (path, file) = (file.path(), file.as_file());
        file.write_all_at(data, 0).and_then(|()| file.set_len(data.len() as u64)).expect("room for a few KiB");
        decode_all(path, data.len());
    });
}

fn decode_all(path: &Path, bytes: usize) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    let backend = ReferenceBackend::new();
    for name in quantized::weights(&checkpoint) {
        match quantized::load(&checkpoint, name, &backend) {
            Ok(Some(loaded)) => {
                let elements = loaded.weight.elements();
                assert!(elements.div_ceil(2) <= bytes, "{elements} elements in {} bytes", bytes);
                let mut out = backend.alloc(DType::F32, elements).expect("as much as eight files");
                backend.dequantize_4bit(&loaded.weight, out.view_mut()).expect("a weight that was checked");
            }
            Ok(None) => {}
            Err(Error::Backend { source: source @ Kernel::OutOfMemory { .. }, .. }) => panic!("{source}"),
            Err(_) => {}
        }
    }
}
