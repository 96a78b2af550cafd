//! Conversions hold one tensor at a time, from one file or from shards, and write the same bytes.

use rankfold_backend::{DType, Format};
use rankfold_cpu::CpuBackend;
use rankfold_files::{Checkpoint, Spec, Writer, quantized};
use rankfold_trainer::convert;
use rankfold_trainer::model::{ModelConfig, Quantization};
use std::fs;
use std::path::Path;

const HOW: Quantization = Quantization { format: Format::Nf4, block: 64, double: true };

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 2,
    "intermediate_size": 192, "rms_norm_eps": 1e-5, "rope_theta": 10000, "dtype": "float32",
    "tie_word_embeddings": true, "vocab_size": 64}"#;

fn config() -> ModelConfig {
    ModelConfig::parse(CONFIG, Path::new("config.json")).unwrap()
}

/// Some values of every tensor, in `files` files.
fn model(folder: &Path, files: usize) -> Checkpoint {
    let tensors = config().tensors();
    let mut map = serde_json::Map::new();
    let per_file = tensors.len().div_ceil(files);
    for (s, part) in tensors.chunks(per_file).enumerate() {
        let name = if files == 1 { "model.safetensors".to_owned() } else { format!("{s}.safetensors") };
        let specs = part.iter().map(|(name, shape)| Spec::new(&**name, DType::F32, &**shape)).collect();
        let mut writer = Writer::create(&folder.join(&name), specs).unwrap();
        for (i, (tensor, shape)) in part.iter().enumerate() {
            let number = s * per_file + i;
            let value = |k: usize| ((k * 37 + number) % 101) as f32 / 50.0 - 1.0;
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            writer.write(tensor, bytemuck::cast_slice(&values)).unwrap();
            map.insert(tensor.clone(), name.clone().into());
        }
        writer.finish().unwrap();
    }
    if files > 1 {
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    Checkpoint::open(folder).unwrap()
}

/// A layer's largest matrix is 96 KiB of f32, all of them 2.6 MiB. With its codes and scales (an eighth and a little)
/// and the pool's size classes, each up to an eighth too large, one tensor takes 1.3 times itself.
#[test]
fn a_conversion_holds_one_tensor_at_a_time() {
    let place = tempfile::tempdir().unwrap();
    let [dense, four, back] = ["dense", "four", "back"].map(|name| place.path().join(name));
    for folder in [&dense, &four, &back] {
        fs::create_dir(folder).unwrap();
    }
    let checkpoint = model(&dense, 1);
    let largest = 4 * 128 * 192;

    let backend = CpuBackend::new(Some(1));
    let done = convert::quantize(&backend, &checkpoint, &config(), HOW, &four).unwrap();
    assert_eq!(done.layers, 12 * 7);
    assert!(done.before > 20 * largest);
    assert!(backend.memory().peak as u64 <= largest * 13 / 10, "{:?}", backend.memory());

    let backend = CpuBackend::new(Some(1));
    convert::dequantize(&backend, &Checkpoint::open(&four).unwrap(), &config(), &back).unwrap();
    assert!(backend.memory().peak as u64 <= largest * 13 / 10, "{:?}", backend.memory());
    assert!(quantized::weights(&Checkpoint::open(&back).unwrap()).is_empty());
}

#[test]
fn shards_quantise_to_the_bytes_of_one_file() {
    let place = tempfile::tempdir().unwrap();
    let written = [1, 2, 5].map(|files| {
        let (dense, four) = (place.path().join(format!("{files}")), place.path().join(format!("{files}-4")));
        fs::create_dir(&dense).unwrap();
        fs::create_dir(&four).unwrap();
        convert::quantize(&CpuBackend::new(Some(1)), &model(&dense, files), &config(), HOW, &four).unwrap();
        fs::read(four.join("model.safetensors")).unwrap()
    });
    assert!(written[0] == written[1] && written[0] == written[2]);
}

#[test]
fn absurd_dimensions_are_refused_before_anything_is_made_of_them() {
    for (field, whole, absurd) in [
        ("num_hidden_layers", ": 12,", ": 16777216,"),
        ("hidden_size", ": 128,", ": 1e30,"),
        ("vocab_size", ": 64}", ": 4294967296}"),
    ] {
        let text = CONFIG.replace(whole, absurd);
        assert_ne!(text, CONFIG);
        let error = ModelConfig::parse(&text, Path::new("config.json")).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("expected"), "{error}");
    }
}
