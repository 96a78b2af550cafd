//! Sums of adapters, and several on one base.

use crate::common::{UNIT, grid, layer, matrix, reference};
use proptest::prelude::*;
use rankfold_adapters::algebra::{Rack, of_rank, weighted_sum};
use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{
    AdapterConfig, Bias, Error, Form, Init, Linear, Lora, LoraSpec, Part, PeftConfig, VirtualConfig, Weight, merged,
    merged_weight,
};
use rankfold_autograd::{Base, Parameter, Tensor};
use rankfold_backend::{Backend, DType, Format, Quantized};
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Term {
    weight: f64,
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    /// AdaLoRA's, where it is one.
    e: Option<Vec<f32>>,
}

impl Term {
    fn lora(&self, backend: &dyn Backend, [outputs, inputs]: [usize; 2]) -> Lora {
        let of = |values: &[f32], dims: [usize; 2]| Parameter::new(backend.upload(values).unwrap(), dims).unwrap();
        let (a, b) = (of(&self.a, [self.rank, inputs]), of(&self.b, [outputs, self.rank]));
        let (part, form) = match &self.e {
            Some(e) => {
                let (lambda, kept) = (of(e, [self.rank, 1]), vec![true; self.rank]);
                (Part::Triplets { lambda, kept }, Form::AdaLora)
            }
            None => (Part::None, Form::Plain),
        };
        Lora::new("m", a, b, part, LoraSpec { form, ..LoraSpec::new(self.rank, 3.0) }).unwrap()
    }
}

fn cases() -> impl Strategy<Value = ([usize; 2], Vec<f32>, Vec<Term>)> {
    (1..6usize, 1..6usize).prop_flat_map(|(outputs, inputs)| {
        let part = (1..5usize, -200..200i32, any::<bool>()).prop_flat_map(move |(rank, weight, adalora)| {
            let e = grid(rank).prop_map(move |e| adalora.then_some(e));
            (grid(rank * inputs), grid(outputs * rank), e).prop_map(move |(a, b, e)| Term {
                weight: f64::from(weight) / 100.0,
                rank,
                a,
                b,
                e,
            })
        });
        (Just([outputs, inputs]), grid(outputs * inputs), prop::collection::vec(part, 1..4))
    })
}

/// The singular values of a matrix of so many columns, the largest first, by one-sided rotations (Hestenes 1958):
/// columns are turned against each other until all are orthogonal, and then their lengths are the values. It converges
/// quadratically; of five columns in a few of these sweeps.
fn singular_values(matrix: &[f64], columns: usize) -> Vec<f64> {
    let mut turned: Vec<Vec<f64>> =
        (0..columns).map(|j| matrix.iter().skip(j).step_by(columns).copied().collect()).collect();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for (q, p) in (0..20).flat_map(|_| (1..columns).flat_map(|q| (0..q).map(move |p| (q, p)))) {
        let [pp, qq, pq] = [(p, p), (q, q), (p, q)].map(|(x, y)| dot(&turned[x], &turned[y]));
        let (sin, cos) = (0.5 * (2.0 * pq).atan2(pp - qq)).sin_cos();
        for i in 0..turned[0].len() {
            let (x, y) = (turned[p][i], turned[q][i]);
            (turned[p][i], turned[q][i]) = (cos * x + sin * y, cos * y - sin * x);
        }
    }
    let mut values: Vec<f64> = turned.iter().map(|column| dot(column, column).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

proptest! {
    /// With R = Σ r and M = |w| + Σ_i |w_i s_i| Σ_k |b e a|, all of R products: an element of B is off by one rounding
    /// of what f64 has, and the merged sum by (R + 4)·u·M, as `merge` has it: together (R + 5)·u·M, and 2⁻⁵⁰ M for
    /// f64's.
    #[test]
    fn a_merged_sum_is_the_sum_of_the_updates(([outputs, inputs], w, parts) in cases()) {
        let backend = reference();
        let backend = backend.as_ref();
        let loras: Vec<Lora> = parts.iter().map(|part| part.lora(backend, [outputs, inputs])).collect();
        let weighted: Vec<(f64, &Lora)> = parts.iter().map(|part| part.weight).zip(&loras).collect();
        let sum = weighted_sum(backend, "m", &weighted).unwrap();
        let rank: usize = parts.iter().map(|part| part.rank).sum();
        prop_assert_eq!((sum.rank(), sum.spec().scale()), (rank, 1.0));

        let base = Base::Dense(Tensor::constant(backend.upload(&w).unwrap(), [outputs, inputs]).unwrap());
        let merged = merged_weight(backend, "m", &base, &sum, DType::F32).unwrap();
        for (i, merged) in backend.download::<f32>(merged.view()).unwrap().into_iter().enumerate() {
            let (row, column) = (i / inputs, i % inputs);
            let (mut value, mut size) = (f64::from(w[i]), f64::from(w[i].abs()));
            for (part, lora) in parts.iter().zip(&loras) {
                for k in 0..part.rank {
                    let e = part.e.as_ref().map_or(1.0, |e| f64::from(e[k]));
                    let product = f64::from(part.b[row * part.rank + k]) * f64::from(part.a[k * inputs + column]);
                    let term = part.weight * f64::from(lora.spec().scale()) * e * product;
                    value += term;
                    size += term.abs();
                }
            }
            let bound = ((rank as f64 + 5.0) * UNIT + 2f64.powi(-50)) * size;
            prop_assert!((f64::from(merged) - value).abs() <= bound, "{merged} {value} {bound:e}");
        }
    }

    /// What is lost is the length of the singular values that are left out, and the rounding of the elements; no matrix
    /// of that rank is nearer (Eckart & Young 1936). Householder's and the SVD's errors are far below f32's
    /// (decompose), and so are the rotations' here.
    #[test]
    fn a_smaller_update_is_the_nearest(([outputs, inputs], _, parts) in cases(), less in 0..3usize) {
        let backend = reference();
        let backend = backend.as_ref();
        let loras: Vec<Lora> = parts.iter().map(|part| part.lora(backend, [outputs, inputs])).collect();
        let weighted: Vec<(f64, &Lora)> = parts.iter().map(|part| part.weight).zip(&loras).collect();
        let sum = weighted_sum(backend, "m", &weighted).unwrap();
        let dense = |lora: &Lora| -> Vec<f64> {
            let values = |p: &Parameter| backend.download::<f32>(p.tensor().view()).unwrap();
            let (a, b, rank) = (values(lora.a()), values(lora.b()), lora.rank());
            let element = |i: usize| {
                (0..rank).map(|k| f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs])).sum()
            };
            (0..outputs * inputs).map(element).collect()
        };
        let distance = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
        let norm = distance(&dense(&sum), &vec![0.0; outputs * inputs]);
        let whole = of_rank(backend, "m", &sum, sum.rank()).unwrap();
        // Two factors rounded by u each, √S shared: a product off by 2u and a little of ‖U √S‖‖√S V‖ ≤ Σ s ≤ √k ‖·‖.
        let rounding = 4.0 * UNIT * (outputs.min(inputs) as f64) * norm + 1e-30;
        prop_assert!(distance(&dense(&whole), &dense(&sum)) <= rounding);
        let rank = sum.rank().saturating_sub(less).max(1);
        let smaller = of_rank(backend, "m", &sum, rank).unwrap();
        prop_assert_eq!(smaller.rank(), rank);
        let lost = distance(&dense(&smaller), &dense(&sum));
        let tail = singular_values(&dense(&sum), inputs).into_iter().skip(rank);
        let tail = tail.map(|s| s * s).sum::<f64>().sqrt();
        prop_assert!((lost - tail).abs() <= rounding, "{lost} is lost, expected {tail}");
    }

    /// On a dense layer, one in 4 bits, and one that only the adapter of the last seed has a part on.
    #[test]
    fn adapters_are_switched_and_none_is_changed(seeds in prop::collection::vec((any::<u64>(), 0..3usize), 1..4)) {
        let backend = reference();
        let backend = backend.as_ref();
        let (w, dims) = (backend.upload(&[0.25f32; 96]).unwrap(), [3, 32]);
        let q = Arc::new(Quantized::quantize(backend, w.view(), dims, Format::Nf4, 32, false).unwrap());
        let in_4_bits = Linear::new("q", 1, Weight::Frozen(Base::Quantized(q.clone())), None).unwrap();
        let mut layers = [layer(backend, "m", 0, [3, 4], &[0.25; 12]), in_4_bits, layer(backend, "n", 2, dims, &[0.5; 96])];
        let bases = [0, 2].map(|i| matrix(backend, &layers[i]));
        let mut rack = Rack::default();
        for (i, (seed, form)) in seeds.iter().enumerate() {
            let form = [Form::Plain, Form::Dora, Form::AdaLora][*form];
            let on = if i + 1 == seeds.len() { 3 } else { 2 };
            for layer in &mut layers[..on] {
                let spec = LoraSpec { form, ..LoraSpec::new(2, 4.0) };
                // AdaLoRA begins at E = 0: what was learned is stood in for.
                let lora = Lora::init(backend, layer, spec, Init::Random, *seed).unwrap();
                if let Part::Triplets { lambda, .. } = lora.part() {
                    let ones = backend.upload(&[1.0f32, -1.0]).unwrap();
                    lambda.update(|value| Ok(backend.copy(ones.view(), value.view_mut())?)).unwrap();
                }
                layer.set_adapter(lora).unwrap();
            }
            let mut all: Vec<&mut Linear> = layers.iter_mut().collect();
            rack.keep(&i.to_string(), &AdapterConfig::default().into(), &mut all).unwrap();
            prop_assert!(layers.iter().all(|layer| layer.adapter().is_none()));
        }
        let mut as_merged = |i: usize| {
            let mut all: Vec<&mut Linear> = layers.iter_mut().collect();
            rack.put(&i.to_string(), &mut all).unwrap();
            let mut values = Vec::new();
            for layer in all {
                let sum = merged(backend, layer, DType::F32).unwrap();
                values.push(sum.map(|sum| backend.download::<f32>(sum.weight.view()).unwrap()));
            }
            values
        };
        let first: Vec<_> = (0..seeds.len()).map(&mut as_merged).collect();
        for (i, first) in first.iter().enumerate().rev() {
            prop_assert_eq!(&as_merged(i), first);
            prop_assert_eq!(first.iter().filter(|sum| sum.is_some()).count(), if i + 1 == seeds.len() { 3 } else { 2 });
            prop_assert_ne!(first[0].as_ref().unwrap(), &bases[0]);
        }
        layers.iter_mut().for_each(|layer| drop(layer.take_adapter().unwrap()));
        prop_assert_eq!([0, 2].map(|i| matrix(backend, &layers[i])), bases);
        prop_assert!(matches!(layers[1].base(), Base::Quantized(kept) if Arc::ptr_eq(&kept, &q)));
    }
}

#[test]
fn what_is_no_sum_is_refused() {
    let backend = reference();
    let backend = backend.as_ref();
    let mut target = layer(backend, "m", 0, [3, 4], &[0.25; 12]);
    let dora = LoraSpec { form: Form::Dora, ..LoraSpec::new(2, 4.0) };
    let dora = Lora::init(backend, &target, dora, Init::Kaiming, 0).unwrap();
    let lora = Lora::init(backend, &target, LoraSpec::new(2, 4.0), Init::Kaiming, 0).unwrap();
    let message = |parts: &[(f64, &Lora)]| weighted_sum(backend, "m", parts).unwrap_err().to_string();
    assert!(message(&[(1.0, &lora), (1.0, &dora)]).starts_with("m: what sits on it is no term"));
    assert_eq!(message(&[(f64::NAN, &lora)]), "'weight' is NaN, expected a finite number");
    let ones = |shape: [usize; 2]| {
        Parameter::new(backend.filled(DType::F32, shape[0] * shape[1], 1.0).unwrap(), shape).unwrap()
    };
    let large = Lora::new("m", ones([2, 4]), ones([3, 2]), Part::None, LoraSpec::new(2, 4.0)).unwrap();
    assert_eq!(message(&[(1e300, &large)]), "'m: weight' is 1e300, expected one with which B is finite in f32");
    assert!(message(&[]).contains("expected one or more"));
    let other = layer(backend, "m", 0, [3, 5], &[0.25; 15]);
    let other = Lora::init(backend, &other, LoraSpec::new(2, 4.0), Init::Kaiming, 0).unwrap();
    assert!(message(&[(1.0, &lora), (1.0, &other)]).contains("expected [2, 4]"));
    let missing = Rack::default().put("a", &mut [&mut target]);
    assert!(matches!(missing, Err(Error::Field { value, .. }) if value == "a"));
}

/// Whatever the caller checked before: an adapter that is put back is all that it was.
#[test]
fn an_adapter_that_is_more_than_what_sits_on_the_layers_is_not_kept_and_stays() {
    let backend = reference();
    let backend = backend.as_ref();
    let lora = AdapterConfig::default;
    let saved = AdapterConfig { modules_to_save: vec!["lm_head".into()], ..lora() };
    let with: [(PeftConfig, &str); 6] = [
        (AdapterConfig { init: Init::Pissa, ..lora() }.into(), "start changes"),
        (AdapterConfig { init: Init::Loftq { iterations: 1 }, ..lora() }.into(), "start changes"),
        (AdapterConfig { bias: Bias::LoraOnly, ..lora() }.into(), "biases or modules"),
        (AdapterConfig { bias: Bias::All, ..lora() }.into(), "biases or modules"),
        (saved.into(), "biases or modules"),
        (PeftConfig::Virtual(VirtualConfig::new(Kind::Prompt, 3)), "tokens before the text"),
    ];
    let mut layer = layer(backend, "m", 0, [3, 4], &[0.25; 12]);
    let update = Lora::init(backend, &layer, LoraSpec::new(2, 4.0), Init::Random, 0).unwrap();
    layer.set_adapter(update).unwrap();
    let mut rack = Rack::default();
    for (config, words) in with {
        let why = rack.keep("a", &config, &mut [&mut layer]).unwrap_err();
        assert!(matches!(why, Error::NotAlone { with } if with.contains(words)), "{why}");
        assert!(layer.adapter().is_some() && rack.names().next().is_none());
    }
    rack.keep("a", &lora().into(), &mut [&mut layer]).unwrap();
    assert!(layer.adapter().is_none());
}

/// Layers that AdaLoRA has cut to nothing add nothing: a sum of such alone is one of zeros, and beside another it is
/// that other.
#[test]
fn a_rank_of_0_adds_nothing_to_a_sum() {
    let backend = reference();
    let backend = backend.as_ref();
    let parameter =
        |dims: [usize; 2]| Parameter::new(backend.alloc(DType::F32, dims[0] * dims[1]).unwrap(), dims).unwrap();
    let spec = LoraSpec { form: Form::AdaLora, ..LoraSpec::new(2, 4.0) };
    let part = Part::Triplets { lambda: parameter([0, 1]), kept: vec![false; 2] };
    let none = Lora::new("m", parameter([0, 4]), parameter([3, 0]), part, spec).unwrap();
    let of = |lora: &Lora| [lora.a(), lora.b()].map(|p| backend.download::<f32>(p.tensor().view()).unwrap());
    for parts in [vec![(2.0, &none)], vec![(2.0, &none), (-1.0, &none)]] {
        let sum = weighted_sum(backend, "m", &parts).unwrap();
        assert_eq!((sum.rank(), sum.dims(), of(&sum)), (1, [3, 4], [vec![0.0; 4], vec![0.0; 3]]));
        assert_eq!(of_rank(backend, "m", &sum, 2).unwrap().rank(), 2);
    }
    let target = layer(backend, "m", 0, [3, 4], &[0.25; 12]);
    let other = Lora::init(backend, &target, LoraSpec::new(2, 2.0), Init::Random, 0).unwrap();
    let sum = weighted_sum(backend, "m", &[(3.0, &none), (1.0, &other)]).unwrap();
    assert_eq!(of(&sum), of(&other));
}
