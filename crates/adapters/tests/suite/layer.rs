//! The layer: its gradients, its dropout, its first values, and merging.

use crate::common::{UNIT, grid, layer, matrix, reference};
use half::{bf16, f16};
use proptest::prelude::*;
use rankfold_adapters::{DropoutKey, Error, Forward, Init, Linear, Lora, LoraSpec, Part, Weight, merged_weight};
use rankfold_autograd::gradcheck::{parameter, worst_error};
use rankfold_autograd::{Base, Parameter, Tape, Tensor, Value};
use rankfold_backend::{Backend, Compute, DType, Format, Quantized};
use rankfold_cpu::CpuBackend;
use std::sync::Arc;

fn backends() -> [Arc<dyn Backend>; 2] {
    [reference(), Arc::new(CpuBackend::new(Some(2)))]
}

const EVALUATION: Forward = Forward { compute: Compute::F32, dropout: None };

fn spec(rank: usize) -> LoraSpec {
    LoraSpec::new(rank, 3.0)
}

/// [outputs, inputs, rank, tokens] with W, A, B, x.
#[allow(clippy::type_complexity)] // a strategy's own type
fn cases() -> impl Strategy<Value = ([usize; 4], Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>)> {
    (1..7usize, 1..7usize, 1..9usize, 1..4usize).prop_flat_map(|(outputs, inputs, rank, tokens)| {
        let (w, a, b, x) = (outputs * inputs, rank * inputs, outputs * rank, tokens * inputs);
        (Just([outputs, inputs, rank, tokens]), grid(w), grid(a), grid(b), grid(x))
    })
}

fn lora(backend: &dyn Backend, [outputs, inputs, rank]: [usize; 3], a: &[f32], b: &[f32]) -> Lora {
    let a = Parameter::new(backend.upload(a).unwrap(), [rank, inputs]).unwrap();
    let b = Parameter::new(backend.upload(b).unwrap(), [outputs, rank]).unwrap();
    Lora::new("m", a, b, Part::None, spec(rank)).unwrap()
}

/// A layer of zeros.
fn blank(backend: &dyn Backend, index: u64, dims: [usize; 2]) -> Linear {
    layer(backend, "m", index, dims, &vec![0.0; dims[0] * dims[1]])
}

fn forward(backend: &Arc<dyn Backend>, layer: &Linear, x: &[f32], mode: Forward) -> Vec<f32> {
    let tape = Tape::inference(backend.clone());
    let x = Tensor::constant(backend.upload(x).unwrap(), [x.len() / layer.inputs(), layer.inputs()]).unwrap();
    backend.download(layer.forward(&tape, &x, &mode).unwrap().view()).unwrap()
}

/// What the two roundings and the truncation of a central difference leave, many times over: see `gradcheck`.
const ALLOWED: f64 = 1e-7;

#[test]
fn gradients_of_the_adapted_layer_match_differences() {
    let b = reference();
    let x = parameter(&b, 1, &[5, 4]).unwrap();
    let w = parameter(&b, 2, &[3, 4]).unwrap().tensor();
    let bias = parameter(&b, 3, &[3]).unwrap();
    let (lora_a, lora_b) = (parameter(&b, 4, &[2, 4]).unwrap(), parameter(&b, 5, &[3, 2]).unwrap());
    for (rslora, dropout) in [(false, 0.0), (true, 0.0), (false, 0.4)] {
        let bias = Some(Value::Trained(bias.clone()));
        let mut layer = Linear::new("m", 3, Weight::Frozen(Base::Dense(w.clone())), bias).unwrap();
        let spec = LoraSpec { rslora, dropout, ..spec(2) };
        layer.set_adapter(Lora::new("m", lora_a.clone(), lora_b.clone(), Part::None, spec).unwrap()).unwrap();
        let trained: Vec<Parameter> = layer.parameters().into_iter().map(|(_, parameter)| parameter).collect();
        assert_eq!(trained.len(), 3, "bias, A, B; W is frozen though it was given as a variable");
        let mode = Forward { dropout: Some(DropoutKey { seed: 1, draw: 2 }), ..EVALUATION };
        let all = [vec![x.clone()], trained].concat();
        let worst = worst_error(&b, &all, |tape| {
            layer.forward(tape, &x.tensor(), &mode).map_err(|error| match error {
                Error::Autograd(error) => error,
                other => panic!("{other}"),
            })
        });
        assert!(worst.unwrap() < ALLOWED);
    }
}

#[test]
fn gradients_of_the_trained_layer_match_differences() {
    let b = reference();
    let x = parameter(&b, 1, &[5, 4]).unwrap();
    let (w, bias) = (parameter(&b, 2, &[3, 4]).unwrap(), parameter(&b, 3, &[3]).unwrap());
    let layer = Linear::new("m", 0, Weight::Trained(w.clone()), Some(Value::Trained(bias.clone()))).unwrap();
    let names: Vec<String> = layer.parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["m.weight", "m.bias"]);
    let worst = worst_error(&b, &[x.clone(), w, bias], |tape| {
        layer.forward(tape, &x.tensor(), &EVALUATION).map_err(|error| match error {
            Error::Autograd(error) => error,
            other => panic!("{other}"),
        })
    });
    assert!(worst.unwrap() < ALLOWED);
}

#[test]
fn an_adapter_needs_a_frozen_base_of_its_own_shape() {
    let b = reference();
    let b = b.as_ref();
    let lora = lora(b, [3, 4, 2], &[0.0; 8], &[0.0; 6]);
    let trained = Parameter::new(b.upload(&[0f32; 12]).unwrap(), [3, 4]).unwrap();
    let mut trained = Linear::new("m", 0, Weight::Trained(trained), None).unwrap();
    assert!(matches!(trained.set_adapter(lora.clone()), Err(Error::TrainedBase { module }) if module == "m"));
    let refuse = |dims: [usize; 2]| {
        let mut layer = layer(b, "m", 0, dims, &vec![0.0; dims[0] * dims[1]]);
        layer.set_adapter(lora.clone()).unwrap_err().to_string()
    };
    assert_eq!(refuse([3, 5]), "m: 'lora_A' has shape [2, 4], expected [2, 5]");
    assert_eq!(refuse([2, 4]), "m: 'lora_B' has shape [3, 2], expected [2, 2]");
}

#[test]
fn a_layer_has_a_matrix_and_a_bias_of_its_outputs_and_an_index_with_streams() {
    let b = reference();
    let tensor = |dims: &[usize]| {
        Tensor::constant(b.upload(&vec![0f32; dims.iter().product()]).unwrap(), dims.to_vec()).unwrap()
    };
    let new = |index, w: &[usize], bias: &[usize]| {
        Linear::new("m", index, Weight::Frozen(Base::Dense(tensor(w))), Some(Value::Frozen(tensor(bias))))
    };
    assert!(new(0, &[3, 4], &[3]).is_ok());
    let message = |result: Result<Linear, Error>| result.unwrap_err().to_string();
    assert!(message(new(0, &[3, 4, 1], &[3])).contains("expected [outputs, inputs]"));
    assert_eq!(message(new(0, &[3, 4], &[4])), "m: 'bias' has shape [4], expected [3]");
    assert_eq!(message(new(1 << 20, &[3, 4], &[3])), "'m: index' is 1048576, expected a number below 1048576");
}

#[test]
fn dropout_is_drawn_by_micro_batch_and_layer_and_not_in_evaluation() {
    let b = reference();
    let x = [1.0; 64];
    let run = |index, dropout| {
        let mut layer = layer(b.as_ref(), "m", index, [1, 64], &[0.0; 64]);
        let half = LoraSpec { dropout: 0.5, ..LoraSpec::new(1, 1.0) };
        let a = Parameter::new(b.upload(&[1f32; 64]).unwrap(), [1, 64]).unwrap();
        let one = Parameter::new(b.upload(&[1f32]).unwrap(), [1, 1]).unwrap();
        layer.set_adapter(Lora::new("m", a, one, Part::None, half).unwrap()).unwrap();
        // Rows of one 1 each: y_t is 2 where element t·64 + t is kept, 0 where it is dropped.
        let rows: Vec<f32> = (0..64 * 64).map(|i| if i % 65 == 0 { x[i % 64] } else { 0.0 }).collect();
        forward(&b, &layer, &rows, Forward { dropout, ..EVALUATION })
    };
    let key = |seed, draw| Some(DropoutKey { seed, draw });
    assert_eq!(run(0, None), [1.0; 64]);
    let drawn = run(0, key(1, 0));
    assert!(drawn.iter().all(|&y| y == 0.0 || y == 2.0));
    // 64 fair coins: fewer than 12 or more than 52 of a kind is beyond five standard deviations of 4.
    assert!((12..=52).contains(&drawn.iter().filter(|&&y| y == 2.0).count()));
    assert_eq!(drawn, run(0, key(1, 0)));
    for other in [run(0, key(1, 1)), run(1, key(1, 0)), run(0, key(2, 0))] {
        assert_ne!(drawn, other);
    }
}

fn init(init: Init, seed: u64, layer: u64) -> [Vec<f32>; 2] {
    let b = reference();
    let lora = Lora::init(b.as_ref(), &blank(b.as_ref(), layer, [60, 100]), spec(50), init, seed).unwrap();
    [lora.a(), lora.b()].map(|parameter| b.download(parameter.tensor().view()).unwrap())
}

/// Moments of 5000 draws. The mean of n draws of variance σ² is within 5σ/√n, the mean of squares within
/// 5·√((κ − 1)/n)·σ² of σ², κ the kurtosis: 9/5 for uniform, 3 for normal numbers. The draws are fixed.
#[test]
fn first_values_have_the_stated_distributions() {
    let check = |values: &[f32], variance: f64, kurtosis: f64| {
        let n = values.len() as f64;
        let moment = |power| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / n;
        assert!(moment(1).abs() < 5.0 * (variance / n).sqrt(), "mean {}", moment(1));
        assert!((moment(2) / variance - 1.0).abs() < 5.0 * ((kurtosis - 1.0) / n).sqrt(), "squares {}", moment(2));
    };
    let [a, b] = init(Init::Kaiming, 7, 3);
    check(&a, 1.0 / 300.0, 1.8);
    assert!(a.iter().all(|a| a.abs() <= 0.1) && a.iter().any(|a| a.abs() > 0.099));
    assert!(b.iter().all(|&b| b.to_bits() == 0));

    let [a, b] = init(Init::Gaussian, 7, 3);
    check(&a, 1.0 / 2500.0, 3.0);
    // Of normal numbers 0.27 % lie beyond 3 σ: of 5000 about 13.5, within five times √13.5.
    assert!((1..=32).contains(&a.iter().filter(|a| a.abs() > 0.06).count()));
    assert!(b.iter().all(|&b| b.to_bits() == 0));

    let [a, b] = init(Init::Random, 7, 3);
    check(&a, 1.0 / 300.0, 1.8);
    check(&b, 1.0 / 150.0, 1.8);
    assert_ne!(a[..100], b[..100]);
}

#[test]
fn first_values_are_a_function_of_seed_and_layer() {
    assert_eq!(init(Init::Kaiming, 7, 3), init(Init::Kaiming, 7, 3));
    assert_ne!(init(Init::Kaiming, 7, 3), init(Init::Kaiming, 8, 3));
    assert_ne!(init(Init::Kaiming, 7, 3), init(Init::Kaiming, 7, 4));
}

#[test]
fn a_rank_above_the_matrix_is_legal_and_wasteful() {
    assert!(!spec(4).is_wasteful([4, 9]) && spec(5).is_wasteful([4, 9]) && spec(5).is_wasteful([9, 4]));
    let b = reference();
    assert!(Lora::init(b.as_ref(), &blank(b.as_ref(), 0, [4, 9]), spec(12), Init::Kaiming, 0).is_ok());
}

#[test]
fn hyper_parameters_out_of_range_are_named() {
    let refuse = |spec: LoraSpec| spec.check().unwrap_err().to_string();
    assert_eq!(refuse(spec(0)), "'r' is 0, expected 1 or more");
    let alpha = LoraSpec { alpha: f64::INFINITY, ..spec(1) };
    assert_eq!(refuse(alpha), "'lora_alpha' is inf, expected a finite number");
    for dropout in [1.0, -0.1, f64::NAN, 1.0 - 1e-12] {
        assert!(refuse(LoraSpec { dropout, ..spec(1) }).starts_with("'lora_dropout' is "));
    }
    let backend = reference();
    assert!(Lora::init(backend.as_ref(), &blank(backend.as_ref(), 0, [3, 4]), spec(0), Init::Kaiming, 0).is_err());
    let a = Parameter::new(backend.upload(&[0f32; 8]).unwrap(), [2, 4]).unwrap();
    let b = Parameter::new(backend.upload(&[0f32; 9]).unwrap(), [3, 3]).unwrap();
    let message = Lora::new("m", a, b, Part::None, spec(2)).unwrap_err().to_string();
    assert_eq!(message, "m: 'lora_B' has shape [3, 3], expected [outputs, 2]");
}

/// M_ij = |w| + |s|·Σ_k |b_k a_k|, and the exact w + s·Σ_k b_k a_k, of element i.
fn exact(w: f64, lora: &Lora, a: &[f32], b: &[f32], i: usize, inputs: usize) -> (f64, f64) {
    let (rank, scale) = (lora.spec().rank, f64::from(lora.spec().scale()));
    let products =
        (0..rank).map(|k| scale * f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs]));
    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
    (w + sum, w.abs() + size)
}

proptest! {
    #[test]
    fn an_update_of_b_zero_leaves_the_output_untouched_to_the_bit(
        ([outputs, inputs, rank, _], w, a, _, x) in cases()
    ) {
        for backend in backends() {
            let mut layer = layer(backend.as_ref(), "m", 0, [outputs, inputs], &w);
            let base = forward(&backend, &layer, &x, EVALUATION);
            layer.set_adapter(lora(backend.as_ref(), [outputs, inputs, rank], &a, &vec![0.0; outputs * rank])).unwrap();
            let adapted = forward(&backend, &layer, &x, EVALUATION);
            // Sums on a grid are never −0, which + 0 would change.
            let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<u32>>();
            prop_assert_eq!(bits(&base), bits(&adapted));
        }
    }

    /// The bound of `merge`, for each element type that a base may have. Half a unit in the last place is 2⁻⁸ of the
    /// value in bf16 and 2⁻¹¹ in f16, there at least 2⁻²⁵; in f32 the sum's own rounding is the last.
    #[test]
    fn a_merged_element_is_within_its_bound(([outputs, inputs, rank, _], w, a, b, _) in cases()) {
        for backend in backends() {
        let backend = backend.as_ref();
        let lora = lora(backend, [outputs, inputs, rank], &a, &b);
        for (dtype, half_ulp, smallest) in
            [(DType::F32, 0.0, 0.0), (DType::Bf16, 2f64.powi(-8), 0.0), (DType::F16, 2f64.powi(-11), 2f64.powi(-25))]
        {
            let stored: Vec<f32> = match dtype {
                DType::Bf16 => w.iter().map(|&w| bf16::from_f32(w).to_f32()).collect(),
                DType::F16 => w.iter().map(|&w| f16::from_f32(w).to_f32()).collect(),
                _ => w.clone(),
            };
            let as_f32 = backend.upload(&stored).unwrap();
            let mut buffer = backend.alloc(dtype, w.len()).unwrap();
            backend.cast(as_f32.view(), buffer.view_mut()).unwrap();
            let base = Base::Dense(Tensor::constant(buffer, [outputs, inputs]).unwrap());
            let merged = merged_weight(backend, "m", &base, &lora, dtype).unwrap();
            prop_assert_eq!(merged.dtype(), dtype);
            let mut wide = backend.alloc(DType::F32, w.len()).unwrap();
            backend.cast(merged.view(), wide.view_mut()).unwrap();
            for (i, merged) in backend.download::<f32>(wide.view()).unwrap().into_iter().enumerate() {
                let merged = f64::from(merged);
                let (value, size) = exact(f64::from(stored[i]), &lora, &a, &b, i, inputs);
                let sum = (rank as f64 + 4.0) * UNIT * size;
                let bound = sum + (half_ulp * (value.abs() + sum)).max(smallest);
                prop_assert!((merged - value).abs() <= bound, "{dtype} {merged} {value} {bound:e}");
            }
        }
        }
    }

    /// On `reference` each output is rounded once, and W' is off by (r + 4)·u·M: the two outputs differ by at most
    /// Σ_j |x_j| (r + 4)·u·M_oj and a rounding each of at most u·Σ_j |x_j| M_oj (1 + 2⁻²⁰).
    #[test]
    fn the_merged_layer_computes_what_the_unmerged_one_does_and_unmerging_is_exact(
        ([outputs, inputs, rank, tokens], w, a, b, x) in cases()
    ) {
        let backend = reference();
        let mut layer = layer(backend.as_ref(), "m", 0, [outputs, inputs], &w);
        let lora = lora(backend.as_ref(), [outputs, inputs, rank], &a, &b);
        layer.set_adapter(lora.clone()).unwrap();
        let unmerged = forward(&backend, &layer, &x, EVALUATION);
        layer.merge(backend.as_ref()).unwrap();
        prop_assert!(layer.adapter().is_none() && layer.parameters().is_empty());
        let merged = forward(&backend, &layer, &x, EVALUATION);
        for t in 0..tokens {
            for o in 0..outputs {
                let size = |j: usize| {
                    let i = o * inputs + j;
                    f64::from(x[t * inputs + j].abs()) * exact(f64::from(w[i]), &lora, &a, &b, i, inputs).1
                };
                let bound = (rank as f64 + 7.0) * UNIT * (0..inputs).map(size).sum::<f64>();
                let [y, z] = [&unmerged, &merged].map(|y| f64::from(y[t * outputs + o]));
                prop_assert!((y - z).abs() <= bound, "{y} {z} {bound:e}");
            }
        }
        layer.unmerge();
        prop_assert_eq!(matrix(backend.as_ref(), &layer), w);
        prop_assert_eq!(layer.adapter().map(|back| back.a().id()), Some(lora.a().id()));
        prop_assert_eq!(forward(&backend, &layer, &x, EVALUATION), unmerged);
    }
}

#[test]
fn a_quantised_base_is_merged_into_a_dequantised_copy_and_comes_back() {
    let b = reference();
    let backend = b.as_ref();
    let w: Vec<f32> = (0..2 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    let w = backend.upload(&w).unwrap();
    let quantized = Quantized::quantize(backend, w.view(), [2, 32], Format::Nf4, 32, true).unwrap();
    let mut dequantized = backend.alloc(DType::F32, 64).unwrap();
    backend.dequantize_4bit(&quantized, dequantized.view_mut()).unwrap();
    let dequantized: Vec<f32> = backend.download(dequantized.view()).unwrap();

    let quantized = Arc::new(quantized);
    let mut layer = Linear::new("m", 0, Weight::Frozen(Base::Quantized(quantized.clone())), None).unwrap();
    let (a, rows) = (vec![0.25; 32], [1.0, -2.0]);
    let lora = lora(backend, [2, 32, 1], &a, &rows);
    layer.set_adapter(lora.clone()).unwrap();
    layer.merge(backend).unwrap();
    for (i, merged) in matrix(backend, &layer).into_iter().enumerate() {
        let (value, size) = exact(f64::from(dequantized[i]), &lora, &a, &rows, i, 32);
        assert!((f64::from(merged) - value).abs() <= 5.0 * UNIT * size);
    }
    layer.unmerge();
    assert!(matches!(layer.base(), Base::Quantized(back) if Arc::ptr_eq(&back, &quantized)));
    assert!(layer.adapter().is_some());
}

#[test]
fn a_merge_beyond_the_element_type_is_refused_and_changes_nothing() {
    let b = reference();
    let backend = b.as_ref();
    let w = backend.upload(&[f16::from_f32(60_000.0)]).unwrap();
    let base = Base::Dense(Tensor::constant(w, [1, 1]).unwrap());
    let mut layer = Linear::new("model.q", 0, Weight::Frozen(base), None).unwrap();
    layer.set_adapter(lora(backend, [1, 1, 1], &[100.0], &[100.0])).unwrap();
    let message = layer.merge(backend).unwrap_err().to_string();
    assert_eq!(message, "model.q: merging gives values that are not finite in f16");
    assert!(layer.adapter().is_some());
    assert!(
        matches!(layer.base(), Base::Dense(w) if backend.download::<f16>(w.view()).unwrap()[0].to_f32() == 60_000.0)
    );
}
