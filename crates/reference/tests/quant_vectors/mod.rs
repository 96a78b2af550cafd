//! The golden quantisation vectors, asked of any backend.
//!
//! They were made with bitsandbytes (`index.json` says which) and lie in the folder that `RANKFOLD_GOLDEN` names, or
//! in the project's own copy. Names, shapes, element types and blocks are read from the files, so another set of
//! the same layout passes or fails on its own merits.

use rankfold_backend::{Backend, Buffer, DType, DynamicMap, Format, NESTED_BLOCK, Quantized, Scales};
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;

/// The folder of the vectors.
fn folder() -> PathBuf {
    let own_copy = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../reference/tests/golden"));
    std::env::var_os("RANKFOLD_GOLDEN").map_or_else(own_copy, PathBuf::from)
}

fn read(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A tensor's values, whose element type must be the given one.
fn values<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(file: &SafeTensors, name: &str, dtype: Dtype) -> Vec<T> {
    let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(tensor.dtype(), dtype, "{name}");
    bytemuck::pod_collect_to_vec(tensor.data())
}

fn f32s(file: &SafeTensors, name: &str) -> Vec<f32> {
    values(file, name, Dtype::F32)
}

fn bytes(file: &SafeTensors, name: &str) -> Vec<u8> {
    values(file, name, Dtype::U8)
}

/// That two lists of numbers have the same bits, or where they part.
fn assert_same_bits<T: bytemuck::NoUninit + std::fmt::Debug>(what: &str, ours: &[T], theirs: &[T]) {
    assert_eq!(ours.len(), theirs.len(), "{what}: the number of elements");
    let differs = |i: &usize| bytemuck::bytes_of(&ours[*i]) != bytemuck::bytes_of(&theirs[*i]);
    if let Some(i) = (0..ours.len()).find(differs) {
        panic!("{what}: element {i} is {:?}, the vectors have {:?}", ours[i], theirs[i]);
    }
}

/// Every table of the contract equals the published one.
pub fn tables_equal_the_codebooks() {
    let file = read("codebooks.safetensors");
    let file = SafeTensors::deserialize(&file).unwrap();
    assert_same_bits("nf4", Format::Nf4.values(), &f32s(&file, "nf4"));
    assert_same_bits("fp4", Format::Fp4.values(), &f32s(&file, "fp4"));
    assert_same_bits("signed map", DynamicMap::Signed.values(), &f32s(&file, "dynamic_signed_8bit"));
    assert_same_bits("unsigned map", DynamicMap::Unsigned.values(), &f32s(&file, "dynamic_unsigned_8bit"));
}

/// A case of `quant4.safetensors`.
struct Case<'a> {
    name: &'a str,
    format: Format,
    block: usize,
    dtype: DType,
    /// The input's elements, as a matrix: [1, elements], which quantisation does not tell from any other shape.
    shape: [usize; 2],
    input: &'a [u8],
    file: &'a SafeTensors<'a>,
}

impl Case<'_> {
    fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    fn f32s(&self, suffix: &str) -> Vec<f32> {
        f32s(self.file, &self.tensor(suffix))
    }

    fn bytes(&self, suffix: &str) -> Vec<u8> {
        bytes(self.file, &self.tensor(suffix))
    }

    /// That `q` decodes to the file's tensor in the input's type.
    fn assert_decodes_to(&self, backend: &dyn Backend, q: &Quantized, suffix: &str) {
        let mut out = backend.alloc(self.dtype, q.elements()).unwrap();
        backend.dequantize_4bit(q, out.view_mut()).unwrap();
        let mut ours = vec![0; out.bytes()];
        backend.read(out.view(), &mut ours).unwrap();
        let name = self.tensor(suffix);
        let theirs = self.file.tensor(&name).unwrap();
        assert_eq!(ours.len(), theirs.data().len(), "{name}: bytes");
        let elements = |bytes: &[u8]| -> Vec<u32> {
            let bits = |element: &[u8]| element.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
            bytes.chunks(self.dtype.size()).map(bits).collect()
        };
        assert_same_bits(&name, &elements(&ours), &elements(theirs.data()));
    }
}

/// `check` on every case of the index; a set without cases is a failure.
fn for_each_case(check: impl Fn(&Case)) {
    let (index, file) = (read("index.json"), read("quant4.safetensors"));
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let cases = index["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let input = file.tensor(&format!("{name}.input")).unwrap();
        let dtype = match input.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            other => panic!("{name}.input is {other:?}"),
        };
        check(&Case {
            name,
            format: case["quant_type"].as_str().unwrap().parse().unwrap(),
            block: case["block"].as_u64().unwrap() as usize,
            dtype,
            shape: [1, input.shape().iter().product()],
            input: input.data(),
            file: &file,
        });
    }
}

fn upload_bytes(backend: &dyn Backend, dtype: DType, bytes: &[u8]) -> Buffer {
    let mut buffer = backend.alloc(dtype, bytes.len() / dtype.size()).unwrap();
    backend.write(bytes, buffer.view_mut()).unwrap();
    buffer
}

/// Codes, absmax and decoded values, plain, bit for bit.
pub fn four_bits_equal(backend: &dyn Backend) {
    for_each_case(|case| {
        let w = upload_bytes(backend, case.dtype, case.input);
        let q = Quantized::quantize(backend, w.view(), case.shape, case.format, case.block, false).unwrap();
        let Scales::Plain(absmax) = &q.scales else { panic!("plain scales were asked for") };
        assert_same_bits(&case.tensor("codes"), &backend.download(q.codes.view()).unwrap(), &case.bytes("codes"));
        assert_same_bits(&case.tensor("absmax"), &backend.download(absmax.view()).unwrap(), &case.f32s("absmax"));
        case.assert_decodes_to(backend, &q, "dequant");
    });
}

/// From the file's own codes, nested scales and offset: decoded values bit for bit.
pub fn nested_scales_decode_equal(backend: &dyn Backend) {
    for_each_case(|case| {
        let scales = Scales::Nested {
            codes: backend.upload(&case.bytes("dq.absmax_codes")).unwrap(),
            absmax: backend.upload(&case.f32s("dq.nested_absmax")).unwrap(),
            offset: case.f32s("dq.offset")[0],
        };
        let codes = backend.upload(&case.bytes("codes")).unwrap();
        let q = Quantized { codes, scales, format: case.format, block: case.block, shape: case.shape };
        case.assert_decodes_to(backend, &q, "dq.dequant");
    });
}

/// Steps of one ulp from a to b, both of one sign.
fn ulps_apart(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

/// The map value nearest to v by exhaustive search in f64, where every difference that could decide is exact to
/// 2⁻⁵³ of a number at most 2: the lower index where two are as near.
fn nearest(map: DynamicMap, v: f32) -> u8 {
    let distance = |code: usize| (f64::from(map.values()[code]) - f64::from(v)).abs();
    (1..256).fold(0, |best, code| if distance(code) < distance(best) { code } else { best }) as u8
}

/// v of each element, as the contract defines it.
fn normalised(x: &[f32], absmax: &[f32], block: usize) -> Vec<f32> {
    let reciprocal = |i: usize| 1.0 / absmax[i / block].max(1e-38);
    x.iter().enumerate().map(|(i, x)| (x * reciprocal(i)).clamp(-1.0, 1.0)).collect()
}

/// Quantises x and checks it against the vectors: absmax bit for bit; every code the nearest, so that it equals the
/// file's wherever the file's is the nearest, and is never further off.
fn eight_bits_agree(backend: &dyn Backend, what: &str, map: DynamicMap, x: &[f32], absmax: &[f32], codes: &[u8]) {
    let (ours, our_absmax) = quantize_8bit(backend, map, x);
    assert_same_bits(&format!("{what}: absmax"), &our_absmax, absmax);
    assert_eq!(codes.len(), x.len(), "{what}: codes");
    let error = |v: f32, code: u8| (f64::from(map.values()[usize::from(code)]) - f64::from(v)).abs();
    for (i, v) in normalised(x, absmax, NESTED_BLOCK).into_iter().enumerate() {
        assert_eq!(ours[i], nearest(map, v), "{what}: the code of element {i}, {v}");
        assert!(error(v, ours[i]) <= error(v, codes[i]), "{what}: element {i}, {v}, is further off than the peer's");
    }
}

fn quantize_8bit(backend: &dyn Backend, map: DynamicMap, x: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let buffer = backend.upload(x).unwrap();
    let mut codes = backend.alloc(DType::U8, x.len()).unwrap();
    let mut absmax = backend.alloc(DType::F32, x.len().div_ceil(NESTED_BLOCK)).unwrap();
    backend.quantize_8bit(map, NESTED_BLOCK, buffer.view(), codes.view_mut(), absmax.view_mut()).unwrap();
    (backend.download(codes.view()).unwrap(), backend.download(absmax.view()).unwrap())
}

/// Double quantisation: the offset within 2 ulp (the peer sums in another order); around the file's own offset the
/// nested scales bit for bit and the codes exactly the nearest; and around ours the same arithmetic.
pub fn scales_quantise_equal(backend: &dyn Backend) {
    for_each_case(|case| {
        let absmax = case.f32s("absmax");
        let buffer = backend.upload(&absmax).unwrap();
        let mut codes = backend.alloc(DType::U8, absmax.len()).unwrap();
        let mut nested = backend.alloc(DType::F32, absmax.len().div_ceil(NESTED_BLOCK)).unwrap();
        let offset = backend.quantize_scales(buffer.view(), codes.view_mut(), nested.view_mut()).unwrap();

        let their_offset = case.f32s("dq.offset")[0];
        assert!(ulps_apart(offset, their_offset) <= 2, "{}: offset {offset}, {their_offset}", case.name);
        let centred = |offset: f32| absmax.iter().map(|scale| scale - offset).collect::<Vec<f32>>();
        let (theirs, their_nested) = (case.bytes("dq.absmax_codes"), case.f32s("dq.nested_absmax"));
        eight_bits_agree(
            backend,
            &case.tensor("dq"),
            DynamicMap::Signed,
            &centred(their_offset),
            &their_nested,
            &theirs,
        );
        let (own_codes, own_nested) = quantize_8bit(backend, DynamicMap::Signed, &centred(offset));
        assert_same_bits(&case.tensor("dq: own codes"), &backend.download(codes.view()).unwrap(), &own_codes);
        assert_same_bits(&case.tensor("dq: own scales"), &backend.download(nested.view()).unwrap(), &own_nested);
    });
}

/// Every case of `quant8.safetensors`, whose names end in the map's: quantised as [`eight_bits_agree`] asks, and the
/// file's own codes decoded bit for bit.
pub fn eight_bits_equal(backend: &dyn Backend) {
    let file = read("quant8.safetensors");
    let file = SafeTensors::deserialize(&file).unwrap();
    let cases: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_suffix(".input")).collect();
    assert!(!cases.is_empty());
    for case in cases {
        let map = if case.ends_with("_unsigned") { DynamicMap::Unsigned } else { DynamicMap::Signed };
        let part = |suffix: &str| f32s(&file, &format!("{case}.{suffix}"));
        let (x, absmax, codes) = (part("input"), part("absmax"), bytes(&file, &format!("{case}.codes")));
        eight_bits_agree(backend, case, map, &x, &absmax, &codes);

        let (codes, absmax) = (backend.upload(&codes).unwrap(), backend.upload(&absmax).unwrap());
        let mut out = backend.alloc(DType::F32, x.len()).unwrap();
        backend.dequantize_8bit(map, NESTED_BLOCK, codes.view(), absmax.view(), out.view_mut()).unwrap();
        assert_same_bits(&format!("{case}.dequant"), &backend.download(out.view()).unwrap(), &part("dequant"));
    }
}
