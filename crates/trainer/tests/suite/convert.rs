//! Conversions hold one tensor at a time, from one file or from shards, and write the same bytes.

use rankfold_backend::{Backend, DType, Format, Quantized};
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

type Extra<'a> = (&'a str, DType, Vec<usize>, Vec<u8>);

/// The tensors of a checkpoint and some more, in another file.
fn extended(from: &Checkpoint, extras: &[Extra], folder: &Path) -> Checkpoint {
    fs::create_dir_all(folder).unwrap();
    let mut specs: Vec<_> = extras.iter().map(|(name, dtype, shape, _)| Spec::new(*name, *dtype, &**shape)).collect();
    specs.extend(from.names().map(|n| Spec::new(n, from.dtype(n).unwrap(), &*from.get(n).unwrap().shape)));
    let mut writer = Writer::create(&folder.join("model.safetensors"), specs).unwrap();
    for (name, _, _, bytes) in extras {
        writer.write(name, bytes).unwrap();
    }
    for name in from.names() {
        writer.copy(name, from).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(folder).unwrap()
}

/// Tables of old files, heads of other tasks; a name like a linear layer's does not make a layer of a vector.
#[test]
fn tensors_that_the_config_does_not_know_go_along_unchanged() {
    let place = tempfile::tempdir().unwrap();
    let [dense, more, four, back] = ["dense", "more", "four", "back"].map(|name| place.path().join(name));
    for folder in [&dense, &four, &back] {
        fs::create_dir(folder).unwrap();
    }
    let extras: [Extra; 3] = [
        ("rotary.inv_freq", DType::F64, vec![2], bytemuck::cast_slice(&[1.0f64, 0.5]).to_vec()),
        ("score.scale", DType::I64, vec![], 7i64.to_le_bytes().to_vec()),
        ("model.layers.12.mlp.up_proj.weight", DType::U8, vec![3], vec![1, 2, 3]),
    ];
    let backend = CpuBackend::new(Some(1));
    let whole = extended(&model(&dense, 1), &extras, &more);
    convert::quantize(&backend, &whole, &config(), HOW, &four).unwrap();
    let four = Checkpoint::open(&four).unwrap();
    convert::dequantize(&backend, &four, &config(), &back).unwrap();
    for checkpoint in [&four, &Checkpoint::open(&back).unwrap()] {
        for (name, dtype, shape, bytes) in &extras {
            checkpoint.expect(name, &[*dtype], shape).unwrap();
            let mut found = vec![0; bytes.len()];
            checkpoint.read_into(name, &mut found).unwrap();
            assert_eq!(found, *bytes, "{name}");
        }
    }
    assert!(Checkpoint::open(&back).unwrap().names().eq(whole.names()));
}

#[test]
fn parts_of_a_4_bit_weight_without_it_are_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let [dense, more, four, out] = ["dense", "more", "four", "out"].map(|name| place.path().join(name));
    for folder in [&dense, &four, &out] {
        fs::create_dir(folder).unwrap();
    }
    let backend = CpuBackend::new(Some(1));
    let whole = model(&dense, 1);
    convert::quantize(&backend, &whole, &config(), HOW, &four).unwrap();
    let four = Checkpoint::open(&four).unwrap();
    let orphans = ["x.absmax", "x.quant_map", "x.nested_absmax", "x.nested_quant_map", "x.quant_state.other__nf4"];
    for name in orphans.into_iter().chain(["model.norm.weight.absmax"]) {
        let extra = (name, DType::U8, vec![1], vec![0]);
        let checkpoint = extended(&whole, std::slice::from_ref(&extra), &more);
        let error = convert::quantize(&backend, &checkpoint, &config(), HOW, &out).unwrap_err().to_string();
        assert!(error.contains(&format!("'{name}' stands beside it")), "{error}");
        let checkpoint = extended(&four, &[extra], &more);
        let error = convert::dequantize(&backend, &checkpoint, &config(), &out).unwrap_err().to_string();
        assert!(error.contains(&format!("'{name}' stands beside it")), "{error}");
    }
}

/// 40 of 256 blocks are zeros, the others bf16's largest number, as in the test of `Quantized::quantize`.
#[test]
fn what_would_not_be_finite_is_not_written() {
    let place = tempfile::tempdir().unwrap();
    let [dense, more, four, out] = ["dense", "more", "four", "out"].map(|name| place.path().join(name));
    for folder in [&dense, &more, &four, &out] {
        fs::create_dir(folder).unwrap();
    }
    const NAME: &str = "model.layers.0.self_attn.q_proj.weight";
    let whole = model(&dense, 1);
    let mut values = vec![f32::from_bits(0x7f7f_0000); 128 * 128];
    values[..40 * 64].fill(0.0);
    let replace = |weight: &dyn Fn(&mut Writer), sides: Vec<Spec>| {
        let others: Vec<_> = whole.names().filter(|n| *n != NAME).collect();
        let spec = |n: &&str| Spec::new(*n, DType::F32, &*whole.get(n).unwrap().shape);
        let specs = others.iter().map(spec).chain(sides).collect();
        let mut writer = Writer::create(&more.join("model.safetensors"), specs).unwrap();
        weight(&mut writer);
        others.iter().for_each(|name| writer.copy(name, &whole).unwrap());
        writer.finish().unwrap();
        Checkpoint::open(&more).unwrap()
    };
    let backend = CpuBackend::new(Some(1));
    let huge = replace(
        &|writer| writer.write(NAME, bytemuck::cast_slice(&values)).unwrap(),
        vec![Spec::new(NAME, DType::F32, [128, 128])],
    );
    let error = convert::quantize(&backend, &huge, &config(), HOW, &four).unwrap_err().to_string();
    assert!(error.contains(&format!("'{NAME}': block 40: its double-quantised scale decodes to inf")), "{error}");
    let plain = Quantization { double: false, ..HOW };
    convert::quantize(&backend, &huge, &config(), plain, &four).unwrap();

    // Finite scales, but of a weight that says it was f16.
    let dense = (&backend as &dyn Backend).upload(&values).unwrap();
    let weight = Quantized::quantize(&backend, dense.view(), [128, 128], Format::Nf4, 64, false).unwrap();
    let wide = replace(
        &|writer| quantized::write(writer, NAME, &backend, &weight, DType::F16).unwrap(),
        quantized::specs(NAME, [128, 128], Format::Nf4, 64, false),
    );
    let error = convert::dequantize(&backend, &wide, &config(), &out).unwrap_err().to_string();
    assert!(error.contains(&format!("'{NAME}': element 2560 is NaN or infinite")), "{error}");
    assert!(!out.join("model.safetensors").exists());
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
