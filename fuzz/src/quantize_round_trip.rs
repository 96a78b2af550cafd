//! Any bytes as weights: the fast backend gives the oracle's codes, scales, values and errors, to the bit, on every
//! instruction set of this machine.
//!
//! The first byte chooses the format, the element type and whether the scales are quantised too, the second the
//! block, and the third how many columns there are.

use rankfold_backend::{Backend, Buffer, DType, Format, Quantized, Result, Scales};
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_reference::ReferenceBackend;
use std::sync::LazyLock;

static CPUS: LazyLock<Vec<CpuBackend>> =
    LazyLock::new(|| Isa::available().into_iter().map(|isa| CpuBackend::with_isa(isa, Some(1))).collect());

fn bytes(on: &dyn Backend, x: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; x.bytes()];
    on.read(x.view(), &mut bytes).expect("a buffer of this backend");
    bytes
}

/// The parts of the quantised weight, and what it decodes to as f32.
fn round_trip(
    on: &dyn Backend,
    dtype: DType,
    w: &[u8],
    shape: [usize; 2],
    how: (Format, usize, bool),
) -> Result<Vec<Vec<u8>>> {
    let mut weight = on.alloc(dtype, shape[0] * shape[1])?;
    on.write(w, weight.view_mut())?;
    let q = Quantized::quantize(on, weight.view(), shape, how.0, how.1, how.2)?;
    let mut back = on.alloc(DType::F32, q.elements())?;
    on.dequantize_4bit(&q, back.view_mut())?;
    let mut parts = vec![bytes(on, &q.codes), bytes(on, &back)];
    match &q.scales {
        Scales::Plain(absmax) => parts.push(bytes(on, absmax)),
        Scales::Nested { codes, absmax, offset } => {
            parts.extend([bytes(on, codes), bytes(on, absmax), offset.to_le_bytes().to_vec()]);
        }
    }
    Ok(parts)
}

/// Panics where the law is broken.
pub fn check(data: &[u8]) {
    let [choice, block, columns, w @ ..] = data else { return };
    let format = Format::ALL[usize::from(choice % 3)];
    let dtype = [DType::F32, DType::Bf16, DType::F16][usize::from(choice / 3 % 3)];
    let how = (format, 32 << (block % 8), choice / 9 % 2 == 1);
    let columns = usize::from(*columns).max(1);
    let rows = w.len() / dtype.size() / columns;
    let w = &w[..rows * columns * dtype.size()];
    let on = |backend: &dyn Backend| round_trip(backend, dtype, w, [rows, columns], how);
    // Errors as text: one names a NaN, which is not equal to itself.
    let expected = format!("{:?}", on(&ReferenceBackend::new()));
    for cpu in &*CPUS {
        assert_eq!(format!("{:?}", on(cpu)), expected, "{}", cpu.name());
    }
}
