//! Quantisation of the CPU backend, both ways, at 4096×4096 and block 64, beside the machine's own bandwidth.
//!
//! First the machine is measured: how fast all threads read memory, and how fast they write it (with plain stores: a
//! fill). Then every kernel; after each its best time is printed as elements a second and as a fraction of the
//! bandwidth that binds it: the bytes it must read, to quantise, or write, to dequantise, in that time.
//! `benches/peers/quantize.py` runs this beside bitsandbytes.

mod fastest;
mod machine;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use rankfold_backend::{Backend, Buffer, DType, DynamicMap, Format, Quantized, Result, philox};

const ROWS: usize = 4096;
const COLUMNS: usize = 4096;
const BLOCK: usize = 64;
const BLOCK_8BIT: usize = 256;
const ELEMENTS: usize = ROWS * COLUMNS;

/// Runs a kernel in the group, and says how near the limit its fastest call came.
fn measure(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    bytes: usize,
    limit: (&str, f64),
    mut kernel: impl FnMut() -> Result<()>,
) {
    if let Some(best) = fastest::fastest_of(group, name, || kernel().expect("a right call")) {
        let (rate, part) = (ELEMENTS as f64 / best * 1e-9, bytes as f64 / best / limit.1);
        println!("{name}: {rate:.2} Gelem/s, {:.0} % of the {} bandwidth", 100.0 * part, limit.0);
    }
}

fn quantisation(criterion: &mut Criterion) {
    let backend = machine::backend();
    let limits = machine::bandwidth(backend.threads(), machine::MEMORY);
    let mut group = criterion.benchmark_group(format!("{ROWS}x{COLUMNS}"));
    group.throughput(Throughput::Elements(ELEMENTS as u64));
    run(&mut group, &backend, limits).expect("shapes that agree");
    group.finish();
}

fn run(group: &mut BenchmarkGroup<WallTime>, b: &dyn Backend, limits: machine::Bandwidth) -> Result<()> {
    let (reading, writing) = (("read", limits.read), ("write", limits.write));
    // No kernel branches on a value: any numbers take the same time.
    let draw = |i| 2.0 * philox::unit(philox::word(1, 0, i)) - 1.0;
    let f32s = b.upload(&(0..ELEMENTS as u64).map(draw).collect::<Vec<f32>>())?;
    let mut bf16s = b.alloc(DType::Bf16, ELEMENTS)?;
    b.cast(f32s.view(), bf16s.view_mut())?;
    let weights: [(&str, &Buffer); 2] = [("f32", &f32s), ("bf16", &bf16s)];
    let shape = [ROWS, COLUMNS];

    for (dtype, w) in weights {
        let (mut codes, mut absmax) = (b.alloc(DType::U8, ELEMENTS / 2)?, b.alloc(DType::F32, ELEMENTS / BLOCK)?);
        measure(group, &format!("quantise {dtype} to nf4"), w.bytes(), reading, || {
            b.quantize_4bit(Format::Nf4, BLOCK, w.view(), codes.view_mut(), absmax.view_mut())
        });
        measure(group, &format!("quantise {dtype} to nf4, double"), w.bytes(), reading, || {
            Quantized::quantize(b, w.view(), shape, Format::Nf4, BLOCK, true).map(drop)
        });
    }
    for (scales, double) in [("", false), (", double", true)] {
        let q = Quantized::quantize(b, f32s.view(), shape, Format::Nf4, BLOCK, double)?;
        for (name, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
            let mut out = b.alloc(dtype, ELEMENTS)?;
            let bytes = out.bytes();
            measure(group, &format!("dequantise nf4 to {name}{scales}"), bytes, writing, || {
                b.dequantize_4bit(&q, out.view_mut())
            });
        }
    }
    let (mut codes, mut absmax) = (b.alloc(DType::U8, ELEMENTS)?, b.alloc(DType::F32, ELEMENTS / BLOCK_8BIT)?);
    let mut out = b.alloc(DType::F32, ELEMENTS)?;
    measure(group, "quantise f32 to 8 bits", f32s.bytes(), reading, || {
        b.quantize_8bit(DynamicMap::Signed, BLOCK_8BIT, f32s.view(), codes.view_mut(), absmax.view_mut())
    });
    let bytes = out.bytes();
    measure(group, "dequantise 8 bits to f32", bytes, writing, || {
        b.dequantize_8bit(DynamicMap::Signed, BLOCK_8BIT, codes.view(), absmax.view(), out.view_mut())
    });
    Ok(())
}

criterion_group!(benches, quantisation);
criterion_main!(benches);
