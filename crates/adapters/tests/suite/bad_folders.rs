//! Folders that disagree with the model or with themselves.

use crate::common::{all, layers, reference, write_adapter};
use half::bf16;
use rankfold_adapters::{AdapterFolder, Attached, Error, Linear, Purpose, attach_folder, write_folder};
use rankfold_backend::DType;
use rankfold_files::{Spec, Writer};
use std::path::Path;

const A: &str = "base_model.model.layers.0.q_proj.lora_A.weight";
const B: &str = "base_model.model.layers.0.q_proj.lora_B.weight";
const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}"#;

/// Attach to a model of one target of [3, 4] and one other layer.
fn attach(folder: &Path) -> (Vec<Linear>, Result<Attached, Error>) {
    let backend = reference();
    let mut model = layers(backend.as_ref(), [3, 4], &["layers.0.q_proj", "layers.0.k_proj"]);
    let attached = AdapterFolder::open(folder)
        .and_then(|folder| attach_folder(backend.as_ref(), &mut all(&mut model), &folder, "llama"));
    (model, attached)
}

/// The error of these tensors under that configuration, without the file's path.
fn refusal(config: &str, tensors: &[(&str, [usize; 2], Vec<f32>)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), config, tensors);
    let (model, attached) = attach(folder.path());
    assert!(model.iter().all(|layer| layer.adapter().is_none()), "attached in part");
    let file = format!("{}/adapter_model.safetensors: ", folder.path().display());
    let message = attached.unwrap_err().to_string();
    message.strip_prefix(&file).unwrap_or_else(|| panic!("{message}")).to_string()
}

fn zeros(name: &str, dims: [usize; 2]) -> (&str, [usize; 2], Vec<f32>) {
    (name, dims, vec![0.0; dims[0] * dims[1]])
}

#[test]
fn a_sound_folder_is_attached() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), CONFIG, &[zeros(A, [2, 4]), zeros(B, [3, 2])]);
    let (model, attached) = attach(folder.path());
    assert_eq!(attached.unwrap().parameters(), 14);
    assert!(model[0].adapter().is_some() && model[1].adapter().is_none());
}

#[test]
fn a_missing_tensor_is_named_with_the_layer_that_needs_it() {
    let message = refusal(CONFIG, &[zeros(A, [2, 4])]);
    assert_eq!(message, format!("no tensor '{B}', expected one because the configuration targets layers.0.q_proj"));
}

#[test]
fn an_extra_tensor_is_named() {
    for extra in [
        "base_model.model.layers.1.q_proj.lora_A.weight",
        "base_model.model.layers.0.k_proj.lora_A.weight",
        "base_model.model.layers.0.q_proj.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "layers.0.q_proj.lora_A.weight",
    ] {
        let message = refusal(CONFIG, &[zeros(A, [2, 4]), zeros(B, [3, 2]), zeros(extra, [2, 4])]);
        assert_eq!(
            message,
            format!("tensor '{extra}' belongs to no layer that the configuration targets in this model")
        );
    }
}

#[test]
fn an_adapter_for_another_base_says_layer_found_and_expected() {
    let message = refusal(CONFIG, &[zeros(A, [2, 8]), zeros(B, [3, 2])]);
    let expected = "has shape [2, 8], expected [2, 4] for layers.0.q_proj: an adapter for another base?";
    assert_eq!(message, format!("'{A}' {expected}"));
    let message = refusal(CONFIG, &[zeros(A, [2, 4]), zeros(B, [6, 2])]);
    let expected = "has shape [6, 2], expected [3, 2] for layers.0.q_proj: an adapter for another base?";
    assert_eq!(message, format!("'{B}' {expected}"));
}

#[test]
fn a_rank_that_is_not_the_configurations_is_refused() {
    let message = refusal(CONFIG, &[zeros(A, [5, 4]), zeros(B, [3, 5])]);
    assert_eq!(message, format!("'{A}' has rank 5, expected 2 by the configuration"));
    let message = refusal(CONFIG, &[zeros(A, [2, 4]), zeros(B, [3, 5])]);
    assert_eq!(message, format!("'{B}' has rank 5, expected 2 by the configuration"));
    let pattern = CONFIG.replace("\"r\": 2", "\"r\": 2, \"rank_pattern\": {\"q_proj\": 5}");
    let message = refusal(&pattern, &[zeros(A, [2, 4]), zeros(B, [3, 2])]);
    assert_eq!(message, format!("'{A}' has rank 2, expected 5 by the configuration"));
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_their_place() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut b = zeros(B, [3, 2]);
        b.2[4] = value;
        let message = refusal(CONFIG, &[zeros(A, [2, 4]), b]);
        assert_eq!(message, format!("element 4 of '{B}' is {shown}, expected a finite number"));
    }
}

#[test]
fn missing_and_truncated_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = || AdapterFolder::open(folder.path()).unwrap_err().to_string();
    assert!(message().contains("adapter_config.json: cannot read: "));
    std::fs::write(folder.path().join("adapter_config.json"), CONFIG).unwrap();
    assert!(message().contains("adapter_model.safetensors: cannot open: "));

    write_adapter(folder.path(), CONFIG, &[zeros(A, [2, 4]), zeros(B, [3, 2])]);
    let path = folder.path().join("adapter_model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(message().contains("adapter_model.safetensors: "), "{length} bytes");
    }
}

#[test]
fn tensors_of_16_bits_are_widened_exactly_and_other_types_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), CONFIG, &[]);
    let write = |dtype, a: &[u8], b: &[u8]| {
        let specs = vec![Spec::new(A, dtype, [2, 4]), Spec::new(B, dtype, [3, 2])];
        let mut writer = Writer::create(&folder.path().join("adapter_model.safetensors"), specs).unwrap();
        writer.write(A, a).unwrap();
        writer.write(B, b).unwrap();
        writer.finish().unwrap();
    };
    let values: Vec<bf16> = (0..8).map(|i| bf16::from_f32(0.1 * i as f32)).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    write(DType::Bf16, &bytes, &bytes[..12]);
    let (model, attached) = attach(folder.path());
    attached.unwrap();
    let a = model[0].adapter().unwrap().a().tensor();
    let a: Vec<f32> = reference().download(a.view()).unwrap();
    assert_eq!(a, values.iter().map(|x| x.to_f32()).collect::<Vec<_>>());

    write(DType::I64, &[0; 64], &[0; 48]);
    let message = attach(folder.path()).1.unwrap_err().to_string();
    assert!(message.ends_with(&format!("'{A}' is i64, expected f32 or bf16 or f16")), "{message}");
}

#[test]
fn a_folder_that_cannot_be_made_or_written_is_named() {
    let backend = reference();
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), CONFIG, &[zeros(A, [2, 4]), zeros(B, [3, 2])]);
    let (model, attached) = attach(folder.path());
    let attached = attached.unwrap();
    let inside_a_file = folder.path().join("adapter_config.json/x");
    let message =
        write_folder(backend.as_ref(), &inside_a_file, &attached.config, &model, Vec::new(), Purpose::Exchange)
            .unwrap_err()
            .to_string();
    assert!(message.starts_with(&format!("{}: cannot create the folder: ", inside_a_file.display())), "{message}");

    let made = folder.path().join("a/b");
    write_folder(backend.as_ref(), &made, &attached.config, &model, Vec::new(), Purpose::Exchange).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(&made).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"], "and no temporary");
    assert!(attach(&made).1.is_ok());
}
