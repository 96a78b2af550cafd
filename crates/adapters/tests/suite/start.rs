//! Starts that come from the base: what they leave of it, what the layer begins as, what others get to see.

use crate::common::{UNIT, layer, matrix, reference};
use proptest::prelude::*;
use rankfold_adapters::algebra::Rack;
use rankfold_adapters::{
    AdapterConfig, AdapterFolder, Error, Form, Forward, Init, Linear, LoraSpec, Names, Part, Purpose, Targets, Weight,
    attach_folder, attach_new, write_folder,
};
use rankfold_autograd::{Base, Parameter, Tape, Tensor};
use rankfold_backend::{Backend, Compute, DType, philox};
use std::path::Path;
use std::sync::Arc;

/// `n` numbers in [−1, 1), others for every `stream`.
fn numbers(stream: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| philox::unit(philox::word(9, stream, i)) * 2.0 - 1.0).collect()
}

fn config(init: Init, spec: LoraSpec) -> AdapterConfig {
    let targets = Targets::Named(Names::List(["m".to_owned()].into()));
    AdapterConfig { spec, init, targets, ..AdapterConfig::default() }
}

/// The layer "m" with w, stored as `dtype`.
fn stored(backend: &dyn Backend, dims: [usize; 2], w: &[f32], dtype: DType) -> Linear {
    let mut buffer = backend.alloc(dtype, w.len()).unwrap();
    backend.cast(backend.upload(w).unwrap().view(), buffer.view_mut()).unwrap();
    let base = Base::Dense(Tensor::constant(buffer, dims).unwrap());
    Linear::new("m", 0, Weight::Frozen(base), None).unwrap()
}

fn forward(backend: &Arc<dyn Backend>, layer: &Linear, x: &[f32]) -> Vec<f32> {
    let tape = Tape::inference(backend.clone());
    let x = Tensor::constant(backend.upload(x).unwrap(), [x.len() / layer.inputs(), layer.inputs()]).unwrap();
    backend.download(layer.forward(&tape, &x, &Forward::evaluation(Compute::F32)).unwrap().view()).unwrap()
}

/// A layer's matrix in f64, whatever it is stored as.
fn wide(backend: &dyn Backend, layer: &Linear) -> Vec<f64> {
    let Base::Dense(w) = layer.base() else { panic!("expected a dense base") };
    let mut out = backend.alloc(DType::F32, w.shape().elements()).unwrap();
    backend.cast(w.view(), out.view_mut()).unwrap();
    backend.download::<f32>(out.view()).unwrap().into_iter().map(f64::from).collect()
}

/// |s|·Σ_k |b_k a_k| of every element of an update.
fn sizes(backend: &dyn Backend, lora: &rankfold_adapters::Lora) -> Vec<f64> {
    let [a, b] = [lora.a(), lora.b()].map(|p| backend.download::<f32>(p.tensor().view()).unwrap());
    let ([outputs, inputs], rank) = (lora.dims(), lora.rank());
    let scale = f64::from(lora.spec().scale()).abs();
    let product = |i: usize, k: usize| f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs]);
    (0..outputs * inputs).map(|i| scale * (0..rank).map(|k| product(i, k).abs()).sum::<f64>()).collect()
}

/// A layer that began so, moved as if it had been trained.
fn trained(backend: &dyn Backend, layer: &mut Linear, config: &AdapterConfig, by: f32) -> AdapterConfig {
    let attached = attach_new(backend, &mut [layer], config, "llama", 5).unwrap();
    for (stream, (_, parameter)) in layer.adapter().unwrap().parameters().into_iter().enumerate() {
        let step: Vec<f32> =
            numbers(100 + stream as u64, parameter.shape().elements()).iter().map(|x| by * x).collect();
        let step = backend.upload(&step).unwrap();
        parameter.update(|value| Ok(backend.add_in_place(step.view(), value.view_mut())?)).unwrap();
    }
    attached.config
}

fn write(backend: &dyn Backend, folder: &Path, config: &AdapterConfig, layer: &Linear, purpose: Purpose) {
    write_folder(backend, folder, config, [layer], Vec::new(), purpose).unwrap();
}

/// m and the length of W + s·B A of every row, with DoRA.
fn factors(backend: &dyn Backend, layer: &Linear) -> Vec<[f64; 2]> {
    let lora = layer.adapter().unwrap();
    let Part::Magnitude(m) = lora.part() else { return Vec::new() };
    let values = |p: &Parameter| backend.download::<f32>(p.tensor().view()).unwrap();
    let (w, [a, b, m]) = (wide(backend, layer), [lora.a(), lora.b(), m].map(values));
    let ([_, inputs], rank, scale) = (lora.dims(), lora.rank(), f64::from(lora.spec().scale()));
    let product = |i: usize, k: usize| f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs]);
    let sum = |i: usize| w[i] + scale * (0..rank).map(|k| product(i, k)).sum::<f64>();
    let length = |row: usize| (row * inputs..(row + 1) * inputs).map(|i| sum(i).powi(2)).sum::<f64>().sqrt();
    m.iter().enumerate().map(|(row, m)| [f64::from(*m), length(row)]).collect()
}

fn bits(backend: &dyn Backend, layer: &Linear) -> Vec<Vec<u32>> {
    let of = |buffer: Vec<f32>| buffer.into_iter().map(f32::to_bits).collect();
    let lora = layer.adapter().unwrap();
    let parameters = lora.parameters().into_iter().chain(lora.start().into_iter().flat_map(|s| s.parameters()));
    let values = parameters.map(|(_, p)| of(backend.download(p.tensor().view()).unwrap()));
    values.chain([of(wide(backend, layer).into_iter().map(|w| w as f32).collect())]).collect()
}

/// [outputs, inputs, rank] with a rank that the matrix has.
fn dims() -> impl Strategy<Value = [usize; 3]> {
    (1..9usize, 1..9usize).prop_flat_map(|(o, i)| (Just(o), Just(i), 1..=o.min(i))).prop_map(|(o, i, r)| [o, i, r])
}

fn starts() -> impl Strategy<Value = (Init, bool, f64)> {
    let init = prop::sample::select(vec![Init::Pissa, Init::Olora]);
    (init, any::<bool>(), prop::sample::select(vec![0.5, 1.0, 3.0]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// W₀ is W − s·B₀·A₀ to (r + 4)·u·M and half a unit of its type, as `merge` has it, with
    /// M = |w| + |s|·Σ_k |b_k a_k|; half a unit is at most 2⁻⁸·|w₀| in bf16 and |w₀| ≤ M (1 + 2⁻²⁰). The layer adds
    /// s·B₀·A₀ again and rounds once, as the layer without an adapter does: at most 2u·M (1 + 2⁻²⁰) more for each
    /// |x_j|.
    #[test]
    fn a_layer_that_begins_as_a_part_of_its_base_computes_what_the_base_did(
        [outputs, inputs, rank] in dims(), (init, rslora, alpha) in starts(), stream: u64
    ) {
        let backend = reference();
        for (dtype, half) in [(DType::F32, 0.0), (DType::Bf16, 2f64.powi(-8))] {
            let mut layer = stored(backend.as_ref(), [outputs, inputs], &numbers(stream, outputs * inputs), dtype);
            let (x, w) = (numbers(!stream, 3 * inputs), wide(backend.as_ref(), &layer));
            let before = forward(&backend, &layer, &x);
            let spec = LoraSpec { rslora, ..LoraSpec::new(rank, alpha) };
            attach_new(backend.as_ref(), &mut [&mut layer], &config(init, spec), "llama", 0).unwrap();
            let after = forward(&backend, &layer, &x);
            let update = sizes(backend.as_ref(), layer.adapter().unwrap());
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                let (token, output) = (i / outputs, i % outputs);
                let size: f64 = (0..inputs)
                    .map(|j| {
                        let at = output * inputs + j;
                        f64::from(x[token * inputs + j].abs()) * (w[at].abs() + update[at])
                    })
                    .sum();
                let bound = ((rank as f64 + 7.0) * UNIT + half) * size * (1.0 + 1e-5);
                let off = (f64::from(*before) - f64::from(*after)).abs();
                prop_assert!(off <= bound, "{init} in {dtype}: off by {off:e} of {bound:e}");
            }
            prop_assert!(layer.adapter().unwrap().start().is_some());
        }
    }

    /// The trained layer is W₀ + s·B A with W₀ as above, the exchanged one W + s'·[B, −B₀]·[A; A₀]: the same but for
    /// W₀'s rounding, one of each output, and s' = s·(1 + 2u), of which √2 is why; M has both updates in it.
    ///
    /// With DoRA each is multiplied by m/n, n the length of its own row, which kernels form of sums in f32, (r + 4)·u·M
    /// and (2r + 4)·u·M off: the two n are within d = ‖((4r + 17)·u + half)·M‖, so that m/n differs by ρ = d/(n − d) of
    /// itself, and its own roundings and the output's are 8u at most. (A row of no length is what rounding made of it.)
    #[test]
    fn the_exchanged_folder_computes_what_the_trained_layer_does(
        [outputs, inputs, rank] in dims(), (init, rslora, alpha) in starts(), stream: u64, by_pattern: bool, dora: bool
    ) {
        let (backend, folder) = (reference(), tempfile::tempdir().unwrap());
        for (dtype, half) in [(DType::F32, 0.0), (DType::Bf16, 2f64.powi(-8))] {
            let fresh = || stored(backend.as_ref(), [outputs, inputs], &numbers(stream, outputs * inputs), dtype);
            let (mut layer, mut other) = (fresh(), fresh());
            let form = if dora { Form::Dora } else { Form::Plain };
            let spec = LoraSpec { rslora, form, ..LoraSpec::new(rank, alpha) };
            let begun = match by_pattern {
                false => config(init, spec),
                true => AdapterConfig {
                    rank_pattern: vec![("m".into(), rank)],
                    alpha_pattern: vec![("m".into(), alpha)],
                    ..config(init, LoraSpec { rank: 1, alpha: 1.0, ..spec })
                },
            };
            let (x, w) = (numbers(!stream, 3 * inputs), wide(backend.as_ref(), &layer));
            let config = trained(backend.as_ref(), &mut layer, &begun, 0.25);
            write(backend.as_ref(), folder.path(), &config, &layer, Purpose::Exchange);
            let opened = AdapterFolder::open(folder.path()).unwrap();
            prop_assert_eq!((opened.config().spec.rank, opened.config().init), (2 * begun.spec.rank, Init::Kaiming));
            attach_folder(backend.as_ref(), &mut [&mut other], &opened, "llama").unwrap();
            let lora = other.adapter().unwrap();
            prop_assert!(lora.start().is_none() && lora.rank() == 2 * rank);
            let update = sizes(backend.as_ref(), lora);
            let (mine, theirs) = (forward(&backend, &layer, &x), forward(&backend, &other, &x));
            let r = rank as f64;
            let factors = factors(backend.as_ref(), &layer);
            for (i, (mine, theirs)) in mine.iter().zip(&theirs).enumerate() {
                let (row, token) = (i % outputs * inputs, i / outputs * inputs);
                let mass = |j: usize| w[row + j].abs() + update[row + j];
                let size: f64 = (0..inputs).map(|j| f64::from(x[token + j].abs()) * mass(j)).sum();
                let mut bound = ((r + 9.0) * UNIT + half) * size * (1.0 + 1e-5);
                if let Some([m, n]) = factors.get(i % outputs) {
                    let length = (0..inputs).map(|j| mass(j).powi(2)).sum::<f64>().sqrt();
                    let d = ((4.0 * r + 17.0) * UNIT + half) * length;
                    if d > 0.5 * n {
                        continue;
                    }
                    bound = m.abs() / n * (bound + (d / (n - d) + 8.0 * UNIT) * size * (1.0 + 2f64.powi(-7)));
                }
                let off = (f64::from(*mine) - f64::from(*theirs)).abs();
                prop_assert!(off <= bound, "{init} in {dtype}: off by {off:e} of {bound:e}");
            }
        }
    }

    #[test]
    fn a_folder_to_go_on_from_gives_the_same_bits(
        [outputs, inputs, rank] in dims(), (init, rslora, alpha) in starts(), stream: u64, dora: bool
    ) {
        let (backend, folder) = (reference(), tempfile::tempdir().unwrap());
        let fresh = || layer(backend.as_ref(), "m", 0, [outputs, inputs], &numbers(stream, outputs * inputs));
        let (mut layer, mut other) = (fresh(), fresh());
        let form = if dora { Form::Dora } else { Form::Plain };
        let spec = LoraSpec { rslora, form, ..LoraSpec::new(rank, alpha) };
        let config = trained(backend.as_ref(), &mut layer, &config(init, spec), 0.25);
        write(backend.as_ref(), folder.path(), &config, &layer, Purpose::Resume);
        let opened = AdapterFolder::open(folder.path()).unwrap();
        prop_assert_eq!((opened.config().spec.rank, opened.config().init), (rank, init));
        attach_folder(backend.as_ref(), &mut [&mut other], &opened, "llama").unwrap();
        prop_assert_eq!(bits(backend.as_ref(), &layer), bits(backend.as_ref(), &other));
        prop_assert_eq!(matrix(backend.as_ref(), &layer), matrix(backend.as_ref(), &other));
    }
}

#[test]
fn a_rank_that_the_base_does_not_have_is_refused_and_changes_nothing() {
    let b = reference();
    for init in [Init::Pissa, Init::Olora] {
        let mut layer = layer(b.as_ref(), "m", 0, [3, 32], &numbers(3, 3 * 32));
        let config = config(init, LoraSpec::new(4, 1.0));
        let message = attach_new(b.as_ref(), &mut [&mut layer], &config, "llama", 0).unwrap_err().to_string();
        assert_eq!(message, "'m: r' is 4, expected no more than the matrix has by itself");
        assert!(layer.adapter().is_none());
    }
}

/// W₀ without its adapter is nobody's base.
#[test]
fn an_adapter_that_took_a_part_of_the_base_stays_on_it() {
    let b = reference();
    for init in [Init::Pissa, Init::Olora] {
        let mut layer = layer(b.as_ref(), "m", 0, [4, 3], &numbers(1, 12));
        let config = config(init, LoraSpec::new(2, 2.0));
        attach_new(b.as_ref(), &mut [&mut layer], &config, "llama", 0).unwrap();
        let plain = layer.adapter().unwrap().start().unwrap().clone();
        for merged in [false, true] {
            if merged {
                layer.merge(b.as_ref()).unwrap();
            }
            let before = matrix(b.as_ref(), &layer);
            let refused = [
                Rack::default().keep("a", &AdapterConfig::default().into(), &mut [&mut layer]).unwrap_err(),
                layer.take_adapter().unwrap_err(),
                layer.set_adapter(plain.clone()).unwrap_err(),
                attach_new(b.as_ref(), &mut [&mut layer], &config, "llama", 0).unwrap_err(),
            ];
            assert!(refused.iter().all(|why| matches!(why, Error::PartialBase { .. })), "{refused:?}");
            assert_eq!(matrix(b.as_ref(), &layer), before);
        }
        layer.unmerge();
        assert!(layer.adapter().is_some_and(|lora| lora.start().is_some()));
    }
}
