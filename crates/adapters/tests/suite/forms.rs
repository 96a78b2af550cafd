//! DoRA and AdaLoRA: their gradients, where they begin, what they merge to, and triplets that go.

use crate::common::{UNIT, grid, layer, matrix, reference};
use proptest::prelude::*;
use rankfold_adapters::{DropoutKey, Error, Form, Forward, Init, Linear, Lora, LoraSpec, Part, Weight, streams};
use rankfold_autograd::gradcheck::{parameter, worst_error};
use rankfold_autograd::{Base, Parameter, Tape, Tensor};
use rankfold_backend::params::Dropout;
use rankfold_backend::{Backend, Compute, DType, Format, Quantized};
use rankfold_cpu::CpuBackend;
use std::sync::Arc;

const EVALUATION: Forward = Forward { compute: Compute::F32, dropout: None };
fn backends() -> [Arc<dyn Backend>; 2] {
    [reference(), Arc::new(CpuBackend::new(Some(2)))]
}

fn spec(form: Form, rank: usize) -> LoraSpec {
    LoraSpec { form, ..LoraSpec::new(rank, 3.0) }
}

#[derive(Clone, Debug)]
struct Case {
    outputs: usize,
    inputs: usize,
    rank: usize,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    /// m, or E.
    rest: Vec<f32>,
    x: Vec<f32>,
}

fn cases(form: Form) -> impl Strategy<Value = Case> {
    (1..7usize, 1..7usize, 1..6usize, 1..4usize).prop_flat_map(move |(outputs, inputs, rank, tokens)| {
        let rest = if form == Form::Dora { outputs } else { rank };
        let values = [outputs * inputs, rank * inputs, outputs * rank, rest, tokens * inputs].map(grid);
        values.prop_map(move |[w, a, b, rest, x]| Case { outputs, inputs, rank, w, a, b, rest, x })
    })
}

impl Case {
    fn layer(&self, backend: &dyn Backend) -> Linear {
        layer(backend, "m", 0, [self.outputs, self.inputs], &self.w)
    }

    /// A layer over w in 4 bits, and the case of what these decode to.
    fn in_4_bits(&self, backend: &dyn Backend) -> (Linear, Self) {
        let (w, dims) = (backend.upload(&self.w).unwrap(), [self.outputs, self.inputs]);
        let q = Quantized::quantize(backend, w.view(), dims, Format::Nf4, 32, false).unwrap();
        let mut values = backend.alloc(DType::F32, q.elements()).unwrap();
        backend.dequantize_4bit(&q, values.view_mut()).unwrap();
        let decoded = Self { w: backend.download(values.view()).unwrap(), ..self.clone() };
        (Linear::new("m", 0, Weight::Frozen(Base::Quantized(Arc::new(q))), None).unwrap(), decoded)
    }

    fn lora(&self, backend: &dyn Backend, form: Form) -> Lora {
        let of =
            |values: &[f32], dims: &[usize]| Parameter::new(backend.upload(values).unwrap(), dims.to_vec()).unwrap();
        let (a, b) = (of(&self.a, &[self.rank, self.inputs]), of(&self.b, &[self.outputs, self.rank]));
        let part = match form {
            Form::Plain => Part::None,
            Form::Dora => Part::Magnitude(of(&self.rest, &[self.outputs])),
            Form::AdaLora => Part::Triplets { lambda: of(&self.rest, &[self.rank, 1]), kept: vec![true; self.rank] },
        };
        Lora::new("m", a, b, part, spec(form, self.rank)).unwrap()
    }

    /// The exact w + s·Σ_k b_k (e_k) a_k of element i, and M = |w| + |s|·Σ_k |b_k (e_k) a_k|.
    fn exact(&self, lora: &Lora, i: usize) -> (f64, f64) {
        let scale = f64::from(lora.spec().scale());
        let (row, column) = (i / self.inputs, i % self.inputs);
        let middle = |k: usize| if lora.spec().form == Form::AdaLora { f64::from(self.rest[k]) } else { 1.0 };
        let product = |k: usize| {
            scale * middle(k) * f64::from(self.b[row * self.rank + k]) * f64::from(self.a[k * self.inputs + column])
        };
        let w = f64::from(self.w[i]);
        (0..self.rank).map(product).fold((w, w.abs()), |(sum, size), p| (sum + p, size + p.abs()))
    }
}

fn forward(backend: &Arc<dyn Backend>, layer: &Linear, x: &[f32]) -> Vec<f32> {
    forward_in(Compute::F32, backend, layer, x)
}

fn forward_in(compute: Compute, backend: &Arc<dyn Backend>, layer: &Linear, x: &[f32]) -> Vec<f32> {
    let tape = Tape::inference(backend.clone());
    let x = Tensor::constant(backend.upload(x).unwrap(), [x.len() / layer.inputs(), layer.inputs()]).unwrap();
    backend.download(layer.forward(&tape, &x, &Forward::evaluation(compute)).unwrap().view()).unwrap()
}

fn both_computes(form: Form) -> [(Form, Compute); 2] {
    [Compute::F32, Compute::Bf16].map(|compute| (form, compute))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn on_tape(layer: &Linear, x: &Tensor, tape: &Tape) -> rankfold_autograd::Result<Tensor> {
    layer.forward(tape, x, &EVALUATION).map_err(|error| match error {
        Error::Autograd(error) => error,
        other => panic!("{other}"),
    })
}

/// What the two roundings and the truncation of a central difference leave, many times over: see `gradcheck`.
const ALLOWED: f64 = 1e-7;

#[test]
fn adaloras_gradients_match_differences() {
    let b = reference();
    let (x, w) = (parameter(&b, 1, &[5, 4]).unwrap(), [0.3; 12]);
    let [p, q, e] = [(4, [2, 4]), (5, [3, 2]), (6, [2, 1])].map(|(stream, dims)| parameter(&b, stream, &dims).unwrap());
    let mut layer = layer_f64(&b, &w);
    let part = Part::Triplets { lambda: e.clone(), kept: vec![true, false, true] };
    layer.set_adapter(Lora::new("m", p.clone(), q.clone(), part, spec(Form::AdaLora, 3)).unwrap()).unwrap();
    let worst = worst_error(&b, &[x.clone(), p, q, e], |tape| on_tape(&layer, &x.tensor(), tape));
    assert!(worst.unwrap() < ALLOWED);
}

/// DoRA takes the norm for a constant (§4.3): so its gradients by x and m are the function's own; those by A and B are
/// `row_scale`'s of autograd's `linear`, whose test has them.
#[test]
fn doras_gradients_by_input_and_magnitude_match_differences() {
    let b = reference();
    let (x, w) = (parameter(&b, 1, &[5, 4]).unwrap(), [0.3; 12]);
    let [p, q] = [(4, [2, 4]), (5, [3, 2])].map(|(stream, dims)| parameter(&b, stream, &dims).unwrap());
    let m = parameter(&b, 6, &[3]).unwrap();
    let mut layer = layer_f64(&b, &w);
    layer.set_adapter(Lora::new("m", p, q, Part::Magnitude(m.clone()), spec(Form::Dora, 2)).unwrap()).unwrap();
    let worst = worst_error(&b, &[x.clone(), m], |tape| on_tape(&layer, &x.tensor(), tape));
    assert!(worst.unwrap() < ALLOWED);
}

/// Against PEFT's own arrangement of the sum, by entries, on the reference backend in f64.
#[test]
fn dora_under_dropout_adds_what_peft_adds_and_its_gradients_match_differences() {
    let b = reference();
    let (x, w) = (parameter(&b, 1, &[5, 4]).unwrap(), [0.3, -0.1, 0.7, 0.2, 0.5, -0.4, 0.1, 0.6, -0.2, 0.8, 0.3, -0.5]);
    let [p, q] = [(4, [2, 4]), (5, [3, 2])].map(|(stream, dims)| parameter(&b, stream, &dims).unwrap());
    let m = parameter(&b, 6, &[3]).unwrap();
    let mut layer = layer_f64(&b, &w);
    let spec = LoraSpec { dropout: 0.5, ..spec(Form::Dora, 2) };
    let lora = Lora::new("m", p.clone(), q.clone(), Part::Magnitude(m.clone()), spec).unwrap();
    let scale = f64::from(lora.spec().scale());
    layer.set_adapter(lora).unwrap();
    let mode = Forward { compute: Compute::F32, dropout: Some(DropoutKey { seed: 3, draw: 1 }) };
    let forward = |tape: &Tape| match layer.forward(tape, &x.tensor(), &mode) {
        Err(Error::Autograd(error)) => Err(error),
        other => Ok(other.unwrap()),
    };
    assert!(worst_error(&b, &[x.clone(), m.clone()], forward).unwrap() < ALLOWED);

    let of = |tensor: &Tensor| b.download::<f64>(tensor.view()).unwrap();
    let found = of(&forward(&Tape::inference(b.clone())).unwrap());
    let dropout = Dropout { probability: 0.5, seed: 3, stream: streams::dropout(1, 0) };
    let kept = of(&Tape::inference(b.clone()).dropout(&x.tensor(), dropout).unwrap());
    let [x, a, b, m] = [&x, &p, &q, &m].map(|parameter| of(&parameter.tensor()));
    assert!(kept.contains(&0.0) && kept.iter().any(|x| *x != 0.0));
    for (i, found) in found.into_iter().enumerate() {
        let (token, row) = (i / 3, i % 3);
        let delta = |j: usize| scale * (0..2).map(|k| b[2 * row + k] * a[4 * k + j]).sum::<f64>();
        let sum = |f: &dyn Fn(usize) -> f64| (0..4).map(f).sum::<f64>();
        let factor = m[row] / sum(&|j| (w[4 * row + j] + delta(j)).powi(2)).sqrt();
        let base = |x: &[f64]| sum(&|j| w[4 * row + j] * x[4 * token + j]);
        let update = sum(&|j| delta(j) * kept[4 * token + j]);
        let peft = base(&x) + (factor - 1.0) * base(&kept) + factor * update;
        // Some dozens of roundings of numbers below 10.
        assert!((found - peft).abs() < 1e-13, "{found} and {peft}");
    }
}

fn layer_f64(backend: &Arc<dyn Backend>, w: &[f64; 12]) -> Linear {
    let w = Tensor::constant(backend.upload(w).unwrap(), [3, 4]).unwrap();
    Linear::new("m", 0, Weight::Frozen(Base::Dense(w)), None).unwrap()
}

#[test]
fn a_row_of_zeros_gives_zero_and_no_nan_with_dora() {
    for backend in backends() {
        let mut layer = layer(backend.as_ref(), "m", 0, [2, 2], &[0.0, 0.0, 3.0, 4.0]);
        let lora = Lora::init(backend.as_ref(), &layer, spec(Form::Dora, 1), Init::Kaiming, 0).unwrap();
        layer.set_adapter(lora).unwrap();
        assert_eq!(forward(&backend, &layer, &[1.0, 1.0]), [0.0, 7.0]);
    }
}

proptest! {
    /// m is the norm as the same kernel forms it, so that m/‖W‖ is 1 to the bit; and B or E is 0.
    #[test]
    fn new_updates_leave_the_output_untouched_to_the_bit(case in cases(Form::Dora), seed: u64) {
        for backend in backends() {
            for base in [case.layer(backend.as_ref()), case.in_4_bits(backend.as_ref()).0] {
                for (form, compute) in [Form::Plain, Form::Dora, Form::AdaLora].into_iter().flat_map(both_computes) {
                    let mut layer = base.clone();
                    let before = bits(&forward_in(compute, &backend, &layer, &case.x));
                    let lora = Lora::init(backend.as_ref(), &layer, spec(form, case.rank), Init::Kaiming, seed).unwrap();
                    layer.set_adapter(lora).unwrap();
                    prop_assert_eq!(bits(&forward_in(compute, &backend, &layer, &case.x)), before);
                }
            }
        }
    }

    /// AdaLoRA: the bound of `merge` with one rounding more, of b·e.
    #[test]
    fn a_merged_element_of_adalora_is_within_its_bound(case in cases(Form::AdaLora)) {
        for backend in backends() {
            let (mut layer, lora) = (case.layer(backend.as_ref()), case.lora(backend.as_ref(), Form::AdaLora));
            layer.set_adapter(lora.clone()).unwrap();
            layer.merge(backend.as_ref()).unwrap();
            for (i, merged) in matrix(backend.as_ref(), &layer).into_iter().enumerate() {
                let (value, size) = case.exact(&lora, i);
                let bound = (case.rank as f64 + 5.0) * UNIT * size;
                prop_assert!((f64::from(merged) - value).abs() <= bound, "{merged} {value} {bound:e}");
            }
        }
    }

    /// DoRA: the sum is off by δ_j = (r + 4)·u·M_j at most, so its norm n by ‖δ‖ and a rounding, m/n by ‖δ‖/n and two
    /// more, and the product by its own: |g|·(δ_j + |w'_j|·(‖δ‖/n + 3u)), to first order; 1 % more holds the rest
    /// where ‖M‖/n is below 2¹⁰. (Nearer to 0 the direction of a row is what rounding made of it.)
    #[test]
    fn a_merged_element_of_dora_is_within_its_bound(case in cases(Form::Dora)) {
        for backend in backends() {
            let (mut layer, lora) = (case.layer(backend.as_ref()), case.lora(backend.as_ref(), Form::Dora));
            layer.set_adapter(lora.clone()).unwrap();
            layer.merge(backend.as_ref()).unwrap();
            let merged = matrix(backend.as_ref(), &layer);
            let unit = (case.rank as f64 + 4.0) * UNIT;
            for (row, merged) in merged.chunks(case.inputs).enumerate() {
                let exact: Vec<(f64, f64)> =
                    (0..case.inputs).map(|j| case.exact(&lora, row * case.inputs + j)).collect();
                let norm = exact.iter().map(|(w, _)| w * w).sum::<f64>().sqrt();
                let mass = exact.iter().map(|(_, m)| m * m).sum::<f64>().sqrt();
                if mass > 1024.0 * norm {
                    continue;
                }
                let g = f64::from(case.rest[row]) / norm;
                for (merged, (w, m)) in merged.iter().zip(exact) {
                    let bound = 1.01 * g.abs() * (unit * m + w.abs() * (unit * mass / norm + 3.0 * UNIT));
                    prop_assert!((f64::from(*merged) - g * w).abs() <= bound + 1e-44, "{merged} {} {bound:e}", g * w);
                }
            }
        }
    }

    /// Both take m/‖·‖ from the same kernels. Then as for LoRA: outputs differ by |g|·Σ_j |x_j| (r + 10)·u·M_oj. Over 4
    /// bits W is what they decode to, and the merged base is in f32.
    #[test]
    fn the_merged_layer_computes_what_the_unmerged_one_does(
        (form, case) in prop_oneof![Just(Form::Plain), Just(Form::Dora), Just(Form::AdaLora)]
            .prop_flat_map(|form| (Just(form), cases(form))),
        four_bits: bool
    ) {
        let backend = reference();
        let (mut layer, case) = match four_bits {
            true => case.in_4_bits(backend.as_ref()),
            false => (case.layer(backend.as_ref()), case),
        };
        let lora = case.lora(backend.as_ref(), form);
        layer.set_adapter(lora.clone()).unwrap();
        let unmerged = forward(&backend, &layer, &case.x);
        layer.merge(backend.as_ref()).unwrap();
        let merged = forward(&backend, &layer, &case.x);
        let norm = |o: usize| {
            let row = (0..case.inputs).map(|j| case.exact(&lora, o * case.inputs + j));
            let (norm, mass) = row.fold((0.0, 0.0), |(n, m), (w, size)| (n + w * w, m + size * size));
            (norm.sqrt(), mass.sqrt())
        };
        for (i, (y, z)) in unmerged.iter().zip(&merged).enumerate() {
            let (t, o) = (i / case.outputs, i % case.outputs);
            let ((norm, mass), form) = (norm(o), lora.spec().form);
            if form == Form::Dora && mass > 1024.0 * norm {
                continue;
            }
            let g = if form == Form::Dora { 1.01 * f64::from(case.rest[o].abs()) / norm } else { 1.0 };
            let x = |j: usize| f64::from(case.x[t * case.inputs + j].abs());
            let size = |j: usize| x(j) * case.exact(&lora, o * case.inputs + j).1;
            let bound = g * (case.rank as f64 + 10.0) * UNIT * (0..case.inputs).map(size).sum::<f64>();
            prop_assert!((f64::from(*y) - f64::from(*z)).abs() <= bound + 1e-44, "{y} {z} {bound:e}");
        }
        layer.unmerge();
        prop_assert_eq!(forward(&backend, &layer, &case.x), unmerged);
    }

    /// What a triplet with E = 0 adds is 0, whatever else is summed, in f64; so without it the output is the same.
    #[test]
    fn cutting_masked_triplets_changes_no_output(
        (mut case, keep) in cases(Form::AdaLora).prop_flat_map(|case| {
            let keep = prop::collection::vec(any::<bool>(), case.rank);
            (Just(case), keep)
        })
    ) {
        let backend = reference();
        for (e, keep) in case.rest.iter_mut().zip(&keep) {
            *e = if *keep { *e } else { 0.0 };
        }
        let (mut layer, lora) = (case.layer(backend.as_ref()), case.lora(backend.as_ref(), Form::AdaLora));
        layer.set_adapter(lora.clone()).unwrap();
        let masked = forward(&backend, &layer, &case.x);
        let (smaller, cuts) = lora.cut(backend.as_ref(), "m", &keep).unwrap();
        let kept = keep.iter().filter(|keep| **keep).count();
        prop_assert_eq!((smaller.rank(), smaller.elements()), (kept, kept * (case.inputs + case.outputs + 1)));
        prop_assert_eq!(cuts.len(), 3);
        layer.set_adapter(smaller).unwrap();
        prop_assert_eq!(forward(&backend, &layer, &case.x), masked);
    }
}
