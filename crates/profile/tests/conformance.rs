//! A profiled backend keeps every law of the contract, with the bits of the one that it hands calls on to, and notes
//! every kernel.

mod common;

use common::{ROOF, profile, step};
use rankfold_backend::conformance::{LAWS, few_cases, judge};
use rankfold_cpu::CpuBackend;
use rankfold_reference::ReferenceBackend;
use std::collections::BTreeSet;

/// The contract's methods but for `name` and `host_bytes_mut`, which compute nothing.
const KERNELS: [&str; 42] = [
    "activate",
    "activate_grad",
    "adamw",
    "adamw_8bit",
    "add",
    "add_in_place",
    "alloc",
    "attention",
    "attention_grad",
    "cast",
    "copy",
    "cross_entropy",
    "cross_entropy_grad_in_place",
    "dequantize_4bit",
    "dequantize_8bit",
    "divide",
    "dropout",
    "embedding",
    "embedding_grad",
    "fill",
    "hard_concrete",
    "hard_concrete_grad",
    "importance",
    "linear",
    "linear_grad_input",
    "linear_grad_weight",
    "matmul",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_scales",
    "read",
    "rms_norm",
    "rms_norm_grad",
    "rope",
    "row_norms",
    "scale_columns",
    "scale_columns_grad",
    "scale_in_place",
    "silu_mul",
    "silu_mul_grad",
    "sum_squares",
    "write",
];

#[test]
fn every_law_holds_with_the_bits_of_the_backend_behind_and_every_kernel_is_noted() {
    let (plain, oracle) = (CpuBackend::new(Some(1)), ReferenceBackend::new());
    let profile = profile(|backend| {
        step(1, || {
            for (name, law) in LAWS {
                let verdict = few_cases(6, || law(backend.as_ref(), &oracle));
                judge(name, &verdict);
                assert_eq!(verdict, few_cases(6, || law(&plain, &oracle)), "{name}: other bits");
            }
        });
    });
    let noted: BTreeSet<&str> = profile.report(ROOF).rows.iter().map(|row| row.kernel).collect();
    let missing: Vec<&&str> = KERNELS.iter().filter(|kernel| !noted.contains(**kernel)).collect();
    assert!(missing.is_empty() && noted.len() == KERNELS.len(), "{missing:?} of {noted:?}");
}
