//! Reading: round trips through the writer, every lie a header can tell, and what corruption must never do.

use half::{bf16, f16};
use proptest::prelude::*;
use rankfold_backend::DType;
use rankfold_files::{Checkpoint, Error, Spec, Writer};
use safetensors::tensor::{SafeTensors, TensorView, serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder with one file in it.
fn folder_with(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// A safetensors file of this header and data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn open_error(bytes: &[u8]) -> Error {
    let (_folder, path) = folder_with("x.safetensors", bytes);
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
    error
}

const TWO: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},"__metadata__":{"a":"b"}}"#;

#[test]
fn every_lie_of_a_header_is_a_typed_error() {
    let (_folder, path) = folder_with("x.safetensors", &file(TWO, 11));
    assert_eq!(Checkpoint::open(&path).unwrap().names().collect::<Vec<_>>(), ["a", "b"]);

    let with = |whole: &str, broken: &str| {
        assert!(TWO.contains(whole), "{whole}");
        open_error(&file(&TWO.replacen(whole, broken, 1), 11))
    };
    let lying = |error: Error, name: &str, message: &str| {
        let Error::Lying { tensor, why, .. } = &error else { panic!("{error:?}") };
        assert!(tensor == name && why.contains(message), "{error}");
    };
    lying(with("[0,8]", "[8,0]"), "a", "data_offsets 8..0");
    lying(with("[0,8]", "[0,7]"), "a", "expected 8 bytes for F32 [2]");
    lying(with("[0,8]", "[4,12]"), "a", "begins at byte 4, expected 0");
    lying(with("[8,11]", "[7,10]"), "b", "begins at byte 7, expected 8");
    lying(with("[2]", "[3]"), "a", "expected 12 bytes");
    lying(with("[2]", "[]"), "a", "expected 4 bytes");
    lying(with("[2]", "[4294967296,4294967296,4]"), "a", "a machine can hold");
    lying(with(r#""U8","shape":[3]"#, r#""F4","shape":[5]"#), "b", "whole number of bytes");
    assert!(matches!(with("F32", "F33"), Error::UnknownDType { tensor, dtype, .. } if tensor == "a" && dtype == "F33"));
    assert!(matches!(with(r#""b":"#, r#""a":"#), Error::Duplicate { tensor, .. } if tensor == "a"));
    for (whole, broken, message) in [
        ("[2]", "[-2]", "tensor 'a'"),
        ("[2]", "[2.5]", "tensor 'a'"),
        ("[2]", "[18446744073709551616]", "tensor 'a'"),
        ("[0,8]", "[0,8,9]", "tensor 'a'"),
        (r#""dtype":"U8","#, "", "tensor 'b': missing field `dtype`"),
        (r#""shape":[3]"#, r#""dtype":"U8""#, "tensor 'b': duplicate field"),
        ("{", "[", "expected an object keyed by tensor names"),
        (
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#,
            r#"["F32",[2],[0,8]]"#,
            "'a': invalid type: sequence, expected an object",
        ),
        (r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, "null", "'a': invalid type: null, expected an object"),
        ("[0,8]", "[0]", "'a': invalid length 1, expected an array of length 2"),
        (r#""b"}}"#, r#""b"}"#, "EOF"),
    ] {
        let error = with(whole, broken);
        assert!(matches!(&error, Error::Header { why, .. } if why.contains(message)), "{error}");
    }
    let mut not_utf8 = file(TWO, 11);
    not_utf8[10] = 0xff;
    assert!(matches!(open_error(&not_utf8), Error::Header { .. }));
}

#[test]
fn a_length_is_compared_with_the_file_before_it_is_believed() {
    assert!(matches!(open_error(b""), Error::Truncated { expected: 8, found: 0, .. }));
    assert!(matches!(open_error(&[1; 7]), Error::Truncated { expected: 8, found: 7, .. }));
    assert!(matches!(open_error(&[0xff; 8]), Error::Header { why, .. } if why.contains("claims")));
    let mut claim = file(TWO, 11);
    claim[..8].copy_from_slice(&99_999_999u64.to_le_bytes());
    assert!(matches!(open_error(&claim), Error::Truncated { expected: 100_000_007, .. }));
    assert!(matches!(open_error(&file(TWO, 10)), Error::Truncated { .. }));
    assert!(matches!(open_error(&file(TWO, 12)), Error::Header { why, .. } if why.contains("1 bytes follow")));
    let huge = r#"{"a":{"dtype":"U8","shape":[2000000000000000000],"data_offsets":[0,2000000000000000000]}}"#;
    assert!(matches!(open_error(&file(huge, 16)), Error::Truncated { .. }));
}

#[test]
fn a_path_that_is_no_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    assert!(matches!(Checkpoint::open(&missing), Err(Error::Io { path, .. }) if path == missing));
    assert!(matches!(Checkpoint::open(folder.path()), Err(Error::NoCheckpoint { path }) if path == folder.path()));
    assert!(
        matches!(Checkpoint::open(Path::new("/dev/null")), Err(Error::Header { why, .. }) if why.contains("regular"))
    );
}

#[test]
fn a_tensor_of_another_type_shape_or_length_is_refused_when_asked_for() {
    let header = r#"{"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},"f":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}}"#;
    let (_folder, path) = folder_with("x.safetensors", &file(header, 8));
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.get("i").unwrap().bytes, 4);
    let message = |error: Error| error.to_string().replace(&format!("{}: ", path.display()), "");
    let unserved = "tensor 'i' is I32, expected F32, BF16, F16, F64, U8, U32 or I64";
    assert_eq!(message(checkpoint.read::<u32>("i").unwrap_err()), unserved);
    assert_eq!(message(checkpoint.read::<f32>("f").unwrap_err()), "tensor 'f' is f16, expected f32");
    assert_eq!(message(checkpoint.read::<f32>("g").unwrap_err()), "no tensor 'g'");
    let floats = [DType::F32, DType::Bf16];
    assert_eq!(
        message(checkpoint.expect("f", &floats, &[2, 1]).unwrap_err()),
        "tensor 'f' is f16, expected f32 or bf16"
    );
    let error = checkpoint.expect("f", &[DType::F16], &[1, 2]).unwrap_err();
    assert_eq!(message(error), "tensor 'f' has shape [2, 1], expected [1, 2]");
    let range = |offset, len| message(checkpoint.read_range_into("f", offset, &mut vec![0; len]).unwrap_err());
    assert_eq!(range(1, 4), "tensor 'f': bytes 1..1+4 were asked of 4");
    assert_eq!(range(usize::MAX, 4), format!("tensor 'f': bytes {0}..{0}+4 were asked of 4", usize::MAX));
    assert!(matches!(checkpoint.read_into("f", &mut [0; 3]), Err(Error::Range { len: 3, bytes: 4, .. })));
}

#[test]
fn a_file_truncated_after_opening_is_an_error_when_read() {
    let (_folder, path) = folder_with("x.safetensors", &file(TWO, 11));
    let checkpoint = Checkpoint::open(&path).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(file(TWO, 9).len() as u64).unwrap();
    assert_eq!(checkpoint.read::<f32>("a").unwrap().len(), 2);
    assert!(matches!(checkpoint.read::<u8>("b"), Err(Error::Io { path: named, .. }) if named == path));
}

/// A folder of two shards and this index.
fn shards(index: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let one =
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}"#;
    let two = r#"{"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    fs::write(folder.path().join("1.safetensors"), file(one, 2)).unwrap();
    fs::write(folder.path().join("2.safetensors"), file(two, 2)).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn an_index_is_followed_to_its_shards() {
    let folder = shards(r#"{"metadata":{"total_size":3},"weight_map":{"b":"2.safetensors","a":"1.safetensors"}}"#);
    for path in [folder.path().into(), folder.path().join("model.safetensors.index.json")] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.file("b"), folder.path().join("2.safetensors"));
        assert_eq!(checkpoint.read::<u8>("b").unwrap(), [7, 7]);
        assert_eq!(checkpoint.read::<u8>("a").unwrap(), [7]);
    }
}

#[test]
fn an_index_that_lies_is_a_typed_error() {
    let error = |index: &str| Checkpoint::open(shards(index).path()).unwrap_err();
    let lacks = error(r#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors"}}"#);
    assert!(
        matches!(&lacks, Error::ShardLacks { tensor, path, .. } if tensor == "b" && path.ends_with("1.safetensors"))
    );
    let missing = error(r#"{"weight_map":{"a":"1.safetensors","b":"3.safetensors"}}"#);
    assert!(matches!(&missing, Error::Io { path, .. } if path.ends_with("3.safetensors")), "{missing}");
    let twice = error(r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#);
    assert!(matches!(twice, Error::Duplicate { tensor, .. } if tensor == "a"));
    for outside in ["../1.safetensors", "/1.safetensors", "..", "", "a/../1.safetensors"] {
        let error = error(&format!(r#"{{"weight_map":{{"a":"{outside}"}}}}"#));
        assert!(matches!(&error, Error::Index { why, .. } if why.contains("file beside it")), "{error}");
    }
    for broken in [
        "",
        "{}",
        "[]",
        r#"[{"a":"1.safetensors"}]"#,
        r#"{"weight_map":{"a":1}}"#,
        r#"{"weight_map":{},"weight_map":{}}"#,
    ] {
        assert!(matches!(error(broken), Error::Index { .. }));
    }
}

#[test]
fn bf16_and_f16_are_read_as_the_same_f32() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values = [1.0f32, -0.375, 65504.0, 0.0];
    let specs = [("s", DType::F32), ("b", DType::Bf16), ("h", DType::F16), ("d", DType::F64)];
    let mut writer = Writer::create(&path, specs.map(|(name, dtype)| Spec::new(name, dtype, [2, 2])).into()).unwrap();
    writer.write("s", bytemuck::cast_slice(&values)).unwrap();
    writer.write("b", bytemuck::cast_slice(&values.map(bf16::from_f32))).unwrap();
    writer.write("h", bytemuck::cast_slice(&values.map(f16::from_f32))).unwrap();
    writer.write("d", bytemuck::cast_slice(&values.map(f64::from))).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.read_f32("s").unwrap(), values);
    assert_eq!(checkpoint.read_f32("h").unwrap(), values);
    assert_eq!(checkpoint.read_f32("b").unwrap(), values.map(|x| bf16::from_f32(x).to_f32()));
    assert_eq!(checkpoint.read::<f64>("d").unwrap(), values.map(f64::from));
    assert!(matches!(checkpoint.read_f32("d"), Err(Error::DType { found: DType::F64, .. })));
}

const DTYPES: [(DType, safetensors::Dtype); 7] = [
    (DType::F32, safetensors::Dtype::F32),
    (DType::Bf16, safetensors::Dtype::BF16),
    (DType::F16, safetensors::Dtype::F16),
    (DType::F64, safetensors::Dtype::F64),
    (DType::U8, safetensors::Dtype::U8),
    (DType::U32, safetensors::Dtype::U32),
    (DType::I64, safetensors::Dtype::I64),
];

/// Names, types, shapes (scalars and empty ones too) and a seed of the bytes.
fn tensors() -> impl Strategy<Value = BTreeMap<String, (usize, Vec<usize>, u8)>> {
    let shape = prop::collection::vec(0usize..5, 0..4);
    prop::collection::btree_map("[a-z.\"\\\\é_]{0,8}", (0..DTYPES.len(), shape, any::<u8>()), 0..8)
}

fn bytes_of(dtype: usize, shape: &[usize], seed: u8) -> Vec<u8> {
    let len = shape.iter().product::<usize>() * DTYPES[dtype].0.size();
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

proptest! {
    #[test]
    fn what_is_written_is_read_and_is_what_the_safetensors_library_writes(
        tensors in tensors(),
        order in any::<u64>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let specs = tensors.iter().map(|(name, (dtype, shape, _))| Spec::new(name, DTYPES[*dtype].0, shape.clone()));
        let mut writer = Writer::create(&path, specs.collect()).unwrap();
        let bytes: BTreeMap<_, _> =
            tensors.iter().map(|(name, (dtype, shape, seed))| (name, bytes_of(*dtype, shape, *seed))).collect();
        // In any order.
        let mut names: Vec<_> = tensors.keys().collect();
        names.rotate_left(order as usize % tensors.len().max(1));
        for name in names {
            writer.write(name, &bytes[name]).unwrap();
        }
        writer.finish().unwrap();

        let views = tensors.iter().map(|(name, (dtype, shape, _))| {
            (name, TensorView::new(DTYPES[*dtype].1, shape.clone(), &bytes[name]).unwrap())
        });
        let format = HashMap::from([("format".to_string(), "pt".to_string())]);
        prop_assert_eq!(fs::read(&path).unwrap(), serialize(views, Some(format)).unwrap());

        let checkpoint = Checkpoint::open(&path).unwrap();
        prop_assert!(checkpoint.names().eq(tensors.keys()));
        for (name, (dtype, shape, _)) in &tensors {
            prop_assert_eq!(checkpoint.expect(name, &[DTYPES[*dtype].0], shape).unwrap(), DTYPES[*dtype].0);
            let mut read = vec![0; bytes[name].len()];
            checkpoint.read_into(name, &mut read).unwrap();
            prop_assert_eq!(&read, &bytes[name]);
            let middle = read.len() / 3..read.len() / 2;
            let mut part = vec![0; middle.len()];
            checkpoint.read_range_into(name, middle.start, &mut part).unwrap();
            prop_assert_eq!(&part, &bytes[name][middle]);
        }
    }

    #[test]
    fn a_text_of_any_length_up_to_its_bound_is_what_another_reader_finds(
        tensors in tensors(),
        lens in prop::collection::vec(0usize..400, 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let mut specs: Vec<_> =
            tensors.iter().map(|(name, (dtype, shape, _))| Spec::new(name, DTYPES[*dtype].0, shape.clone())).collect();
        specs.extend((0..lens.len()).map(|i| Spec::text(format!("text {i}"), 400)));
        let mut writer = Writer::create(&path, specs).unwrap();
        for (i, len) in lens.iter().enumerate() {
            writer.write(&format!("text {i}"), &vec![i as u8; *len]).unwrap();
        }
        for (name, (dtype, shape, seed)) in &tensors {
            writer.write(name, &bytes_of(*dtype, shape, *seed)).unwrap();
        }
        writer.finish().unwrap();

        let file = fs::read(&path).unwrap();
        let other = SafeTensors::deserialize(&file).unwrap();
        for (i, len) in lens.iter().enumerate() {
            prop_assert_eq!(other.tensor(&format!("text {i}")).unwrap().data(), vec![i as u8; *len]);
        }
        for (name, (dtype, shape, seed)) in &tensors {
            prop_assert_eq!(other.tensor(name).unwrap().data(), bytes_of(*dtype, shape, *seed));
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(checkpoint.names().count(), tensors.len() + lens.len());
    }

    /// No panic, and nothing accepted that is larger than the file it lies in; both readers then agree.
    #[test]
    fn corruption_is_an_error_or_a_consistent_file(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = file(TWO, 11);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let (_folder, path) = folder_with("x.safetensors", &bytes);
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            let names: Vec<_> = checkpoint.names().map(String::from).collect();
            prop_assert!(names.iter().map(|name| checkpoint.get(name).unwrap().bytes).sum::<usize>() <= bytes.len());
            let other = SafeTensors::deserialize(&bytes);
            for name in &names {
                let mut read = vec![0; checkpoint.get(name).unwrap().bytes];
                checkpoint.read_into(name, &mut read).unwrap();
                if let Ok(other) = &other {
                    prop_assert_eq!(other.tensor(name).unwrap().data(), read);
                }
            }
        }
    }
}
