//! 4-bit weights: written and read back, every part that can be wrong, and bitsandbytes' own files.

use half::bf16;
use proptest::prelude::*;
use rankfold_backend::{Backend, DType, DynamicMap, Format, Quantized, Scales};
use rankfold_files::{Checkpoint, Error, QuantState, Spec, Writer, quantized};
use rankfold_reference::ReferenceBackend;
use std::fs;
use std::path::{Path, PathBuf};

const CPU: &dyn Backend = &ReferenceBackend;

/// Codes, scales (codes and nested ones where there are such) and offset, for comparison.
fn parts(weight: &Quantized) -> (Vec<u8>, Vec<u8>, Vec<f32>, Option<u32>) {
    let codes = CPU.download(weight.codes.view()).unwrap();
    match &weight.scales {
        Scales::Plain(absmax) => (codes, vec![], CPU.download(absmax.view()).unwrap(), None),
        Scales::Nested { codes: scale_codes, absmax, offset } => (
            codes,
            CPU.download(scale_codes.view()).unwrap(),
            CPU.download(absmax.view()).unwrap(),
            Some(offset.to_bits()),
        ),
    }
}

fn quantize(values: &[f32], shape: [usize; 2], format: Format, block: usize, double: bool) -> Quantized {
    let w = CPU.upload(values).unwrap();
    Quantized::quantize(CPU, w.view(), shape, format, block, double).unwrap()
}

fn write(path: &Path, weight: &Quantized, dtype: DType) -> Result<(), Error> {
    let double = matches!(weight.scales, Scales::Nested { .. });
    let mut specs = quantized::specs("w", weight.shape, weight.format, weight.block, double);
    specs.push(Spec::new("norm", DType::Bf16, [3]));
    let mut writer = Writer::create(path, specs)?;
    quantized::write(&mut writer, "w", CPU, weight, dtype)?;
    writer.write("norm", bytemuck::cast_slice(&[bf16::ONE; 3]))?;
    writer.finish()
}

proptest! {
    #[test]
    fn a_weight_survives_its_file(
        (shape, values) in prop::array::uniform2(1usize..40)
            .prop_flat_map(|shape| (Just(shape), prop::collection::vec(-2f32..2.0, shape[0] * shape[1]))),
        format in prop::sample::select(Format::ALL.to_vec()),
        log_block in 5u32..=12,
        double in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
    ) {
        let weight = quantize(&values, shape, format, 1 << log_block, double);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, &weight, dtype).unwrap();

        let checkpoint = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(quantized::weights(&checkpoint), ["w"]);
        let mut names = quantized::side_names("w", format, double);
        names.extend(["norm".into(), "w".into()]);
        names.sort();
        prop_assert!(checkpoint.names().eq(names.iter()));
        prop_assert!(quantized::load(&checkpoint, "norm", CPU).unwrap().is_none());
        let read = quantized::load(&checkpoint, "w", CPU).unwrap().unwrap();
        prop_assert_eq!((read.dtype, read.weight.format, read.weight.block), (dtype, format, 1 << log_block));
        prop_assert_eq!(read.weight.shape, shape);
        prop_assert_eq!(parts(&read.weight), parts(&weight));
    }

    #[test]
    fn a_tensor_goes_through_a_backend_unchanged(values in prop::collection::vec(any::<i64>(), 0..50)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let mut writer = Writer::create(&path, vec![Spec::new("x", DType::I64, [values.len()])]).unwrap();
        writer.write_view("x", CPU, CPU.upload(&values).unwrap().view()).unwrap();
        writer.finish().unwrap();
        let buffer = Checkpoint::open(&path).unwrap().load("x", CPU).unwrap();
        prop_assert_eq!(CPU.download::<i64>(buffer.view()).unwrap(), values);
    }
}

/// Larger than the part in which a copy goes, and no multiple of it.
#[test]
fn a_large_tensor_is_copied_part_by_part() {
    let values: Vec<u32> = (0..1_500_001u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("1.safetensors"), folder.path().join("2.safetensors"));
    let spec = || vec![Spec::new("x", DType::U32, [values.len()])];
    let mut writer = Writer::create(&first, spec()).unwrap();
    writer.write_view("x", CPU, CPU.upload(&values).unwrap().view()).unwrap();
    writer.finish().unwrap();
    let mut writer = Writer::create(&second, spec()).unwrap();
    writer.copy("x", &Checkpoint::open(&first).unwrap()).unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::read(&first).unwrap(), fs::read(&second).unwrap());
    let checkpoint = Checkpoint::open(&second).unwrap();
    assert_eq!(checkpoint.read::<u32>("x").unwrap(), values);
    assert_eq!(CPU.download::<u32>(checkpoint.load("x", CPU).unwrap().view()).unwrap(), values);

    let mut writer = Writer::create(&second, vec![Spec::new("x", DType::F32, [values.len()])]).unwrap();
    let error = writer.write_view("x", CPU, CPU.upload(&values).unwrap().view()).unwrap_err();
    assert!(error.to_string().contains("'x': given as u32, declared as f32"), "{error}");
}

/// The tensors of a double-quantised weight [8, 80] in blocks of 64, as a list that tests break.
fn whole() -> Vec<(String, DType, Vec<usize>, Vec<u8>)> {
    let values: Vec<f32> = (0..640).map(|i| ((i * 37 % 101) as f32 - 50.0) / (1 + i / 64) as f32).collect();
    let (codes, scale_codes, absmax, offset) = parts(&quantize(&values, [8, 80], Format::Nf4, 64, true));
    let state = QuantState {
        format: Format::Nf4,
        block: 64,
        dtype: DType::F32,
        shape: [8, 80],
        offset: offset.map(f32::from_bits),
    };
    let f32s = |x: &[f32]| bytemuck::cast_slice(x).to_vec();
    let json = state.to_json().into_bytes();
    let tensor = |name: &str, dtype, shape: &[usize], bytes| (name.to_string(), dtype, shape.to_vec(), bytes);
    vec![
        tensor("w", DType::U8, &[320, 1], codes),
        tensor("w.absmax", DType::U8, &[10], scale_codes),
        tensor("w.quant_map", DType::F32, &[16], f32s(Format::Nf4.values())),
        tensor("w.nested_absmax", DType::F32, &[1], f32s(&absmax)),
        tensor("w.nested_quant_map", DType::F32, &[256], f32s(DynamicMap::Signed.values())),
        tensor("w.quant_state.bitsandbytes__nf4", DType::U8, &[json.len()], json),
    ]
}

type Tensor = (String, DType, Vec<usize>, Vec<u8>);

fn load(tensors: &[Tensor]) -> Result<Option<quantized::Loaded>, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let specs = tensors.iter().map(|(name, dtype, shape, _)| Spec::new(name, *dtype, shape.clone()));
    let mut writer = Writer::create(&path, specs.collect()).unwrap();
    for (name, _, _, bytes) in tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
    quantized::load(&Checkpoint::open(&path).unwrap(), "w", CPU)
}

#[test]
fn every_part_of_a_weight_is_checked() {
    assert!(load(&whole()).unwrap().is_some());
    let broken = |tensor: usize, change: &dyn Fn(&mut Tensor)| {
        let mut tensors = whole();
        change(&mut tensors[tensor]);
        load(&tensors).unwrap_err().to_string()
    };
    let check = |error: String, message: &str| assert!(error.contains(message), "{error}\n  lacks: {message}");
    let json = |whole: &'static str, broken: &'static str| {
        move |(_, _, shape, bytes): &mut Tensor| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(whole), "{whole}");
            *bytes = text.replacen(whole, broken, 1).into_bytes();
            *shape = vec![bytes.len()];
        }
    };
    let short = |t: &mut Tensor| {
        t.2[0] -= 1;
        t.3.truncate(t.3.len() - t.1.size());
    };
    let longer = |t: &mut Tensor| {
        t.2[0] += 1;
        t.3.extend(vec![0; t.1.size()]);
    };
    for change in [&short as &dyn Fn(&mut Tensor), &longer] {
        check(broken(0, change), "expected 320 bytes of U8 for shape [8, 80]");
        check(broken(1, change), "'w.absmax' has shape");
        check(broken(2, change), "'w.quant_map' has shape");
        check(broken(3, change), "'w.nested_absmax' has shape");
        check(broken(4, change), "'w.nested_quant_map' has shape");
    }
    check(broken(0, &|t| (t.1, t.2) = (DType::Bf16, vec![160, 1])), "its codes are BF16 [160, 1]");
    check(broken(1, &|t| (t.1, t.3) = (DType::F32, vec![0; 40])), "'w.absmax' is f32, expected u8");
    check(broken(2, &|t| t.3[0] ^= 1), "'quant_map' holds -1");
    check(broken(2, &|t| t.3[28..32].copy_from_slice(&(-0f32).to_le_bytes())), "'quant_map' holds -0 at 7");
    check(broken(4, &|t| t.3[1020] ^= 1), "'nested_quant_map' holds 1");
    check(broken(3, &|t| t.3.copy_from_slice(&f32::NAN.to_le_bytes())), "'nested_absmax' holds NaN at 0");
    check(broken(3, &|t| t.3.copy_from_slice(&(-1f32).to_le_bytes())), "'nested_absmax' holds -1 at 0");
    check(broken(5, &json("[8, 80]", "[7, 91]")), "expected 319 bytes of U8");
    check(broken(5, &json("[8, 80]", "[4294967295, 4294967296]")), "'w.absmax' has shape [10], expected [");
    check(broken(5, &json("[8, 80]", "[4294967296, 4294967296]")), "more elements than a machine can hold");
    check(broken(5, &json(": 64,", ": 0,")), "blocksize 0, expected a power of two");
    check(broken(5, &json("\"nested_blocksize\": 256, ", "")), "nested_blocksize None");
    check(
        broken(5, &json("\"nested_offset\": ", "\"nested_offset\": NaN")),
        "4-bit weight 'w': its quantisation state",
    );
    check(broken(5, &json("\"nested_offset\": ", "\"nested_offset\": 1e39, \"was\": ")), "beyond the range of f32");
    check(broken(5, &json("\"float32\", \"shape", "\"float64\", \"shape")), "dtype 'float64'");
    check(broken(5, &json(": 64,", ": 128,")), "'w.absmax' has shape [10], expected [5]");
    check(broken(5, &json("\"nf4\"", "\"fp4\"")), "quant_type fp4, expected nf4 as in");
    check(broken(5, &json("\"nf4\"", "\"nf5\"")), "unknown 4-bit format 'nf5'");
    check(broken(5, &|t| t.3[0] = 0xff), "4-bit weight 'w': its quantisation state");
    check(broken(5, &|t| (t.1, t.2, t.3) = (DType::F32, vec![1], vec![0; 4])), "is f32, expected u8");
    for tensor in 0..5 {
        let mut tensors = whole();
        let (name, ..) = tensors.remove(tensor);
        check(load(&tensors).unwrap_err().to_string(), &format!("no tensor '{name}'"));
    }
    let mut tensors = whole();
    tensors.pop();
    assert!(load(&tensors).unwrap().is_none(), "without a state it is a tensor of bytes");

    let mut two = whole();
    let fp4 = String::from_utf8(two[5].3.clone()).unwrap().replace("nf4", "fp4").into_bytes();
    two.push(("w.quant_state.bitsandbytes__fp4".into(), DType::U8, vec![fp4.len()], fp4));
    check(load(&two).unwrap_err().to_string(), "the states of two formats");
}

/// As a file of any other maker might: our writer refuses it.
#[test]
fn a_weight_with_a_part_twice_is_refused() {
    let mut header = String::from("{");
    let (mut data, mut parts) = (Vec::new(), whole());
    parts.push(parts[1].clone());
    for (name, dtype, shape, bytes) in &parts {
        let dtype = if *dtype == DType::U8 { "U8" } else { "F32" };
        let range = [data.len(), data.len() + bytes.len()];
        header += &format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{range:?}}},"#);
        data.extend_from_slice(bytes);
    }
    header.pop();
    header.push('}');
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(matches!(&error, Error::Duplicate { tensor, .. } if tensor == "w.absmax"), "{error}");
}

#[test]
fn a_plain_weight_with_nested_tensors_is_refused() {
    let mut tensors = whole();
    let state = QuantState { format: Format::Nf4, block: 64, dtype: DType::F32, shape: [8, 80], offset: None };
    let json = state.to_json().into_bytes();
    (tensors[5].2, tensors[5].3) = (vec![json.len()], json);
    (tensors[1].1, tensors[1].3) = (DType::F32, vec![0; 40]);
    let error = load(&tensors).unwrap_err().to_string();
    assert!(error.contains("no nested fields, but there is 'w.nested_absmax'"), "{error}");
    tensors.drain(3..5);
    assert!(load(&tensors).unwrap().is_some());
    tensors[1].3[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = load(&tensors).unwrap_err().to_string();
    assert!(error.contains("'absmax' holds inf at 2, expected finite"), "{error}");
    tensors[1].3[8..12].copy_from_slice(&(-0.5f32).to_le_bytes());
    let error = load(&tensors).unwrap_err().to_string();
    assert!(error.contains("'absmax' holds -0.5 at 2, expected finite numbers of at least 0"), "{error}");
}

/// Every stored part is finite; block 4's code is the map's last value, 1, so its scale is nested + offset.
#[test]
fn a_nested_scale_that_decodes_to_infinity_is_refused_with_its_block() {
    let mut tensors = whole();
    tensors[1].3.fill(127);
    tensors[1].3[4] = 255;
    tensors[3].3.copy_from_slice(&2e38f32.to_le_bytes());
    let state = |offset| {
        let state = QuantState { format: Format::Nf4, block: 64, dtype: DType::F32, shape: [8, 80], offset };
        state.to_json().into_bytes()
    };
    for (offset, scale) in [(2e38, "inf"), (1e38, "")] {
        let json = state(Some(offset));
        (tensors[5].2, tensors[5].3) = (vec![json.len()], json);
        match load(&tensors) {
            Ok(_) => assert_eq!(scale, ""),
            Err(error) => {
                let text =
                    format!("'w': block 4: its double-quantised scale decodes to {scale}, expected a finite number");
                assert!(error.to_string().ends_with(&text), "{error}");
                assert_eq!(scale, "inf");
            }
        }
    }
}

#[test]
fn a_weight_that_contradicts_itself_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let weight = || quantize(&[0.5; 64], [2, 32], Format::Int4, 32, true);
    let error = |weight: Quantized, dtype| write(&path, &weight, dtype).unwrap_err().to_string();
    assert!(error(weight(), DType::U8).contains("'w': dtype u8, expected f32, bf16 or f16"));
    assert!(
        error(Quantized { shape: [2, 64], ..weight() }, DType::F32).contains("'codes' has 32 elements, expected 64")
    );
    let Quantized { codes, scales: Scales::Nested { codes: scale_codes, absmax, .. }, .. } = weight() else { panic!() };
    let scales = Scales::Nested { codes: scale_codes, absmax, offset: f32::NAN };
    let nan = Quantized { codes, scales, ..weight() };
    assert!(error(nan, DType::F32).contains("the mean of its scales is NaN"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The vectors: of the folder that the variable names, else the project's copy.
fn golden() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("RANKFOLD_GOLDEN").map_or_else(own, PathBuf::from)
}

const RUNS: [&str; 3] = ["qlora_nf4_dq", "qlora_nf4", "qlora_fp4_dq"];

#[test]
fn golden_checkpoints_copied_tensor_by_tensor_are_the_same_files() {
    let folder = tempfile::tempdir().unwrap();
    for run in RUNS {
        let source = golden().join(run).join("checkpoint");
        let copy = folder.path().join("model.safetensors");
        let checkpoint = Checkpoint::open(&source).unwrap();
        let spec = |name: &str| Spec::new(name, checkpoint.dtype(name).unwrap(), &*checkpoint.get(name).unwrap().shape);
        let mut writer = Writer::create(&copy, checkpoint.names().map(spec).collect()).unwrap();
        for name in checkpoint.names() {
            writer.copy(name, &checkpoint).unwrap();
        }
        writer.finish().unwrap();
        assert!(fs::read(copy).unwrap() == fs::read(source.join("model.safetensors")).unwrap(), "{run}");
    }
}

#[test]
fn golden_weights_read_and_written_again_are_the_same_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("model.safetensors");
    for run in RUNS {
        let checkpoint = Checkpoint::open(&golden().join(run).join("checkpoint")).unwrap();
        let names = quantized::weights(&checkpoint);
        assert!(!names.is_empty(), "{run}");
        let loaded = |name: &&str| (name.to_string(), quantized::load(&checkpoint, name, CPU).unwrap().unwrap());
        let weights: Vec<_> = names.iter().map(loaded).collect();

        let mut specs = Vec::new();
        let mut rest: Vec<&str> = checkpoint.names().collect();
        for (name, quantized::Loaded { weight, .. }) in &weights {
            let double = matches!(weight.scales, Scales::Nested { .. });
            specs.extend(quantized::specs(name, weight.shape, weight.format, weight.block, double));
            let sides = quantized::side_names(name, weight.format, double);
            rest.retain(|other| other != name && !sides.iter().any(|side| side == other));
        }
        specs.extend(rest.iter().map(|name| {
            Spec::new(*name, checkpoint.dtype(name).unwrap(), checkpoint.get(name).unwrap().shape.clone())
        }));
        let mut writer = Writer::create(&copy, specs).unwrap();
        for (name, loaded) in &weights {
            quantized::write(&mut writer, name, CPU, &loaded.weight, loaded.dtype).unwrap();
        }
        for name in rest {
            writer.copy(name, &checkpoint).unwrap();
        }
        writer.finish().unwrap();

        let again = Checkpoint::open(&copy).unwrap();
        assert!(again.names().eq(checkpoint.names()), "{run}");
        for name in checkpoint.names() {
            let (before, after) = (checkpoint.get(name).unwrap(), again.get(name).unwrap());
            assert_eq!((before.stored, &before.shape), (after.stored, &after.shape), "{run}: {name}");
            let bytes = |checkpoint: &Checkpoint| {
                let mut bytes = vec![0; before.bytes];
                checkpoint.read_into(name, &mut bytes).unwrap();
                bytes
            };
            assert!(bytes(&checkpoint) == bytes(&again), "{run}: {name}");
        }
    }
}

#[test]
fn golden_weights_dequantise_to_the_peers_values() {
    for run in RUNS {
        let folder = golden().join(run);
        let checkpoint = Checkpoint::open(&folder.join("checkpoint")).unwrap();
        let peer = Checkpoint::open(&folder.join("base_io.safetensors")).unwrap();
        for name in quantized::weights(&checkpoint) {
            let quantized::Loaded { weight, dtype } = quantized::load(&checkpoint, name, CPU).unwrap().unwrap();
            let mut ours = CPU.alloc(dtype, weight.elements()).unwrap();
            CPU.dequantize_4bit(&weight, ours.view_mut()).unwrap();
            let mut ours_bytes = vec![0; ours.bytes()];
            CPU.read(ours.view(), &mut ours_bytes).unwrap();
            let key = format!("dequant.{name}");
            peer.expect(&key, &[dtype], &weight.shape).unwrap();
            let mut theirs = vec![0; peer.get(&key).unwrap().bytes];
            peer.read_into(&key, &mut theirs).unwrap();
            assert!(ours_bytes == theirs, "{run}: {name}");
        }
    }
}
