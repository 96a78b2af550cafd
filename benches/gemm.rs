//! Products of the CPU backend: dense in f32, and 4-bit weights with doubly quantised scales, decoded while packing; with
//! inputs in f32, and rounded to bf16.
//!
//! Each line names its shape as m×n×k: m rows of inputs, n outputs, sums of length k. Throughput counts 2·m·n·k
//! operations. `benches/peers/gemm.py` runs this beside torch.
//!
//! After each kernel its best time is printed as operations a second and as a fraction of the limit that binds it,
//! which is the one that would take longer: reading the bytes in which the weight is stored once, at the bandwidth
//! measured first (the activations of 16 tokens are under 1 % of that in f32, 7 % in 4 bits), or all operations at the
//! rate of the dense product of 2048³ in that precision, which stands for the machine's own. Both may be passed, the first by a weight
//! that stays in the cache from call to call.

mod dense;
mod fastest;
mod machine;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dense::draw;
use fastest::fastest_of;
use rankfold_backend::params::{Compute, Linear, Weight};
use rankfold_backend::{Backend, DType, Format, Quantized, Result};
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

/// What the machine can do.
struct Limits {
    /// Bytes a second.
    read: f64,
    /// Operations a second, with inputs in f32 and in bf16.
    products: [f64; 2],
}

const COMPUTE: [(Compute, &str); 2] = [(Compute::F32, "f32"), (Compute::Bf16, "bf16")];

fn products(criterion: &mut Criterion) {
    let backend = machine::backend();
    let limits = Limits {
        read: machine::bandwidth(backend.threads(), machine::MEMORY).read,
        products: dense::rates(&backend).expect("shapes that agree"),
    };
    for (m, n, k) in SHAPES {
        shape(criterion, &backend, &limits, m, n, k).expect("shapes that agree");
    }
}

fn shape(criterion: &mut Criterion, backend: &CpuBackend, limits: &Limits, m: usize, n: usize, k: usize) -> Result<()> {
    let b: &dyn Backend = backend;
    let (x, w, dy) = (b.upload(&draw(m * k, 1))?, b.upload(&draw(n * k, 2))?, b.upload(&draw(m * n, 3))?);
    let nf4 = Quantized::quantize(b, w.view(), [n, k], Format::Nf4, 64, true)?;
    let (mut y, mut dx) = (b.alloc(DType::F32, m * n)?, b.alloc(DType::F32, m * k)?);
    let operations = 2 * m * n * k;
    let mut group = criterion.benchmark_group(format!("{m}x{n}x{k}"));
    group.throughput(Throughput::Elements(operations as u64));
    let weights = [("f32", Weight::Dense(w.view()), w.bytes()), ("nf4", Weight::Quantized(&nf4), nf4.bytes())];
    let cases = weights.iter().flat_map(|weight| COMPUTE.iter().zip(limits.products).map(move |of| (weight, of)));
    for ((stored, weight, bytes), ((compute, inputs), limit)) in cases {
        let p = Linear { tokens: m, inputs: k, outputs: n, compute: *compute };
        let report = |name: &str, best: Option<f64>| {
            let Some(best) = best else { return };
            let rate = operations as f64 / best;
            let (memory, arithmetic) = (*bytes as f64 / best / limits.read, rate / limit);
            let bound = if memory > arithmetic { "the read bandwidth" } else { "the products' rate" };
            let part = memory.max(arithmetic);
            println!("{m}x{n}x{k} {name}: {:.1} GFLOP/s, {:.0} % of {bound}", rate * 1e-9, 100.0 * part);
        };
        let forward = format!("{stored} in {inputs}, y = x·Wᵀ");
        let best = fastest_of(&mut group, &forward, || {
            b.linear(&p, x.view(), weight, None, None, y.view_mut()).expect("a right call");
        });
        report(&forward, best);
        let backward = format!("{stored} in {inputs}, dx = dy·W");
        let best = fastest_of(&mut group, &backward, || {
            b.linear_grad_input(&p, dy.view(), weight, None, false, dx.view_mut()).expect("a right call");
        });
        report(&backward, best);
    }
    group.finish();
    Ok(())
}

criterion_group!(benches, products);
criterion_main!(benches);
