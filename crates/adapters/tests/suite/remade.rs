//! Bases in 4 bits that are made for their update: LoftQ's, and what PiSSA and OLoRA leave of one.

use crate::common::{UNIT, all, layer, numbers, reference};
use proptest::prelude::*;
use rankfold_adapters::algebra::Rack;
use rankfold_adapters::loftq::loftq;
use rankfold_adapters::{
    AdapterConfig, AdapterFolder, Attached, Error, Form, Forward, Init, Linear, LoraSpec, Names, Purpose, Result,
    Targets, Weight, attach_folder, attach_new, attach_remade, write_folder,
};
use rankfold_autograd::{Base, Tape, Tensor};
use rankfold_backend::{Backend, Compute, DType, Format, Quantized, Scales};
use std::sync::Arc;

const BLOCK: usize = 32;
const LOFTQ: Init = Init::Loftq { iterations: 2 };

fn config(init: Init, spec: LoraSpec) -> AdapterConfig {
    let targets = Targets::Named(Names::List(["m".to_owned()].into()));
    AdapterConfig { spec, init, targets, ..AdapterConfig::default() }
}

fn quantized(backend: &dyn Backend, dims: [usize; 2], w: &[f32], format: Format, double: bool) -> Quantized {
    Quantized::quantize(backend, backend.upload(w).unwrap().view(), dims, format, BLOCK, double).unwrap()
}

fn in_4_bits(backend: &dyn Backend, dims: [usize; 2], w: &[f32], format: Format, double: bool) -> Linear {
    let base = Base::Quantized(Arc::new(quantized(backend, dims, w, format, double)));
    Linear::new("m", 0, Weight::Frozen(base), None).unwrap()
}

/// A start on a layer in 4 bits, of w where it needs that.
fn begin(backend: &dyn Backend, layer: &mut Linear, config: &AdapterConfig, w: &[f32]) -> Result<Attached> {
    match config.init {
        Init::Olora => attach_new(backend, &mut [layer], config, "llama", 0),
        _ => attach_remade(backend, &mut [layer], config, "llama", &|_| Ok(w.to_vec())),
    }
}

fn four_bits(layer: &Linear) -> Arc<Quantized> {
    let Base::Quantized(q) = layer.base() else { panic!("expected 4 bits") };
    q
}

fn decoded(backend: &dyn Backend, q: &Quantized) -> Vec<f32> {
    let mut values = backend.alloc(DType::F32, q.elements()).unwrap();
    backend.dequantize_4bit(q, values.view_mut()).unwrap();
    backend.download(values.view()).unwrap()
}

fn values(backend: &dyn Backend, layer: &Linear) -> [Vec<f32>; 2] {
    let lora = layer.adapter().unwrap();
    [lora.a(), lora.b()].map(|p| backend.download::<f32>(p.tensor().view()).unwrap())
}

/// s·B·A with the sum of its terms' magnitudes, of every element.
fn update(backend: &dyn Backend, layer: &Linear) -> Vec<[f64; 2]> {
    let ([a, b], lora) = (values(backend, layer), layer.adapter().unwrap());
    let (rank, inputs, scale) = (lora.rank(), layer.inputs(), f64::from(lora.spec().scale()));
    let term = |i: usize, k: usize| scale * f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs]);
    let sums = |i: usize| [(0..rank).map(|k| term(i, k)).sum(), (0..rank).map(|k| term(i, k).abs()).sum()];
    (0..layer.outputs() * inputs).map(sums).collect()
}

fn forward(backend: &Arc<dyn Backend>, layer: &Linear, x: &[f32]) -> Vec<u32> {
    let tape = Tape::inference(backend.clone());
    let x = Tensor::constant(backend.upload(x).unwrap(), [x.len() / layer.inputs(), layer.inputs()]).unwrap();
    let y = layer.forward(&tape, &x, &Forward::evaluation(Compute::F32)).unwrap();
    backend.download::<f32>(y.view()).unwrap().into_iter().map(f32::to_bits).collect()
}

/// [outputs, inputs, rank] with a rank that the matrix has.
fn dims() -> impl Strategy<Value = [usize; 3]> {
    (1..9usize, 1..9usize).prop_flat_map(|(o, i)| (Just(o), Just(i), 1..=o.min(i))).prop_map(|(o, i, r)| [o, i, r])
}

fn formats() -> impl Strategy<Value = (Format, bool)> {
    (prop::sample::select(Format::ALL.to_vec()), any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a turn measures is of factors in f32, whose rounding adds no more than (r + 4)·u of their size to what the
    /// best of them would leave; the first leaves less than plain quantisation by what they take away.
    #[test]
    fn loftq_leaves_no_more_than_plain_quantisation_and_no_more_with_more_turns(
        [outputs, inputs, rank] in dims(), (format, double) in formats(),
        alpha in prop::sample::select(vec![1.0, 4.0]), stream: u64
    ) {
        let backend = reference();
        let (dims, w) = ([outputs, inputs], numbers(stream, outputs * inputs));
        let plain = quantized(backend.as_ref(), dims, &w, format, double);
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let decoded = decoded(backend.as_ref(), &plain);
        let lost = norm(&mut w.iter().zip(&decoded).map(|(w, q)| f64::from(*w) - f64::from(*q)));
        let mut before = lost * (1.0 + (rank as f64 + 4.0) * UNIT);
        for turns in 1..5 {
            let spec = LoraSpec::new(rank, alpha);
            let found = loftq(backend.as_ref(), "m", &w, &plain, spec, turns).unwrap();
            prop_assert!(found.left <= before, "{format}: {turns} turns leave {:e}, before {before:e}", found.left);
            before = found.left;
        }
    }

    /// Q is what PiSSA and OLoRA leave of the matrix, R, quantised as the base was: with plain scales off by half the
    /// widest gap of the format's values (0.1519 of the block's largest |R| for nf4, 1/6 for fp4, 1/14 for int4) at
    /// most, and R by (r + 4)·u of its terms' magnitudes, as `merge` has it.
    #[test]
    fn what_a_start_leaves_of_a_base_in_4_bits_is_quantised_as_the_base_was(
        [outputs, inputs, rank] in dims(), (format, double) in formats(), pissa: bool, rslora: bool, dora: bool,
        stream: u64
    ) {
        let backend = reference();
        let (dims, w) = ([outputs, inputs], numbers(stream, outputs * inputs));
        let init = if pissa { Init::Pissa } else { Init::Olora };
        let form = if dora { Form::Dora } else { Form::Plain };
        let mut layer = in_4_bits(backend.as_ref(), dims, &w, format, double);
        let before = if pissa { w.clone() } else { decoded(backend.as_ref(), &four_bits(&layer)) };
        let spec = LoraSpec { rslora, form, ..LoraSpec::new(rank, 3.0) };
        let attached = begin(backend.as_ref(), &mut layer, &config(init, spec), &w).unwrap();
        // A plain update of its own base from here on.
        prop_assert_eq!(attached.config.init, Init::Kaiming);
        prop_assert!(layer.adapter().unwrap().start().is_none() && layer.has_own_base());
        let q = four_bits(&layer);
        let is_double = matches!(q.scales, Scales::Nested { .. });
        prop_assert_eq!((q.format, q.block, is_double), (format, BLOCK, double));
        if double {
            return Ok(());
        }
        let half_a_gap = match format {
            Format::Nf4 => 0.1520,
            Format::Fp4 => 1.0 / 6.0,
            Format::Int4 => 1.0 / 14.0,
        };
        let update = update(backend.as_ref(), &layer);
        let left: Vec<f64> = before.iter().zip(&update).map(|(w, [u, _])| f64::from(*w) - u).collect();
        let found = decoded(backend.as_ref(), &q);
        for (i, (found, left_here)) in found.iter().zip(&left).enumerate() {
            let block = i / BLOCK * BLOCK..left.len().min((i / BLOCK + 1) * BLOCK);
            let off = |i: usize| (rank as f64 + 4.0) * UNIT * (f64::from(before[i].abs()) + update[i][1]);
            let rounding = block.clone().map(off).fold(0.0, f64::max);
            let absmax = block.map(|i| left[i].abs()).fold(0.0, f64::max);
            let bound = half_a_gap * absmax + 3.0 * rounding + 4.0 * UNIT * absmax;
            let off = (f64::from(*found) - left_here).abs();
            prop_assert!(off <= bound, "{init} in {format}: off by {off:e} of {bound:e}");
        }
    }

    /// m is of the rows that the layer then has, so that m/‖·‖ is 1.
    #[test]
    fn a_dora_on_a_base_that_was_made_for_it_begins_where_a_lora_does_to_the_bit(
        [outputs, inputs, rank] in dims(), (format, double) in formats(), stream: u64,
        init in prop::sample::select(vec![Init::Pissa, Init::Olora, LOFTQ])
    ) {
        let backend = reference();
        let (dims, w, x) = ([outputs, inputs], numbers(stream, outputs * inputs), numbers(!stream, 3 * inputs));
        let outputs_of = |form| {
            let mut layer = in_4_bits(backend.as_ref(), dims, &w, format, double);
            let spec = LoraSpec { form, ..LoraSpec::new(rank, 3.0) };
            begin(backend.as_ref(), &mut layer, &config(init, spec), &w).unwrap();
            forward(&backend, &layer, &x)
        };
        prop_assert_eq!(outputs_of(Form::Plain), outputs_of(Form::Dora));
    }
}

/// As PEFT reads it: the folder says how the update began, and the base is made again out of the model's.
#[test]
fn an_olora_folder_finds_the_base_in_4_bits_that_it_began_on() {
    let b = reference();
    let (dims, w, x) = ([6, 32], numbers(3, 6 * 32), numbers(4, 3 * 32));
    for (format, double) in [(Format::Nf4, true), (Format::Int4, false)] {
        let [mut one, mut other] = [(); 2].map(|()| in_4_bits(b.as_ref(), dims, &w, format, double));
        let config = config(Init::Olora, LoraSpec::new(2, 3.0));
        begin(b.as_ref(), &mut one, &config, &w).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write_folder(b.as_ref(), folder.path(), &config, [&one], Vec::new(), Purpose::Resume).unwrap();
        let opened = AdapterFolder::open(folder.path()).unwrap();
        assert_eq!(opened.config().init, Init::Olora);
        attach_folder(b.as_ref(), &mut [&mut other], &opened, "llama").unwrap();
        assert!(other.has_own_base());
        assert_eq!(forward(&b, &one, &x), forward(&b, &other, &x));
    }
}

#[test]
fn loftq_replaces_the_base_by_the_one_that_its_factors_belong_to() {
    let b = reference();
    let (dims, w) = ([6, 32], numbers(3, 6 * 32));
    let spec = LoraSpec::new(2, 2.0);
    for (format, double) in [(Format::Nf4, false), (Format::Nf4, true), (Format::Fp4, true), (Format::Int4, false)] {
        let mut layer = in_4_bits(b.as_ref(), dims, &w, format, double);
        let found = loftq(b.as_ref(), "m", &w, &four_bits(&layer), spec, 2).unwrap();
        begin(b.as_ref(), &mut layer, &config(LOFTQ, spec), &w).unwrap();
        let codes = |q: &Quantized| b.download::<u8>(q.codes.view()).unwrap();
        assert_eq!(codes(&four_bits(&layer)), codes(&found.q));
        assert_eq!(decoded(b.as_ref(), &four_bits(&layer)), decoded(b.as_ref(), &found.q));
        assert_eq!(values(b.as_ref(), &layer), [found.a, found.b]);
    }
}

#[test]
fn starts_that_the_base_cannot_give_are_refused_and_change_nothing() {
    let b = reference();
    let (dims, w) = ([3, 32], numbers(3, 3 * 32));
    let four = || in_4_bits(b.as_ref(), dims, &w, Format::Nf4, false);
    let dense = || layer(b.as_ref(), "m", 0, dims, &w);
    let none = loftq(b.as_ref(), "m", &w, &four_bits(&four()), LoraSpec::new(2, 2.0), 0).unwrap_err().to_string();
    assert_eq!(none, "'loftq_iter' is 0, expected 1 or more");
    let refuse = |mut layer: Linear, init: Init, rank: usize| {
        let before = matches!(layer.base(), Base::Quantized(_)).then(|| decoded(b.as_ref(), &four_bits(&layer)));
        let message = begin(b.as_ref(), &mut layer, &config(init, LoraSpec::new(rank, 1.0)), &w).unwrap_err();
        assert!(layer.adapter().is_none() && !layer.has_own_base());
        assert!(before.is_none_or(|before| before == decoded(b.as_ref(), &four_bits(&layer))));
        message.to_string()
    };
    for init in [LOFTQ, Init::Pissa, Init::Olora] {
        assert_eq!(refuse(four(), init, 4), "'m: r' is 4, expected no more than the matrix has by itself");
    }
    for init in [LOFTQ, Init::Pissa] {
        assert_eq!(refuse(dense(), init, 2), "'m: base' is f32, expected a base in 4 bits");
    }
    assert_eq!(refuse(four(), Init::Gaussian, 2), "'init_lora_weights' is gaussian, expected loftq or pissa");
    let pissa = config(Init::Pissa, LoraSpec::new(2, 2.0));
    let message = attach_new(b.as_ref(), &mut [&mut four()], &pissa, "llama", 0).unwrap_err().to_string();
    let expected = "expected with it, a dense base or the one that was quantised";
    assert_eq!(message, format!("'m: init_lora_weights' is pissa, {expected}"));

    // What is taken out of some layers in 4 bits and of others that are dense has no one folder.
    let mut mixed = [four(), dense()];
    let olora = config(Init::Olora, LoraSpec::new(2, 2.0));
    let message = attach_new(b.as_ref(), &mut all(&mut mixed), &olora, "llama", 0).unwrap_err().to_string();
    assert_eq!(message, "'m: base' is dense, expected as the other targets' with this start");
    assert!(mixed.iter().all(|layer| layer.adapter().is_none()));

    let (folder, mut quantised) = (tempfile::tempdir().unwrap(), four());
    let attached = begin(b.as_ref(), &mut quantised, &config(LOFTQ, LoraSpec::new(2, 2.0)), &w).unwrap();
    write_folder(b.as_ref(), folder.path(), &attached.config, [&quantised], Vec::new(), Purpose::Resume).unwrap();
    let opened = AdapterFolder::open(folder.path()).unwrap();
    let message = attach_folder(b.as_ref(), &mut [&mut dense()], &opened, "llama").unwrap_err().to_string();
    assert!(message.contains("the base in 4 bits that LoftQ made"), "{message}");
}

/// It is nobody's base without the adapter.
#[test]
fn an_adapter_stays_on_the_base_that_was_made_for_it() {
    let b = reference();
    let (dims, w) = ([3, 32], numbers(3, 3 * 32));
    for init in [LOFTQ, Init::Pissa, Init::Olora] {
        let mut layer = in_4_bits(b.as_ref(), dims, &w, Format::Nf4, true);
        let config = config(init, LoraSpec::new(2, 2.0));
        begin(b.as_ref(), &mut layer, &config, &w).unwrap();
        let (plain, before) = (layer.adapter().unwrap().clone(), decoded(b.as_ref(), &four_bits(&layer)));
        let refused = [
            Rack::default().keep("a", &AdapterConfig::default().into(), &mut [&mut layer]).unwrap_err(),
            layer.take_adapter().unwrap_err(),
            layer.set_adapter(plain).unwrap_err(),
            begin(b.as_ref(), &mut layer, &config, &w).unwrap_err(),
        ];
        assert!(refused.iter().all(|why| matches!(why, Error::PartialBase { .. })), "{refused:?}");
        assert_eq!(decoded(b.as_ref(), &four_bits(&layer)), before);
    }
}
