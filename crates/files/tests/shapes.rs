//! 4-bit weights of every shape through a file, on both backends: none, one and an odd number of elements, rows that
//! are no multiple of the block, denormals and zeros of both signs.

use proptest::prelude::*;
use rankfold_backend::{Backend, DType, Format, Quantized};
use rankfold_cpu::CpuBackend;
use rankfold_files::{Checkpoint, Writer, quantized};
use rankfold_reference::ReferenceBackend;

/// The weight's bytes once decoded, from memory and from its file.
fn decoded(backend: &dyn Backend, weight: &Quantized) -> Vec<u8> {
    let mut out = backend.alloc(DType::F32, weight.elements()).unwrap();
    backend.dequantize_4bit(weight, out.view_mut()).unwrap();
    let mut bytes = vec![0; out.bytes()];
    backend.read(out.view(), &mut bytes).unwrap();
    bytes
}

/// Quantised, written and read back; the file's bytes, and the values decoded from it.
fn through_a_file(
    backend: &dyn Backend,
    values: &[f32],
    shape: [usize; 2],
    format: Format,
    block: usize,
    double: bool,
) -> (Vec<u8>, Vec<u8>) {
    let w = backend.upload(values).unwrap();
    let weight = Quantized::quantize(backend, w.view(), shape, format, block, double).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut writer = Writer::create(&path, quantized::specs("w", shape, format, block, double)).unwrap();
    quantized::write(&mut writer, "w", backend, &weight, DType::F32).unwrap();
    writer.finish().unwrap();
    let read = quantized::load(&Checkpoint::open(&path).unwrap(), "w", backend).unwrap().unwrap().weight;
    assert_eq!((read.shape, read.format, read.block), (shape, format, block));
    let back = decoded(backend, &read);
    assert_eq!(back, decoded(backend, &weight));
    (std::fs::read(&path).unwrap(), back)
}

fn value() -> impl Strategy<Value = f32> {
    prop_oneof![8 => -2f32..2.0, 1 => Just(0.0), 1 => Just(-0.0), 1 => Just(1e-40), 1 => Just(-3e-39)]
}

proptest! {
    #[test]
    fn both_backends_write_the_same_file_and_read_the_same_values(
        (shape, values) in prop::array::uniform2(prop_oneof![Just(0usize), Just(1), Just(33), 2usize..70])
            .prop_flat_map(|shape| (Just(shape), prop::collection::vec(value(), shape[0] * shape[1]))),
        format in prop::sample::select(Format::ALL.to_vec()),
        log_block in 5u32..=12,
        double in any::<bool>(),
    ) {
        let on = |backend: &dyn Backend| through_a_file(backend, &values, shape, format, 1 << log_block, double);
        let (oracle, cpu) = (on(&ReferenceBackend::new()), on(&CpuBackend::new(Some(2))));
        prop_assert!(oracle.0 == cpu.0, "the files differ");
        prop_assert_eq!(oracle.1, cpu.1);
    }
}

#[test]
fn none_and_one_element_survive_their_file() {
    let backend = ReferenceBackend::new();
    for format in Format::ALL {
        for double in [false, true] {
            for shape in [[0, 0], [0, 5], [5, 0]] {
                assert!(through_a_file(&backend, &[], shape, format, 64, double).1.is_empty());
            }
            let (_, back) = through_a_file(&backend, &[-3.5], [1, 1], format, 64, double);
            assert_eq!(back, (-3.5f32).to_le_bytes());
        }
    }
}
