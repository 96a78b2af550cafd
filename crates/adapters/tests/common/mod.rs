//! Layers and folders that several test files need.
#![allow(dead_code)] // each test file uses a part

use rankfold_adapters::{Linear, Weight};
use rankfold_autograd::{Base, Tensor};
use rankfold_backend::{Backend, DType};
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

/// Layers of these paths, all of one shape; a path of "lm_head" is the head.
pub fn layers(backend: &dyn Backend, dims: [usize; 2], paths: &[&str]) -> Vec<Linear> {
    let w = vec![0.5; dims[0] * dims[1]];
    let layers = paths.iter().zip(0..).map(|(path, index)| {
        let layer = layer(backend, path, index, dims, &w);
        if *path == "lm_head" { layer.into_head() } else { layer }
    });
    layers.collect()
}

/// The linear layers of the golden model, and its `model_type`.
pub fn golden_layers(backend: &dyn Backend) -> (Vec<Linear>, String) {
    let model = Checkpoint::open(&golden("tiny-llama")).unwrap();
    let is_matrix = |name: &&str| model.info(name).unwrap().shape.len() == 2 && !name.contains("embed_tokens");
    let names: Vec<&str> = model.names().filter(is_matrix).collect();
    let layers = names.iter().zip(0..).map(|(name, index)| {
        let w = Tensor::constant(model.load(name, backend).unwrap(), model.info(name).unwrap().shape.clone()).unwrap();
        let path = name.strip_suffix(".weight").unwrap();
        let layer = Linear::new(path, index, Weight::Frozen(Base::Dense(w)), None).unwrap();
        if path == "lm_head" { layer.into_head() } else { layer }
    });
    let config = std::fs::read(golden("tiny-llama/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    (layers.collect(), config["model_type"].as_str().unwrap().to_string())
}

/// An adapter folder with this configuration and these f32 tensors.
pub fn write_adapter(folder: &Path, config: &str, tensors: &[(&str, [usize; 2], Vec<f32>)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let specs = tensors.iter().map(|(name, dims, _)| Spec::new(*name, DType::F32, *dims)).collect();
    let mut writer = Writer::create(&folder.join("adapter_model.safetensors"), specs).unwrap();
    for (name, _, values) in tensors {
        writer.write(name, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
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
