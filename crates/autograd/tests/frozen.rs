//! Frozen inputs get no gradient work: for every operation, whichever of its inputs are trained.
//!
//! A kernel forms a gradient only where it is handed memory for it. The `cpu` backend counts its buffers, so what a
//! step takes beyond the same step on constants is the gradients that were formed.

use rankfold_autograd::{AttentionShape, Base, Gradients, LinearAdapter, Parameter, Result, Tape, Tensor};
use rankfold_backend::params::Dropout;
use rankfold_backend::{Backend, Buffer, Compute, DType, philox, rope};
use rankfold_cpu::CpuBackend;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// An operation of some inputs.
type Function<'a> = &'a dyn Fn(&Tape, &[Tensor]) -> Result<Tensor>;

/// What a step took and gave.
struct Step {
    /// The most bytes that lay in buffers at once.
    peak: usize,
    /// The gradient of each input, where there is one.
    gradients: Vec<Option<Vec<f32>>>,
}

/// `f` and back, on inputs of `dims`, those of `trained` as parameters and the others as constants.
fn step(dims: &[&[usize]], trained: &[bool], outputs: usize, f: Function) -> Step {
    let cpu = Arc::new(CpuBackend::new(Some(1)));
    let b: Arc<dyn Backend> = cpu.clone();
    let parameters: Vec<Parameter> = dims
        .iter()
        .zip(1..)
        .map(|(dims, stream)| Parameter::new(normal(b.as_ref(), stream, dims.iter().product()), *dims).unwrap())
        .collect();
    let input = |(p, trained): (&Parameter, &bool)| if *trained { p.tensor() } else { p.tensor().detach() };
    let inputs: Vec<Tensor> = parameters.iter().zip(trained).map(input).collect();
    let seed = normal(b.as_ref(), 0, outputs);

    let (tape, mut gradients) = (Tape::new(b.clone()), Gradients::new(b.clone()));
    let y = f(&tape, &inputs).unwrap();
    assert_eq!(y.shape().elements(), outputs);
    tape.backward(&y, seed, &mut gradients).unwrap();
    let download = |p: &Parameter| gradients.of(p).map(|grad| b.download::<f32>(grad.view()).unwrap());
    Step { peak: cpu.memory().peak, gradients: parameters.iter().map(download).collect() }
}

fn normal(b: &dyn Backend, stream: u64, n: usize) -> Buffer {
    let value = |i: usize| 2.0 * philox::unit(philox::word(3, stream, i as u64)) - 1.0;
    b.upload(&(0..n).map(value).collect::<Vec<f32>>()).unwrap()
}

/// Inputs have powers of two of elements, 16 at the least, so that their buffers take their bytes exactly.
fn check(dims: &[&[usize]], outputs: usize, f: Function) {
    let constants = step(dims, &vec![false; dims.len()], outputs, f);
    let all = step(dims, &vec![true; dims.len()], outputs, f);
    assert!(all.gradients.iter().all(Option::is_some));
    for subset in 0..1u32 << dims.len() {
        let trained: Vec<bool> = (0..dims.len()).map(|i| subset >> i & 1 == 1).collect();
        let found = step(dims, &trained, outputs, f);
        let wanted = dims.iter().zip(&trained).filter(|(_, trained)| **trained);
        let bytes: usize = wanted.map(|(dims, _)| dims.iter().product::<usize>() * DType::F32.size()).sum();
        assert_eq!(found.peak - constants.peak, bytes, "bytes of gradients, trained: {trained:?}");
        for (i, trained) in trained.iter().enumerate() {
            let expected = all.gradients[i].as_ref().filter(|_| *trained);
            assert!(found.gradients[i].as_ref() == expected, "the gradient of input {i}, trained: {trained:?}");
        }
    }
}

#[test]
fn silu_mul_forms_the_gradients_of_its_variables_alone() {
    check(&[&[4, 16], &[4, 16]], 64, &|t, x| t.silu_mul(&x[0], &x[1]));
}

#[test]
fn rms_norm_forms_the_gradients_of_its_variables_alone() {
    check(&[&[4, 16], &[16]], 64, &|t, x| t.rms_norm(&x[0], &x[1], 1e-5));
}

#[test]
fn attention_forms_the_gradients_of_its_variables_alone() {
    let (heads, kv_heads, compute) = (4, 2, Compute::F32);
    let shape = AttentionShape { batch: 2, heads, kv_heads, head_dim: 8, query_offset: 0, window: None, compute };
    check(&[&[16, 32], &[16, 16], &[16, 16]], 512, &|t, x| t.attention(shape, [&x[0], &x[1], &x[2]], None));
}

#[test]
fn linear_forms_the_gradients_of_its_variables_alone() {
    // x, W, bias, A, B, e.
    let dims: [&[usize]; 6] = [&[4, 32], &[64, 32], &[64], &[16, 32], &[64, 16], &[16]];
    check(&dims, 4 * 64, &|t, x| {
        let [a, b] = [3, 4].map(|i: usize| x[i].clone());
        let (per_rank, row_scale, dropout) = (Some(x[5].clone()), None, None);
        let adapter = LinearAdapter { a, b, scale: 0.5, per_rank, row_scale, dropout };
        t.linear(&x[0], &Base::Dense(x[1].clone()), Some(&x[2]), Some(&adapter), Compute::F32)
    });
}

#[test]
fn linear_cross_entropy_forms_the_gradients_of_its_variables_alone() {
    check(&[&[4, 16], &[32, 16]], 1, &|t, x| {
        let labels = t.backend().upload(&[3i64, 0, 31, 7])?;
        Ok(t.linear_cross_entropy(&x[0], &Base::Dense(x[1].clone()), &labels, 4.0, Compute::F32)?.0)
    });
}

#[test]
fn operations_of_one_input_form_its_gradient_where_it_is_a_variable() {
    check(&[&[4, 16]], 64, &|t, x| t.dropout(&x[0], Dropout { probability: 0.5, seed: 1, stream: 2 }));
    check(&[&[4, 16]], 32, &|t, x| t.embedding(&Arc::new(t.backend().upload(&[2u32, 0])?), &x[0], DType::F32));
    check(&[&[4, 16]], 64, &|t, x| {
        let (cos, sin) = rope::tables(&rope::frequencies(100.0, 8, rope::Scaling::None), 4);
        let table = |values: &[f32]| Tensor::constant(t.backend().upload(values)?, [4, 4]);
        let positions = Arc::new(t.backend().upload(&[0u32, 1, 2, 3])?);
        t.rope(&x[0], &positions, &table(&cos)?, &table(&sin)?)
    });
}

/// Both terms of a sum have its own gradient, which is there already.
#[test]
fn add_takes_no_memory_for_gradients() {
    let dims: [&[usize]; 2] = [&[4, 16], &[4, 16]];
    let peak = |trained: [bool; 2]| step(&dims, &trained, 64, &|t, x| t.add(&x[0], &x[1])).peak;
    for trained in [[true, false], [false, true], [true, true]] {
        assert_eq!(peak(trained), peak([false, false]));
    }
}

/// What f saw of x in each of its runs: whether it was a variable.
fn runs_of_checkpoint(x: &Tensor, gain: &Tensor, b: &Arc<dyn Backend>) -> Vec<bool> {
    let runs = Rc::new(RefCell::new(Vec::new()));
    let (tape, gain, seen) = (Tape::new(b.clone()), gain.clone(), runs.clone());
    let f = move |t: &Tape, x: &Tensor| {
        seen.borrow_mut().push(x.variable().is_some());
        t.rms_norm(x, &gain, 1e-5)
    };
    let y = tape.checkpoint(x, f).unwrap();
    tape.backward(&y, normal(b.as_ref(), 0, 64), &mut Gradients::new(b.clone())).unwrap();
    runs.take()
}

#[test]
fn a_checkpoint_forms_no_gradient_of_a_constant_and_does_not_run_again_where_nothing_is_trained() {
    let b: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)));
    let parameter = |dims: &[usize]| Parameter::new(normal(b.as_ref(), 1, dims.iter().product()), dims).unwrap();
    let (x, gain) = (parameter(&[4, 16]).tensor(), parameter(&[16]).tensor());
    let (frozen_x, frozen_gain) = (x.detach(), gain.detach());
    // The first run is on a tape that forgets; a second one is backward's.
    assert_eq!(runs_of_checkpoint(&x, &gain, &b), [false, true]);
    assert_eq!(runs_of_checkpoint(&x, &frozen_gain, &b), [false, true]);
    assert_eq!(runs_of_checkpoint(&frozen_x, &gain, &b), [false, false]);
    assert_eq!(runs_of_checkpoint(&frozen_x, &frozen_gain, &b), [false]);
}
