//! What the tests share: checkpoints made on the spot, and weights drawn from a normal distribution.
#![allow(dead_code)] // each test file takes a part of this

use rankfold_audit::{Options, Report, Result, Selection, audit};
use rankfold_backend::{Backend, DType, Format, philox};
use rankfold_files::{Checkpoint, Spec, Writer};
use rankfold_reference::{ReferenceBackend, derive::normal_quantile};
use std::path::Path;
use std::sync::Arc;

pub fn backend() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend::new())
}

/// `len` draws of N(0, 1), others for every `stream`.
pub fn normals(stream: u64, len: usize) -> Vec<f32> {
    let uniform = |i| (f64::from(philox::word(9, stream, i)) + 0.5) / 2f64.powi(32);
    (0..len as u64).map(|i| normal_quantile(uniform(i)) as f32).collect()
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A file of tensors: name, type, shape, bytes.
pub fn write(path: &Path, tensors: &[(&str, DType, &[usize], Vec<u8>)]) -> Checkpoint {
    let specs = tensors.iter().map(|(name, dtype, shape, _)| Spec::new(*name, *dtype, *shape)).collect();
    let mut writer = Writer::create(path, specs).unwrap();
    for (name, _, _, bytes) in tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(path).unwrap()
}

pub fn run(checkpoint: &Checkpoint, formats: &[Format], blocks: &[usize], threads: usize) -> Result<Report> {
    let options = Options::new(formats, blocks, threads, Selection::Matrices)?;
    audit(&backend(), checkpoint, "model", &options, &mut |_, _, _| ())
}

/// Two tensors of other shapes and types, with ragged blocks, and what is no weight.
pub fn small(folder: &Path) -> Checkpoint {
    let first = normals(1, 70 * 97);
    let second: Vec<u8> =
        normals(2, 33 * 64).iter().flat_map(|x| (((0.02 * x).to_bits() >> 16) as u16).to_le_bytes()).collect();
    write(
        &folder.join("model.safetensors"),
        &[
            ("layers.0.<up & \"down\">.weight", DType::F32, &[70, 97], bytes(&first)),
            ("layers.10.b.weight", DType::Bf16, &[33, 64], second),
            ("embed_tokens.weight", DType::F32, &[2, 2], bytes(&[1.0; 4])),
            ("norm.weight", DType::F32, &[2], bytes(&[1.0; 2])),
        ],
    )
}
