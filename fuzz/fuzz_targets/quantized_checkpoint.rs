//! A file of any bytes is refused, or every 4-bit weight in it is refused or decodes. What is asked of memory is in
//! proportion to the file: `run` sets a limit that an absurd shape would pass.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rankfold_backend::{Backend, DType, Error as Kernel};
use rankfold_files::{Checkpoint, Error, quantized};
use rankfold_reference::ReferenceBackend;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::LazyLock;

/// One file for all inputs, rewritten in place: making a new one for each would take most of the time.
static FILE: LazyLock<(PathBuf, File)> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("quantized_checkpoint-{}.safetensors", std::process::id()));
    let file = File::create(&path).expect("a folder for temporary files");
    (path, file)
});

fuzz_target!(|data: &[u8]| {
    let (path, file) = &*FILE;
    file.write_all_at(data, 0).and_then(|()| file.set_len(data.len() as u64)).expect("room for a few KiB");
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    let backend = ReferenceBackend::new();
    for name in quantized::weights(&checkpoint) {
        match quantized::load(&checkpoint, name, &backend) {
            Ok(Some(loaded)) => {
                let elements = loaded.weight.elements();
                assert!(elements.div_ceil(2) <= data.len(), "{elements} elements in {} bytes", data.len());
                let mut out = backend.alloc(DType::F32, elements).expect("as much as eight files");
                backend.dequantize_4bit(&loaded.weight, out.view_mut()).expect("a weight that was checked");
            }
            Ok(None) => {}
            Err(Error::Backend { source: source @ Kernel::OutOfMemory { .. }, .. }) => panic!("{source}"),
            Err(_) => {}
        }
    }
});
