//! Against PEFT's own folders.

use crate::common::{all, golden, golden_layers, matrix, reference};
use rankfold_adapters::{AdapterConfig, AdapterFolder, Init, Purpose, attach_folder, write_folder};
use rankfold_files::Checkpoint;
use serde_json::Value;

const FOLDERS: [&str; 8] = [
    "lora/init",
    "lora/final",
    "rslora/init",
    "lora_default_init/init",
    "dora/init",
    "dora/final",
    "adalora/init",
    "adalora/final",
];

fn config_of(folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(folder).join("adapter_config.json")).unwrap()).unwrap()
}

#[test]
fn golden_folders_are_read_and_written_byte_for_byte() {
    let backend = reference();
    for folder in FOLDERS {
        let (mut layers, architecture) = golden_layers(backend.as_ref());
        let adapter = AdapterFolder::open(&golden(folder)).unwrap();
        let attached = attach_folder(backend.as_ref(), &mut all(&mut layers), &adapter, &architecture).unwrap();
        assert!(attached.unused.is_empty() && !attached.modules.is_empty());

        let out = tempfile::tempdir().unwrap();
        write_folder(backend.as_ref(), out.path(), &attached.config, &layers, Vec::new(), Purpose::Exchange).unwrap();
        let bytes = |path: &std::path::Path| std::fs::read(path.join("adapter_model.safetensors")).unwrap();
        assert_eq!(bytes(out.path()), bytes(&golden(folder)), "{folder}");

        // The configuration too, but for the order of the targets, which is PEFT's set's.
        let text = std::fs::read_to_string(out.path().join("adapter_config.json")).unwrap();
        let mut expected = config_of(folder);
        if let Value::Array(targets) = &mut expected["target_modules"] {
            targets.sort_by_key(|target| target.to_string());
        }
        assert_eq!(text, format!("{expected:#}"), "{folder}");
        assert_eq!(AdapterConfig::from_json(&text).unwrap(), attached.config);
    }
}

#[test]
fn golden_hyper_parameters_are_the_files() {
    let backend = reference();
    for folder in FOLDERS {
        let (mut layers, architecture) = golden_layers(backend.as_ref());
        let adapter = AdapterFolder::open(&golden(folder)).unwrap();
        attach_folder(backend.as_ref(), &mut all(&mut layers), &adapter, &architecture).unwrap();
        let config = config_of(folder);
        let alpha = config["lora_alpha"].as_f64().unwrap();
        let scale = match config["init_r"].as_f64() {
            Some(r) => alpha / (r + 1e-5),
            None if config["use_rslora"] == true => alpha / config["r"].as_f64().unwrap().sqrt(),
            None => alpha / config["r"].as_f64().unwrap(),
        };
        for lora in layers.iter().filter_map(|layer| layer.adapter()) {
            assert_eq!(lora.spec().scale(), scale as f32);
        }
    }
}

#[test]
fn golden_default_initialisation_has_the_bounds_that_ours_has() {
    let backend = reference();
    let (mut layers, architecture) = golden_layers(backend.as_ref());
    let adapter = AdapterFolder::open(&golden("lora_default_init/init")).unwrap();
    assert_eq!(adapter.config().init, Init::Kaiming);
    attach_folder(backend.as_ref(), &mut all(&mut layers), &adapter, &architecture).unwrap();
    for (layer, lora) in layers.iter().filter_map(|layer| Some((layer, layer.adapter()?))) {
        let a: Vec<f32> = backend.download(lora.a().tensor().view()).unwrap();
        let bound = (layer.inputs() as f32).sqrt().recip();
        assert!(a.iter().all(|a| a.abs() <= bound) && a.iter().any(|a| a.abs() > 0.9 * bound), "{}", layer.path());
        let b: Vec<f32> = backend.download(lora.b().tensor().view()).unwrap();
        assert!(b.iter().all(|&b| b == 0.0));
    }
}

/// Both sums are off by at most (r + 4)·2⁻²⁴·M from the exact W + s·B·A (`merge`: ours; PEFT's in f32: r products
/// summed, a product with s and a sum with W), M = |w| + |s|·Σ|b a|: so by twice that from each other.
#[test]
fn golden_merged_model_is_the_base_with_the_adapter_folded_in() {
    let backend = reference();
    let (mut layers, architecture) = golden_layers(backend.as_ref());
    let base: Vec<Vec<f32>> = layers.iter().map(|layer| matrix(backend.as_ref(), layer)).collect();
    let adapter = AdapterFolder::open(&golden("lora/final")).unwrap();
    attach_folder(backend.as_ref(), &mut all(&mut layers), &adapter, &architecture).unwrap();
    let merged = Checkpoint::open(&golden("lora/merged")).unwrap();
    for (layer, base) in layers.iter_mut().zip(&base) {
        let lora = layer.adapter().cloned();
        layer.merge(backend.as_ref()).unwrap();
        let ours = matrix(backend.as_ref(), layer);
        let theirs = merged.read_f32(&format!("{}.weight", layer.path())).unwrap();
        let Some(lora) = lora else {
            assert_eq!(ours, theirs, "{}: no target, so unchanged", layer.path());
            continue;
        };
        assert_ne!(&ours, base, "{}: a target, so changed", layer.path());
        let a: Vec<f32> = backend.download(lora.a().tensor().view()).unwrap();
        let b: Vec<f32> = backend.download(lora.b().tensor().view()).unwrap();
        let (rank, scale) = (lora.spec().rank, f64::from(lora.spec().scale()));
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let (row, column) = (i / layer.inputs(), i % layer.inputs());
            let product = |k: usize| f64::from(b[row * rank + k]) * f64::from(a[k * layer.inputs() + column]);
            let m = f64::from(base[i].abs()) + scale.abs() * (0..rank).map(|k| product(k).abs()).sum::<f64>();
            let bound = 2.0 * (rank as f64 + 4.0) * 2f64.powi(-24) * m;
            let difference = (f64::from(*ours) - f64::from(*theirs)).abs();
            assert!(
                difference <= bound,
                "{} element {i}: {ours} and {theirs} differ by more than {bound:e}",
                layer.path()
            );
        }
    }
}
