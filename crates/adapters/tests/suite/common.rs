//! Layers and folders that several test files need.

use proptest::prelude::*;
use rankfold_adapters::{Linear, Purpose, Weight};
use rankfold_autograd::{Base, Parameter, Tensor};
use rankfold_backend::{Backend, DType, philox};
use rankfold_files::{Checkpoint, Spec, Writer};
use rankfold_reference::ReferenceBackend;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub fn reference() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend)
}

/// A file or folder of the golden vectors.
pub fn golden(path: &str) -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("RANKFOLD_GOLDEN").map_or_else(own, PathBuf::from).join(path)
}

/// A layer with this f32 matrix.
pub fn layer(backend: &dyn Backend, path: &str, index: u64, dims: [usize; 2], w: &[f32]) -> Linear {
    let w = Tensor::constant(backend.upload(w).unwrap(), dims).unwrap();
    Linear::new(path, index, Weight::Frozen(Base::Dense(w)), None).unwrap()
}

/// Layers of these paths, all of one shape.
pub fn layers(backend: &dyn Backend, dims: [usize; 2], paths: &[&str]) -> Vec<Linear> {
    let w = vec![0.5; dims[0] * dims[1]];
    paths.iter().zip(0..).map(|(path, index)| layer(backend, path, index, dims, &w)).collect()
}

/// The linear layers of the golden model's blocks, and its `model_type`.
pub fn golden_layers(backend: &dyn Backend) -> (Vec<Linear>, String) {
    let model = Checkpoint::open(&golden("tiny-llama")).unwrap();
    let is_matrix = |name: &&str| model.info(name).unwrap().shape.len() == 2 && name.contains(".layers.");
    let names: Vec<&str> = model.names().filter(is_matrix).collect();
    let layers = names.iter().zip(0..).map(|(name, index)| {
        let w = Tensor::constant(model.load(name, backend).unwrap(), model.info(name).unwrap().shape.clone()).unwrap();
        let path = name.strip_suffix(".weight").unwrap();
        Linear::new(path, index, Weight::Frozen(Base::Dense(w)), None).unwrap()
    });
    let config = std::fs::read(golden("tiny-llama/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    (layers.collect(), config["model_type"].as_str().unwrap().to_string())
}

/// An adapter folder with this configuration and these f32 tensors.
pub fn write_adapter(folder: &Path, config: &str, tensors: &[(&str, [usize; 2], Vec<f32>)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    write_tensors(folder, tensors);
}

/// The file of tensors of an adapter's folder, in f32.
pub fn write_tensors<N: AsRef<str>, D: AsRef<[usize]>>(folder: &Path, tensors: &[(N, D, Vec<f32>)]) {
    let spec = |(name, dims, _): &(N, D, Vec<f32>)| Spec::new(name.as_ref(), DType::F32, dims.as_ref());
    let path = folder.join("adapter_model.safetensors");
    let mut writer = Writer::create(&path, tensors.iter().map(spec).collect()).unwrap();
    for (name, _, values) in tensors {
        writer.write(name.as_ref(), bytemuck::cast_slice(values)).unwrap();
    }
    writer.finish().unwrap();
}

/// What a folder is written for.
pub fn purpose(finished: bool) -> Purpose {
    if finished { Purpose::Exchange } else { Purpose::Resume }
}

/// Numbers in [−1, 1), others for every stream.
pub fn numbers(stream: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| 2.0 * philox::unit(philox::word(5, stream, i)) - 1.0).collect()
}

/// Give a parameter the numbers of a stream.
pub fn set(backend: &dyn Backend, parameter: &Parameter, stream: u64) {
    let values = numbers(stream, parameter.shape().elements());
    parameter.update(|buffer| Ok(backend.write(bytemuck::cast_slice(&values), buffer.view_mut())?)).unwrap();
}

/// u, half the distance from 1 to the next f32.
pub const UNIT: f64 = 1.0 / 16_777_216.0;

/// Numbers on a grid of 2⁻¹⁰ in [−2, 2]: no product of them comes near f32's smallest.
pub fn grid(len: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec((-2048i16..=2048).prop_map(|i| f32::from(i) / 1024.0), len)
}

/// The values of a layer's dense f32 matrix.
pub fn matrix(backend: &dyn Backend, layer: &Linear) -> Vec<f32> {
    match layer.base() {
        Base::Dense(tensor) => backend.download(tensor.view()).unwrap(),
        Base::Quantized(_) => panic!("{}: expected a dense matrix", layer.path()),
    }
}

/// Borrowed, as `attach_new` and `attach_folder` take them.
pub fn all(layers: &mut [Linear]) -> Vec<&mut Linear> {
    layers.iter_mut().collect()
}
