//! The kernels of the CPU backend, each at three sizes and beside what the machine can do.
//!
//!     cargo bench -p rankfold-cpu --bench cpu -- [--quick] [NAME]
//!
//! First the machine is measured: how fast it reads and writes as many bytes as a size is about, and the rate of dense
//! products in f32 and bf16 (`machine`, `dense`). Then each kernel: criterion's lines, and below them one with the
//! median of a call, the rate, and the fraction of the limit that binds it. That is the longer of two times: every input
//! read once and every output written once, or every operation of its products at the dense rate (a multiply-add is
//! two; what is not a product, an exponential say, counts as none). So a fraction is of the least that there is to do,
//! whatever a kernel does. It passes 100 % where loads and stores are wider than those of the measured sum and fill,
//! which are compiled for any x86-64, or go past the caches.
//!
//! The sizes: `cache`, which the cores' own caches hold; `model`, a step of the model that
//! `benches/peers/train_step.py` calls small; `memory`, which no cache holds. NAME is a part of what is to run:
//! `memory/linear`, `adamw`. `--quick` is criterion's: a tenth of a second a kernel.
//!
//! In reading order: `sizes`, `meter`; then what is measured: `products`, `attention`, `stream`, `tokens`, `optimiser`,
//! `formats`.

#[path = "cpu/attention.rs"]
mod attention;
mod dense;
#[path = "cpu/formats.rs"]
mod formats;
mod machine;
#[path = "cpu/meter.rs"]
mod meter;
#[path = "cpu/optimiser.rs"]
mod optimiser;
#[path = "cpu/products.rs"]
mod products;
#[path = "cpu/sizes.rs"]
mod sizes;
#[path = "cpu/stream.rs"]
mod stream;
#[path = "cpu/tokens.rs"]
mod tokens;

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use meter::{Limits, Meter};
use rankfold_backend::{Backend, Result};
use sizes::{Numbers, SIZES, Size};
use std::time::Duration;

/// Adds the lines of some kernels at one size.
type Kernels = fn(&dyn Backend, &mut Meter, &Size, &Numbers) -> Result<()>;

const KERNELS: [Kernels; 6] =
    [products::measure, attention::measure, stream::measure, tokens::measure, optimiser::measure, formats::measure];

fn kernels(criterion: &mut Criterion) {
    let (backend, numbers) = (machine::backend(), Numbers::new());
    let products = dense::rates(&backend).expect("a right call");
    for size in &SIZES {
        print!("{}: {} KiB, ", size.name, size.bytes >> 10);
        let limits = Limits { memory: machine::bandwidth(backend.threads(), size.bytes), products };
        let mut group = criterion.benchmark_group(size.name);
        // No call of a slow kernel more than there must be: samples are of as many calls each.
        group.sampling_mode(SamplingMode::Flat);
        let mut meter = Meter { group, size: size.name, limits };
        for kernels in KERNELS {
            kernels(&backend, &mut meter, size, &numbers).expect("shapes that agree");
        }
        meter.group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(meter::SAMPLES)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = kernels
}
criterion_main!(benches);
