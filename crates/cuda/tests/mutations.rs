//! Each barrier of `kernels/` is left out in turn, at run time, and the suite under the checker notices: a barrier that
//! nobody misses does not belong there.

use rankfold_backend::conformance::{LAWS, Verdict, few_cases};
use rankfold_cuda::host::{HostDriver, Options, Schedule};
use rankfold_cuda::{CudaBackend, HEADERS, SOURCES, Site};
use rankfold_reference::ReferenceBackend;

/// The laws, by the start of their names, that run a file's kernels.
fn laws_of(file: &str) -> &'static [&'static str] {
    match file {
        "elementwise.cu" => &["sum_squares"],
        "gemm.cu" => &["matmul_agrees"],
        "quantize4.cu" => &["quantize_4bit", "dequantize_4bit"],
        "quantize8.cu" => &["quantize_8bit", "quantize_scales", "dequantize_8bit"],
        "linear_few.cu" | "between_blocks.cuh" => &["linear_forward", "linear_bf16_forward"],
        "linear_mma.cu" => &["linear_bf16"],
        "rms_norm.cu" => &["rms_norm"],
        "cross_entropy.cu" => &["cross_entropy"],
        "embedding.cu" => &["embedding"],
        "attention.cu" | "attention.cuh" | "attention_grad.cu" => &["attention"],
        "attention_mma.cu" | "attention_mma.cuh" | "attention_mma_grad.cu" => &["attention_bf16"],
        "common.cuh" => &["sum_squares", "rms_norm", "cross_entropy", "adamw_8bit"],
        _ => &[],
    }
}

/// Every line with a barrier of a block or of a warp.
fn sites() -> Vec<Site> {
    let sources = SOURCES.iter().map(|source| (format!("{}.cu", source.file), source.text));
    let headers = HEADERS.iter().map(|(name, text)| (name.to_string(), *text));
    let lines = |(file, text): (String, &'static str)| {
        let barrier = |line: &str| {
            let code = line.split("//").next().unwrap_or(line);
            code.contains("__syncthreads()") || code.contains("__syncwarp(")
        };
        let at = move |line: usize| Site { file: file.clone(), line: line as u32 + 1 };
        text.lines().enumerate().filter(move |(_, line)| barrier(line)).map(move |(line, _)| at(line))
    };
    sources.chain(headers).flat_map(lines).collect()
}

/// Whether a law is broken without this barrier, on some schedule.
fn is_missed(site: &Site, laws: &[&str]) -> bool {
    let schedules = [Schedule::InOrder, Schedule::Warps(1), Schedule::Shuffled(1)];
    let laws = LAWS.iter().filter(|(name, _)| laws.iter().any(|start| name.starts_with(start)));
    let broken = |law: rankfold_backend::conformance::Law, schedule| {
        let options = Options { schedule, left_out: Some(site.clone()), ..Options::watched() };
        let candidate = CudaBackend::new(HostDriver::new(options).unwrap()).unwrap();
        matches!(few_cases(96, || law(&candidate, &ReferenceBackend::new())), Verdict::Broken(_))
    };
    laws.flat_map(|(_, law)| schedules.map(|schedule| (*law, schedule))).any(|(law, schedule)| broken(law, schedule))
}

#[test]
fn no_barrier_can_be_left_out() {
    let sites = sites();
    assert!(sites.len() > 10, "{} barriers were found", sites.len());
    let unnoticed: Vec<String> =
        sites.iter().filter(|site| !is_missed(site, laws_of(&site.file))).map(ToString::to_string).collect();
    assert!(unnoticed.is_empty(), "nobody misses the barriers at {}", unnoticed.join(", "));
}
