//! Small pieces of work, one thread's, on AVX2: `benches/instructions/run` counts the instructions of their kernels.
//!
//!     cargo bench -p rankfold-trainer --bench instructions -- [WORK]
//!
//! - `qlora`: a training step; the base in NF4 with doubly quantised scales, products of f32, AdamW;
//! - `lora`: a training step; a dense base, products of bf16, dropout, AdamW with moments in 8 bits;
//! - `generate`: a prompt and the tokens after it, one by one, by the base in NF4;
//! - `formats`: what is left of a model's kernels: a matrix into 4 bits, 8 bits and bf16, and back, dropout, a loss.
//!
//! Each is done once before it is counted, so that its memory is there and its tables are made. The numbers are the
//! same every time, and so are the instructions. Without a name, all are done, to see that they run.

mod llama;

use llama::{Failure, Step};
use rankfold_adapters::{AdapterConfig, LoraSpec, Targets, Values};
use rankfold_backend::params::{CrossEntropy, Dropout, MOMENT_BLOCK};
use rankfold_backend::{Backend, Compute, DType, DynamicMap, Format, Quantized, philox};
use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_trainer::generate::{Sampling, generate};
use rankfold_trainer::model::{Model, Precision, Quantization};
use rankfold_trainer::optimizer::Moments;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

/// Vocabulary, width, layers, heads, heads of keys, feed-forward.
const MODEL: [usize; 6] = [512, 256, 2, 4, 2, 704];
/// Rows of a batch, and tokens of a row.
const BATCH: [usize; 2] = [2, 32];
const NF4: Precision = Precision::Quantized(Quantization { format: Format::Nf4, block: 64, double: true });

type Make = fn(Arc<dyn Backend>) -> Result<Step, Failure>;

const WORKS: [(&str, Make); 4] = [("qlora", qlora), ("lora", lora), ("generate", tokens), ("formats", formats)];

fn main() -> ExitCode {
    // cargo's own.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let Some(unknown) = wanted.iter().find(|name| WORKS.iter().all(|(known, _)| known != name)) {
        eprintln!("'{unknown}': expected {}", WORKS.map(|(name, _)| name).join(", "));
        return ExitCode::from(2);
    }
    for (name, make) in WORKS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| w == name)) {
        if let Err(why) = run(*make) {
            eprintln!("{name}: {why}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run(make: Make) -> Result<(), Failure> {
    let isa = Isa::named("avx2").ok_or("this machine has no AVX2")?;
    let mut work = make(Arc::new(CpuBackend::with_isa(isa, Some(1))))?;
    work(&mut || ())?;
    counted(&mut work)
}

/// callgrind counts from where this is entered to where it is left.
#[inline(never)]
fn counted(work: &mut Step) -> Result<(), Failure> {
    let outcome = work(&mut || ());
    // Something is left to do here: the work is called, not jumped to.
    black_box(outcome)
}

/// The model with a LoRA of rank 16 on every linear layer.
fn adapted(backend: Arc<dyn Backend>, precision: Precision, dropout: f64) -> Result<Model, Failure> {
    let mut model = llama::random(backend, MODEL, precision)?;
    let spec = LoraSpec { dropout, ..LoraSpec::new(16, 16.0) };
    let adapter = AdapterConfig { spec, targets: Targets::AllLinear, ..AdapterConfig::default() };
    model.attach(&adapter.into(), Values::New(1))?;
    Ok(model)
}

fn qlora(backend: Arc<dyn Backend>) -> Result<Step, Failure> {
    let model = adapted(backend, NF4, 0.0)?;
    llama::training(model, Moments::F32, llama::recipe(Compute::F32), BATCH)
}

fn lora(backend: Arc<dyn Backend>) -> Result<Step, Failure> {
    let model = adapted(backend, Precision::AsStored, 0.1)?;
    llama::training(model, Moments::Blockwise8, llama::recipe(Compute::Bf16), BATCH)
}

fn tokens(backend: Arc<dyn Backend>) -> Result<Step, Failure> {
    let model = llama::random(backend, MODEL, NF4)?;
    let prompt: Vec<u32> = (0..16).collect();
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
    Ok(Box::new(move |_| {
        generate(&model, &prompt, 4, &[], greedy, Compute::F32)?;
        Ok(())
    }))
}

fn formats(b: Arc<dyn Backend>) -> Result<Step, Failure> {
    const SIDE: usize = 512;
    let n = SIDE * SIDE;
    let values: Vec<f32> = (0..n as u64).map(|i| philox::normal(1, 0, i) as f32).collect();
    let w = b.upload(&values)?;
    let labels = b.upload(&vec![7i64; SIDE])?;
    let (mut codes, mut absmax) = (b.alloc(DType::U8, n)?, b.alloc(DType::F32, n / MOMENT_BLOCK)?);
    let (mut half, mut out, mut losses) =
        (b.alloc(DType::Bf16, n)?, b.alloc(DType::F32, n)?, b.alloc(DType::F32, SIDE)?);
    Ok(Box::new(move |_| {
        let q = Quantized::quantize(b.as_ref(), w.view(), [SIDE, SIDE], Format::Nf4, 64, true)?;
        b.dequantize_4bit(&q, out.view_mut())?;
        b.quantize_8bit(DynamicMap::Signed, MOMENT_BLOCK, w.view(), codes.view_mut(), absmax.view_mut())?;
        b.dequantize_8bit(DynamicMap::Signed, MOMENT_BLOCK, codes.view(), absmax.view(), out.view_mut())?;
        b.cast(w.view(), half.view_mut())?;
        b.cast(half.view(), out.view_mut())?;
        b.dropout(&Dropout { probability: 0.1, seed: 1, stream: 1 }, w.view(), out.view_mut())?;
        b.cross_entropy(&CrossEntropy { rows: SIDE, vocab: SIDE }, w.view(), labels.view(), losses.view_mut())?;
        Ok(())
    }))
}
