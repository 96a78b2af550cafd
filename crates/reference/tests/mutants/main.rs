//! That the conformance suite can fail: the oracle with one fault, in one kernel, at a time, and the law that has to
//! find it.

mod mutant;

use mutant::{Fault, Fault::*, Mutant, ORACLE};
use rankfold_backend::Backend;
use rankfold_backend::conformance::*;

type Law = fn(&dyn Backend, &dyn Backend) -> Verdict;

/// Every fault is found by its law, and the law holds without it.
fn caught(faults: &[(Fault, Law)]) {
    let breaks = |fault, law: Law| matches!(law(&Mutant::new(fault), &ORACLE), Verdict::Broken(_));
    let survivors: Vec<Fault> =
        faults.iter().filter(|&&(fault, law)| !breaks(fault, law)).map(|&(fault, _)| fault).collect();
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
    let mut laws: Vec<Law> = faults.iter().map(|&(_, law)| law).collect();
    laws.dedup_by(|a, b| std::ptr::fn_addr_eq(*a, *b));
    assert!(laws.into_iter().all(|law| !breaks(Harmless, law)), "a law is broken without a fault");
}

/// What is caught tells how sharp the bounds are: an ulp or two (1.2e-7) where a kernel rounds once or twice, and
/// where sums are long about their length in units of 2⁻²⁴.
#[test]
fn a_wrong_element_is_caught() {
    caught(&[
        (Nudge("fill", 0, 1e-2), memory::fill),
        (Nudge("copy", 0, 1e-2), memory::copy),
        (Nudge("cast", 0, 1e-2), memory::cast),
        (Nudge("scale_in_place", 0, 3e-7), elementwise::scale_in_place),
        (Nudge("add", 0, 2e-7), elementwise::add),
        (Nudge("divide", 0, 2e-7), elementwise::divide),
        (Nudge("add_in_place", 0, 2e-7), elementwise::add_in_place),
        (Nudge("dropout", 0, 2e-7), elementwise::dropout),
        (Nudge("silu_mul", 0, 1e-6), elementwise::silu_mul),
        (Nudge("silu_mul_grad", 0, 1e-6), elementwise::silu_mul_grad),
        (Nudge("silu_mul_grad", 1, 1e-6), elementwise::silu_mul_grad),
        (Nudge("activate", 0, 2e-6), activate::forward),
        (Nudge("activate_grad", 0, 2e-6), activate::backward),
        (Deaf("NaN of activate"), activate::forward),
        (Deaf("the small of activate"), activate::forward),
        (Nudge("matmul", 0, 1e-6), matmul::agrees),
        (Nudge("matmul", 0, 1e-4), matmul::large),
        (Nudge("matmul", 0, 1e-6), matmul::bf16),
        (Nudge("linear", 0, 2e-6), linear::forward),
        (Nudge("linear_grad_input", 0, 2e-6), linear::grad_input),
        // dW, d bias, dA, dB, de, dg.
        (Nudge("linear_grad_weight", 0, 2e-6), linear::grad_weight),
        (Nudge("linear_grad_weight", 1, 2e-6), linear::grad_weight),
        (Nudge("linear_grad_weight", 2, 1e-5), linear::grad_weight),
        (Nudge("linear_grad_weight", 3, 1e-5), linear::grad_weight),
        (Nudge("linear_grad_weight", 4, 1e-5), linear::grad_weight),
        (Nudge("linear_grad_weight", 5, 1e-5), linear::grad_weight),
        (Nudge("linear", 0, 1e-3), linear::large),
        (Nudge("linear", 0, 1e-5), linear::forward_bf16),
        (Nudge("linear_grad_input", 0, 1e-5), linear::grad_input_bf16),
        (Nudge("linear_grad_weight", 2, 1e-5), linear::grad_weight_bf16),
        (Nudge("linear_grad_weight", 3, 1e-5), linear::grad_weight_bf16),
        (Nudge("linear_grad_weight", 5, 1e-5), linear::grad_weight_bf16),
        (Nudge("quantize_4bit", 0, 0.0), quantize::quantize_4bit),
        (Nudge("quantize_4bit", 1, 2e-7), quantize::quantize_4bit),
        (Nudge("dequantize_4bit", 0, 2e-7), quantize::dequantize_4bit),
        (Nudge("quantize_scales", 0, 0.0), quantize::quantize_scales),
        (Nudge("quantize_scales", 1, 2e-7), quantize::quantize_scales),
        (Deaf("offset"), quantize::quantize_scales),
        (Nudge("quantize_8bit", 0, 0.0), quantize::quantize_8bit),
        (Nudge("quantize_8bit", 1, 2e-7), quantize::quantize_8bit),
        (Nudge("dequantize_8bit", 0, 2e-7), quantize::dequantize_8bit),
        (Nudge("rms_norm", 0, 1e-6), rms_norm::forward),
        (Nudge("rms_norm", 1, 1e-6), rms_norm::forward),
        (Nudge("rms_norm_grad", 0, 2e-6), rms_norm::backward),
        (Nudge("rms_norm_grad", 1, 2e-6), rms_norm::backward),
        (Nudge("row_norms", 0, 1e-6), rows::norms),
        (Deaf("range of row_norms"), rows::norms),
        (Deaf("small rows of row_norms"), rows::norms),
        (Nudge("scale_columns", 0, 2e-7), rows::scale),
        (Nudge("scale_columns_grad", 0, 5e-7), rows::scale_grad),
        (Nudge("scale_columns_grad", 1, 1e-6), rows::scale_grad),
        (Nudge("rope", 0, 4e-7), rope::agrees),
        (Nudge("attention", 0, 2e-6), attention::forward),
        (Nudge("attention", 1, 2e-6), attention::forward),
        (Nudge("attention_grad", 0, 1e-5), attention::backward),
        (Nudge("attention_grad", 1, 1e-5), attention::backward),
        (Nudge("attention_grad", 2, 1e-5), attention::backward),
        (Nudge("embedding", 0, 2e-7), embedding::forward),
        (Nudge("embedding_grad", 0, 4e-7), embedding::backward),
        (Nudge("cross_entropy", 0, 2e-6), cross_entropy::forward),
        (Nudge("cross_entropy_grad", 0, 5e-6), cross_entropy::backward),
        (Nudge("cross_entropy_grad", 1, 2e-6), cross_entropy::backward),
        (Nudge("adamw", 0, 5e-7), adamw::steps),
        (Nudge("adamw", 1, 1e-6), adamw::steps),
        (Nudge("adamw", 2, 1e-6), adamw::steps),
        // param; the codes and scales of m and of v.
        (Nudge("adamw_8bit", 0, 5e-7), adamw_8bit::steps),
        (Nudge("adamw_8bit", 1, 0.0), adamw_8bit::steps),
        (Nudge("adamw_8bit", 2, 1e-6), adamw_8bit::steps),
        (Nudge("adamw_8bit", 3, 0.0), adamw_8bit::steps),
        (Nudge("adamw_8bit", 4, 1e-6), adamw_8bit::steps),
        (Nudge("importance", 0, 1e-6), importance::steps),
        (Nudge("importance", 1, 2e-6), importance::steps),
        (Nudge("importance", 2, 3e-6), importance::steps),
        (Nudge("hard_concrete", 0, 2e-6), hard_concrete::forward),
        (Nudge("hard_concrete_grad", 0, 5e-6), hard_concrete::backward),
        (Deaf("sum of hard_concrete"), hard_concrete::forward),
        (Deaf("f64 of fill"), memory::fill),
        (Deaf("f64 of sum_squares"), elementwise::sum_squares),
        (Deaf("host bytes"), memory::host_bytes),
    ]);
}

#[test]
fn a_parameter_that_is_not_listened_to_is_caught() {
    caught(&[
        (Deaf("stream"), elementwise::dropout),
        (Deaf("accumulate of matmul"), matmul::agrees),
        (Deaf("compute"), matmul::bf16),
        (Deaf("compute"), linear::forward_bf16),
        (Deaf("compute"), linear::grad_input_bf16),
        (Deaf("compute"), linear::grad_weight_bf16),
        (Deaf("bias"), linear::forward),
        (Deaf("low_rank"), linear::forward),
        (Deaf("per_rank"), linear::forward),
        (Deaf("row_scale"), linear::forward),
        (Deaf("dropout"), linear::forward),
        (Deaf("scale of the update"), linear::forward),
        (Deaf("low_rank"), linear::grad_input),
        (Deaf("per_rank"), linear::grad_input),
        (Deaf("row_scale"), linear::grad_input),
        (Deaf("dropout"), linear::grad_input),
        (Deaf("accumulate of dx"), linear::grad_input),
        (Deaf("dropout"), linear::grad_weight),
        (Deaf("scale of the update"), linear::grad_weight),
        (Deaf("eps"), rms_norm::forward),
        (Deaf("accumulate of rms_norm"), rms_norm::backward),
        (Deaf("inverse"), rope::agrees),
        (Deaf("window"), attention::forward),
        (Deaf("starts"), attention::forward),
        (Deaf("window"), attention::backward),
        (Deaf("starts"), attention::backward),
        (Deaf("scale"), cross_entropy::backward),
        (Deaf("step"), adamw::steps),
        (Deaf("weight_decay"), adamw::steps),
        (Deaf("step"), adamw_8bit::steps),
        (Deaf("weight_decay"), adamw_8bit::steps),
        (Deaf("the least v"), adamw_8bit::steps),
        (Deaf("function"), activate::backward),
        (Deaf("accumulate of scale_columns"), rows::scale_grad),
        (Deaf("beta2"), importance::steps),
        (Deaf("grad_scale"), importance::steps),
        (Deaf("noise"), hard_concrete::forward),
        (Deaf("stream"), hard_concrete::forward),
        (Deaf("noise"), hard_concrete::backward),
        (Deaf("penalty"), hard_concrete::backward),
    ]);
}

/// Each law of 4-bit quantisation by a fault that leaves the others' subjects alone as far as one can.
#[test]
fn a_broken_law_of_quantisation_is_caught() {
    caught(&[
        (Nudge("dequantize_4bit", 0, 0.25), quantize_laws::worst_case),
        (Nudge("quantize_scales", 1, 0.1), quantize_laws::worst_case),
        (Nudge("quantize_4bit", 0, 0.0), quantize_laws::nearest),
        (Nudge("quantize_4bit", 1, 2e-7), quantize_laws::idempotent),
        (Deaf("scales below 1e-6"), quantize_laws::equivariant),
        (Deaf("signs"), quantize_laws::symmetric),
        (Nudge("quantize_4bit", 0, 0.0), quantize_laws::monotone),
        (Deaf("scales below 1e-6"), quantize_laws::denormal),
        (Deaf("signs"), quantize_laws::denormal),
        (Lenient("quantize_4bit"), quantize_laws::not_finite),
        (Nudge("quantize_4bit", 0, 0.0), quantize_laws::any_shape),
        (Nudge("dequantize_4bit", 0, 2e-2), quantize_laws::any_shape),
        (Deaf("offset"), quantize_laws::any_shape),
        (Deaf("the codes' last bit"), quantize_normal::published_errors),
        (Deaf("format"), quantize_normal::order),
        (Nudge("quantize_scales", 1, 4.0), quantize_normal::double_costs_little),
    ]);
}

/// Each kernel's first output, or the one named: kernel, output, law.
const WRITES: [(&str, usize, Law); 44] = [
    ("fill", 0, memory::fill),
    ("copy", 0, memory::copy),
    ("cast", 0, memory::cast),
    ("scale_in_place", 0, elementwise::scale_in_place),
    ("add", 0, elementwise::add),
    ("divide", 0, elementwise::divide),
    ("add_in_place", 0, elementwise::add_in_place),
    ("dropout", 0, elementwise::dropout),
    ("silu_mul", 0, elementwise::silu_mul),
    ("silu_mul_grad", 1, elementwise::silu_mul_grad),
    ("matmul", 0, matmul::agrees),
    ("linear", 0, linear::forward),
    ("linear_grad_input", 0, linear::grad_input),
    ("linear_grad_weight", 2, linear::grad_weight),
    ("linear_grad_weight", 5, linear::grad_weight),
    ("quantize_4bit", 0, quantize::quantize_4bit),
    ("quantize_4bit", 1, quantize::quantize_4bit),
    ("quantize_scales", 1, quantize::quantize_scales),
    ("dequantize_4bit", 0, quantize::dequantize_4bit),
    ("quantize_8bit", 0, quantize::quantize_8bit),
    ("dequantize_8bit", 0, quantize::dequantize_8bit),
    ("rms_norm", 0, rms_norm::forward),
    ("rms_norm_grad", 0, rms_norm::backward),
    ("rope", 0, rope::agrees),
    ("attention", 0, attention::forward),
    ("attention_grad", 1, attention::backward),
    ("embedding", 0, embedding::forward),
    ("embedding_grad", 0, embedding::backward),
    ("cross_entropy", 0, cross_entropy::forward),
    ("cross_entropy_grad", 1, cross_entropy::backward),
    ("adamw", 2, adamw::steps),
    ("adamw_8bit", 0, adamw_8bit::steps),
    ("adamw_8bit", 1, adamw_8bit::steps),
    ("adamw_8bit", 4, adamw_8bit::steps),
    ("activate", 0, activate::forward),
    ("activate_grad", 0, activate::backward),
    ("row_norms", 0, rows::norms),
    ("scale_columns", 0, rows::scale),
    ("scale_columns_grad", 0, rows::scale_grad),
    ("scale_columns_grad", 1, rows::scale_grad),
    ("importance", 1, importance::steps),
    ("importance", 2, importance::steps),
    ("hard_concrete", 0, hard_concrete::forward),
    ("hard_concrete_grad", 0, hard_concrete::backward),
];

#[test]
fn a_write_beyond_the_output_is_caught() {
    caught(&WRITES.map(|(kernel, output, law)| (Spill(kernel, output), law)));
}

#[test]
fn an_element_that_is_not_written_is_caught() {
    caught(&WRITES.map(|(kernel, output, law)| (Skip(kernel, output), law)));
}

#[test]
fn a_result_that_is_not_the_same_twice_is_caught() {
    caught(&WRITES.map(|(kernel, output, law)| (Unsteady(kernel, output), law))[3..]);
}

#[test]
fn a_gradient_whose_bits_depend_on_the_others_asked_for_is_caught() {
    caught(&[
        (Lonely("silu_mul_grad", 0), elementwise::silu_mul_grad),
        (Lonely("silu_mul_grad", 1), elementwise::silu_mul_grad),
        (Lonely("linear_grad_weight", 2), linear::grad_weight),
        (Lonely("rms_norm_grad", 0), rms_norm::backward),
        (Lonely("rms_norm_grad", 1), rms_norm::backward),
        (Lonely("scale_columns_grad", 0), rows::scale_grad),
        (Lonely("scale_columns_grad", 1), rows::scale_grad),
        (Lonely("attention_grad", 0), attention::backward),
        (Lonely("attention_grad", 1), attention::backward),
        (Lonely("attention_grad", 2), attention::backward),
    ]);
}

/// Two backends that agree within the bounds, but not to the bit, have two digests.
#[test]
fn other_bits_within_the_bounds_are_told_apart() {
    let last_bit = Mutant::new(Nudge("matmul", 0, f64::from(f32::EPSILON)));
    let law = |candidate: &dyn Backend| matmul::large(candidate, &ORACLE);
    let (exact, nudged) = (law(&ORACLE), law(&last_bit));
    assert!(matches!((&exact, &nudged), (Verdict::Holds { .. }, Verdict::Holds { .. })), "{nudged:?}");
    assert_ne!(exact, nudged);
    assert_eq!(exact, law(&ORACLE));
}

#[test]
fn an_error_that_is_not_reported_is_caught() {
    let laws: [Law; 3] = [errors::lengths, errors::dtypes, errors::foreign];
    let kernels = [
        "copy",
        "add",
        "divide",
        "matmul",
        "linear",
        "rms_norm_grad",
        "attention",
        "quantize_8bit",
        "adamw",
        "adamw_8bit",
        "cast",
        "activate",
        "activate_grad",
        "row_norms",
        "scale_columns",
        "scale_columns_grad",
        "importance",
        "hard_concrete",
        "hard_concrete_grad",
    ];
    for kernel in kernels {
        caught(&laws.map(|law| (Lenient(kernel), law)));
        caught(&laws.map(|law| (Hasty(kernel), law)));
    }
    caught(&[
        (Lenient("read"), errors::lengths),
        (Lenient("write"), errors::lengths),
        (Lenient("embedding"), errors::values),
        (Lenient("cross_entropy"), errors::values),
        (Lenient("rope"), errors::values),
        (Lenient("quantize_4bit"), errors::values),
        (Lenient("quantize_4bit"), errors::parameters),
        (Lenient("dropout"), errors::parameters),
        (Lenient("adamw"), errors::parameters),
        (Lenient("adamw_8bit"), errors::parameters),
        (Lenient("attention"), errors::parameters),
        (Lenient("importance"), errors::parameters),
        (Lenient("hard_concrete"), errors::parameters),
        (Lenient("hard_concrete_grad"), errors::parameters),
        (Lenient("matmul"), errors::products),
        (Lenient("row_norms"), errors::products),
    ]);
}
