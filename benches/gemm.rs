//! Products of the CPU backend: dense in f32, and 4-bit weights with doubly quantised scales, decoded while packing.
//!
//! Each line names its shape as m×n×k: m rows of inputs, n outputs, sums of length k. Throughput counts 2·m·n·k
//! operations. `benches/peers/gemm.py` runs this beside torch.

mod machine;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rankfold_backend::params::{Compute, Linear, Weight};
use rankfold_backend::{Backend, DType, Format, Quantized, Result, philox};
use rankfold_cpu::CpuBackend;

const SHAPES: [(usize, usize, usize); 9] = [
    (1024, 1024, 1024),
    (512, 4096, 4096),
    (1024, 1408, 512),
    (1024, 512, 1408),
    (16, 4096, 4096),
    (8, 4096, 4096),
    (4, 4096, 4096),
    (2, 4096, 4096),
    (1, 4096, 4096),
];

fn products(criterion: &mut Criterion) {
    let backend = machine::backend();
    for (m, n, k) in SHAPES {
        shape(criterion, &backend, m, n, k).expect("shapes that agree");
    }
}

fn shape(criterion: &mut Criterion, backend: &CpuBackend, m: usize, n: usize, k: usize) -> Result<()> {
    let b: &dyn Backend = backend;
    let draw = |len: usize, seed: u64| -> Vec<f32> {
        (0..len as u64).map(|i| 2.0 * philox::unit(philox::word(seed, 0, i)) - 1.0).collect()
    };
    let (x, w, dy) = (b.upload(&draw(m * k, 1))?, b.upload(&draw(n * k, 2))?, b.upload(&draw(m * n, 3))?);
    let nf4 = Quantized::quantize(b, w.view(), [n, k], Format::Nf4, 64, true)?;
    let (mut y, mut dx) = (b.alloc(DType::F32, m * n)?, b.alloc(DType::F32, m * k)?);
    let p = Linear { tokens: m, inputs: k, outputs: n, compute: Compute::F32 };
    let mut group = criterion.benchmark_group(format!("{m}x{n}x{k}"));
    group.throughput(Throughput::Elements((2 * m * n * k) as u64));
    for (name, weight) in [("f32", Weight::Dense(w.view())), ("nf4", Weight::Quantized(&nf4))] {
        group.bench_function(format!("{name} y = x·Wᵀ"), |bencher| {
            bencher.iter(|| b.linear(&p, x.view(), &weight, None, None, y.view_mut()).expect("a right call"));
        });
        group.bench_function(format!("{name} dx = dy·W"), |bencher| {
            bencher.iter(|| {
                b.linear_grad_input(&p, dy.view(), &weight, None, false, dx.view_mut()).expect("a right call")
            });
        });
    }
    group.finish();
    Ok(())
}

criterion_group!(benches, products);
criterion_main!(benches);
