//! The conformance suite: every law that a backend keeps, checked against an oracle on random cases.
//!
//! A backend's `tests/conformance.rs` is one line, [`conformance!`](crate::conformance!), which expands to one test
//! a law. A law draws shapes and values, runs the kernel on the candidate in f32 and on the oracle in f64 (the same
//! values, copied exactly), and compares them within a bound that [`bound`] derives; quantisation, copies and casts
//! agree to the bit. Every law also runs the candidate twice and asks for the same bits, gives it slices in the
//! middle of larger buffers and checks the memory on either side, and hands it outputs full of NaN so that an
//! element that was left out, or read before it was written, is seen.
//!
//! Cases come from a fixed seed, so that a failure is the same everywhere; `PROPTEST_RNG_SEED` and `PROPTEST_CASES`
//! change that.
//!
//! In reading order: [`bound`]; `draw` (shapes and values); `harness` (cases, guarded memory, comparison); then a
//! file a kernel family.

pub mod bound;
mod draw;
mod harness;

pub mod activate;
pub mod adamw;
pub mod adamw_8bit;
pub mod attention;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod errors;
pub mod hard_concrete;
pub mod importance;
pub mod linear;
pub mod matmul;
pub mod memory;
pub mod quantize;
pub mod quantize_laws;
pub mod quantize_normal;
pub mod rms_norm;
pub mod rope;
pub mod rows;

pub use harness::{Verdict, few_cases};

use crate::Backend;

/// A law: what a candidate does, judged by an oracle.
pub type Law = fn(&dyn Backend, &dyn Backend) -> Verdict;

/// Every law by its test's name, for tests that run them in ways of their own.
pub const LAWS: &[(&str, Law)] = crate::conformance!(@each list []);

/// One `#[test]` a law, for the backend that `candidate` makes (anew for each), judged by the one that `oracle`
/// makes. A `twin` is judged too, and has to give the candidate's own bits: the same backend with another number of
/// threads.
///
/// ```ignore
/// rankfold_backend::conformance!(
///     candidate: CpuBackend::new(Some(1)),
///     oracle: ReferenceBackend::new(),
///     twin: CpuBackend::new(Some(2)),
/// );
/// ```
#[macro_export]
macro_rules! conformance {
    (candidate: $candidate:expr, oracle: $oracle:expr $(, twin: $twin:expr)? $(,)?) => {
        $crate::conformance! { @each tests [$candidate, $oracle, [$($twin)?]] }
    };
    (@each $arm:ident $arguments:tt) => {
        $crate::conformance! { @$arm $arguments;
            bytes_survive_a_round_trip => memory::round_trip,
            host_bytes_are_the_buffers_own => memory::host_bytes,
            fill_agrees => memory::fill,
            copy_equals_to_the_bit => memory::copy,
            cast_equals_to_the_bit => memory::cast,
            scale_in_place_agrees => elementwise::scale_in_place,
            add_agrees => elementwise::add,
            add_in_place_agrees => elementwise::add_in_place,
            divide_agrees => elementwise::divide,
            sum_squares_agrees => elementwise::sum_squares,
            dropout_agrees => elementwise::dropout,
            silu_mul_agrees => elementwise::silu_mul,
            silu_mul_backward_agrees => elementwise::silu_mul_grad,
            activations_agree => activate::forward,
            activations_backward_agree => activate::backward,
            matmul_agrees => matmul::agrees,
            matmul_of_large_matrices_agrees => matmul::large,
            matmul_passes_nan_and_infinity_on => matmul::non_finite,
            matmul_bf16_agrees => matmul::bf16,
            linear_forward_agrees => linear::forward,
            linear_input_gradient_agrees => linear::grad_input,
            linear_weight_gradients_agree => linear::grad_weight,
            linear_of_large_matrices_agrees => linear::large,
            linear_bf16_forward_agrees => linear::forward_bf16,
            linear_bf16_input_gradient_agrees => linear::grad_input_bf16,
            linear_bf16_weight_gradients_agree => linear::grad_weight_bf16,
            linear_bf16_of_large_matrices_agrees => linear::large_bf16,
            quantize_4bit_equals_to_the_bit => quantize::quantize_4bit,
            dequantize_4bit_equals_to_the_bit => quantize::dequantize_4bit,
            quantize_scales_equals_to_the_bit => quantize::quantize_scales,
            quantize_8bit_equals_to_the_bit => quantize::quantize_8bit,
            dequantize_8bit_equals_to_the_bit => quantize::dequantize_8bit,
            four_bit_weights_of_any_shape_equal_to_the_bit => quantize_laws::any_shape,
            four_bit_errors_stay_under_the_worst_case => quantize_laws::worst_case,
            four_bit_codes_are_the_nearest => quantize_laws::nearest,
            four_bit_quantisation_is_idempotent => quantize_laws::idempotent,
            four_bit_quantisation_is_equivariant_under_powers_of_two => quantize_laws::equivariant,
            four_bit_quantisation_is_symmetric_where_the_format_is => quantize_laws::symmetric,
            four_bit_quantisation_is_monotone_within_a_block => quantize_laws::monotone,
            four_bit_denormals_and_zeros_of_both_signs_are_defined => quantize_laws::denormal,
            four_bit_quantisation_names_the_first_element_that_is_not_finite => quantize_laws::not_finite,
            four_bit_errors_of_normal_weights_are_the_published_ones => quantize_normal::published_errors,
            four_bit_formats_rank_as_published_on_normal_weights => quantize_normal::order,
            double_quantisation_adds_less_than_a_percent => quantize_normal::double_costs_little,
            rms_norm_forward_agrees => rms_norm::forward,
            rms_norm_backward_agrees => rms_norm::backward,
            row_norms_agree => rows::norms,
            scale_columns_agrees => rows::scale,
            scale_columns_backward_agrees => rows::scale_grad,
            rope_agrees => rope::agrees,
            attention_forward_agrees => attention::forward,
            attention_backward_agrees => attention::backward,
            attention_bf16_forward_agrees => attention::forward_bf16,
            attention_bf16_backward_agrees => attention::backward_bf16,
            embedding_equals_to_the_bit => embedding::forward,
            embedding_backward_agrees => embedding::backward,
            cross_entropy_agrees => cross_entropy::forward,
            cross_entropy_backward_agrees => cross_entropy::backward,
            cross_entropy_of_nan_is_nan => cross_entropy::nan,
            adamw_agrees => adamw::steps,
            adamw_8bit_agrees => adamw_8bit::steps,
            importance_agrees => importance::steps,
            hard_concrete_agrees => hard_concrete::forward,
            hard_concrete_backward_agrees => hard_concrete::backward,
            wrong_lengths_are_errors => errors::lengths,
            wrong_element_types_are_errors => errors::dtypes,
            foreign_buffers_are_errors => errors::foreign,
            wrong_values_are_errors => errors::values,
            contradicting_parameters_are_errors => errors::parameters,
            products_that_wrap_around_are_errors => errors::products,
        }
    };
    (@list []; $($test:ident => $family:ident::$law:ident,)*) => {
        &[$((stringify!($test), $crate::conformance::$family::$law as $crate::conformance::Law),)*]
    };
    (@tests [$candidate:expr, $oracle:expr, $twin:tt]; $($test:ident => $family:ident::$law:ident,)*) => {
        $(
            #[test]
            fn $test() {
                let (law, oracle) = ($crate::conformance::$family::$law, $oracle);
                let verdict = law(&$candidate, &oracle);
                $crate::conformance::judge(stringify!($test), &verdict);
                $crate::conformance!(@twin $twin, law, oracle, verdict);
            }
        )*
    };
    (@twin [], $law:ident, $oracle:ident, $verdict:ident) => {};
    (@twin [$twin:expr], $law:ident, $oracle:ident, $verdict:ident) => {
        assert_eq!($law(&$twin, &$oracle), $verdict, "the twin's bits are not the candidate's");
    };
}

/// What a test makes of a verdict: a broken law fails it, a skipped one says why on standard error.
///
/// # Panics
/// Where the law is broken: that is how a test fails.
pub fn judge(law: &str, verdict: &Verdict) {
    match verdict {
        Verdict::Holds { .. } => {}
        Verdict::Skipped(why) => eprintln!("{law}: skipped, {why}"),
        Verdict::Broken(why) => panic!("{law}: {why}"),
    }
}
