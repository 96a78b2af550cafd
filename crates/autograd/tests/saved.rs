//! Activations kept in bf16: what is rounded, what is not, and that nothing else changes.
//!
//! Backward of an operation is a function of what it saved, so that its gradients are, to the bit, those of the rounded
//! activations. An input is made an activation by adding zeros to a parameter, whose gradient is then its own.

use rankfold_autograd::{AttentionShape, Base, Gradients, LinearAdapter, Parameter, Result, SavedAs, Tape, Tensor};
use rankfold_backend::params::{Activation, Attention, RmsNorm};
use rankfold_backend::{AttentionGrads, AttentionSaved, Backend, Buffer, Compute, DType, philox};
use rankfold_cpu::CpuBackend;
use std::sync::Arc;

const BOTH: [SavedAs; 2] = [SavedAs::Computed, SavedAs::Bf16];

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(Some(2)))
}

/// Numbers in [−1, 1) that bf16 does not have, others for every `stream`.
fn numbers(b: &dyn Backend, stream: u64, n: usize) -> Buffer {
    let value = |i: usize| 2.0 * philox::unit(philox::word(3, stream, i as u64)) - 1.0;
    b.upload(&(0..n).map(value).collect::<Vec<f32>>()).unwrap()
}

fn parameter(b: &dyn Backend, stream: u64, dims: &[usize]) -> Parameter {
    Parameter::new(numbers(b, stream, dims.iter().product()), dims).unwrap()
}

fn rounded(b: &dyn Backend, x: &Buffer) -> Buffer {
    let (mut half, mut back) = (b.alloc(DType::Bf16, x.len()).unwrap(), b.alloc(DType::F32, x.len()).unwrap());
    b.cast(x.view(), half.view_mut()).unwrap();
    b.cast(half.view(), back.view_mut()).unwrap();
    back
}

fn round(b: &dyn Backend, x: &Parameter) {
    let round = |value: &mut Buffer| {
        *value = rounded(b, value);
        Ok(())
    };
    x.update(round).unwrap();
}

fn activation(tape: &Tape, x: &Tensor) -> Result<Tensor> {
    let zeros = tape.backend().filled(DType::F32, x.shape().elements(), 0.0)?;
    tape.add(x, &Tensor::constant(zeros, x.shape().clone())?)
}

fn values(b: &dyn Backend, x: &Buffer) -> Vec<f32> {
    b.download(x.view()).unwrap()
}

/// y of `f`, and the gradients of the parameters, from a seed of numbers.
fn gradients(
    b: &Arc<dyn Backend>,
    saved_as: SavedAs,
    parameters: &[Parameter],
    f: &dyn Fn(&Tape) -> Result<Tensor>,
) -> [Vec<Vec<f32>>; 2] {
    let (tape, mut gradients) = (Tape::saving(b.clone(), saved_as), Gradients::new(b.clone()));
    let y = f(&tape).unwrap();
    let seed = numbers(b.as_ref(), 0, y.shape().elements());
    tape.backward(&y, seed, &mut gradients).unwrap();
    let of = |p: &Parameter| values(b.as_ref(), gradients.of(p).unwrap());
    [vec![values(b.as_ref(), y.buffer())], parameters.iter().map(of).collect()]
}

/// That `f` of activations, and of weights that are none, has the gradients of the same function of rounded
/// activations.
fn check(activations: &[&[usize]], weights: &[&[usize]], f: &dyn Fn(&Tape, &[Tensor]) -> Result<Tensor>) {
    let b = cpu();
    let make = |(dims, stream): (&&[usize], u64)| parameter(b.as_ref(), stream, dims);
    let parameters: Vec<Parameter> = activations.iter().chain(weights).zip(1..).map(make).collect();
    let run = |saved_as, rounds: bool| {
        for parameter in parameters.iter().take(if rounds { activations.len() } else { 0 }) {
            round(b.as_ref(), parameter);
        }
        gradients(&b, saved_as, &parameters, &|tape| {
            let input = |(i, p): (usize, &Parameter)| match i < activations.len() {
                true => activation(tape, &p.tensor()),
                false => Ok(p.tensor()),
            };
            f(tape, &parameters.iter().enumerate().map(input).collect::<Result<Vec<_>>>()?)
        })
    };
    let ([y, exact], [y_again, found]) = (run(SavedAs::Computed, false), run(SavedAs::Bf16, false));
    assert!(y == y_again, "forward changes");
    let [_, by_hand] = run(SavedAs::Computed, true);
    assert!(found == by_hand, "the gradients are not those of the rounded activations");
    assert!(found != exact, "nothing is rounded");
}

#[test]
fn linear_has_the_gradients_of_its_rounded_input() {
    check(&[&[4, 32]], &[&[64, 32], &[64], &[16, 32], &[64, 16], &[16]], &|t, x| {
        let [a, b] = [3, 4].map(|i: usize| x[i].clone());
        let adapter = LinearAdapter { a, b, scale: 0.5, per_rank: Some(x[5].clone()), row_scale: None, dropout: None };
        t.linear(&x[0], &Base::Dense(x[1].clone()), Some(&x[2]), Some(&adapter), Compute::F32)
    });
}

/// The product is not kept, but made again from what is.
#[test]
fn a_gated_product_and_the_layer_after_it_have_the_gradients_of_the_rounded_gate_and_up() {
    check(&[&[4, 32], &[4, 32]], &[], &|t, x| t.silu_mul(&x[0], &x[1]));
    check(&[&[4, 32], &[4, 32]], &[&[16, 32]], &|t, x| {
        t.linear(&t.silu_mul(&x[0], &x[1])?, &Base::Dense(x[2].clone()), None, None, Compute::F32)
    });
}

#[test]
fn activations_and_scaled_columns_have_the_gradients_of_the_rounded_input() {
    for f in [Activation::Silu, Activation::Tanh] {
        check(&[&[4, 32]], &[], &|t, x| t.activate(f, &x[0]));
    }
    check(&[&[4, 32]], &[&[32]], &|t, x| t.scale_columns(&x[0], &x[1]));
}

/// Backward runs f from the rounded input, and saves what it computes there as the outer tape does.
#[test]
fn a_checkpoint_has_the_gradients_of_its_function_from_the_rounded_input() {
    let b = cpu();
    let [x, gain, w] = [(1, &[4, 32][..]), (2, &[32]), (3, &[16, 32])].map(|(s, dims)| parameter(b.as_ref(), s, dims));
    let all = [x.clone(), gain.clone(), w.clone()];
    let (gain, w) = (gain.clone(), w.clone());
    let f = move |t: &Tape, x: &Tensor| {
        let n = t.rms_norm(x, &gain.tensor(), 1e-5)?;
        t.linear(&n, &Base::Dense(w.tensor()), None, None, Compute::F32)
    };
    let [y, found] = gradients(&b, SavedAs::Bf16, &all, &|t| t.checkpoint(&activation(t, &x.tensor())?, f.clone()));
    let plain = |saved_as| gradients(&b, saved_as, &all, &|t| f(t, &activation(t, &x.tensor())?));
    assert!(plain(SavedAs::Computed)[0] == y, "forward changes");
    round(b.as_ref(), &x);
    assert!(plain(SavedAs::Bf16)[1] == found);
}

#[test]
fn rms_norm_keeps_the_statistic_of_the_exact_row() {
    let b = cpu();
    let (x, gain) = (parameter(b.as_ref(), 1, &[4, 32]), parameter(b.as_ref(), 2, &[32]));
    let all = [x.clone(), gain.clone()];
    let f = |t: &Tape| t.rms_norm(&activation(t, &x.tensor())?, &gain.tensor(), 1e-5);
    let [_, found] = gradients(&b, SavedAs::Bf16, &all, &f);

    let p = RmsNorm { rows: 4, width: 32, eps: 1e-5 };
    let [mut y, mut dx] = [0; 2].map(|_| b.alloc(DType::F32, 4 * 32).unwrap());
    let (mut inv_rms, mut dgain) = (b.alloc(DType::F32, 4).unwrap(), b.filled(DType::F32, 32, 0.0).unwrap());
    let (x, gain, dy) = (x.tensor(), gain.tensor(), numbers(b.as_ref(), 0, 4 * 32));
    b.rms_norm(&p, x.view(), gain.view(), y.view_mut(), inv_rms.view_mut()).unwrap();
    let x = rounded(b.as_ref(), x.buffer());
    let (into, of_gain) = (Some(dx.view_mut()), Some(dgain.view_mut()));
    b.rms_norm_grad(&p, x.view(), gain.view(), inv_rms.view(), dy.view(), false, into, of_gain).unwrap();
    assert!(found == [&dx, &dgain].map(|grad| values(b.as_ref(), grad)));
}

#[test]
fn attention_keeps_the_log_sums_of_the_exact_rows_and_rounds_its_output_too() {
    let b = cpu();
    let (heads, kv_heads, head_dim, compute) = (4, 2, 8, Compute::F32);
    let qkv = [(1, [16, 32]), (2, [16, 16]), (3, [16, 16])].map(|(s, dims)| parameter(b.as_ref(), s, &dims));
    let shape = AttentionShape { batch: 2, heads, kv_heads, head_dim, query_offset: 0, window: None, compute };
    let [_, found] = gradients(&b, SavedAs::Bf16, &qkv, &|t| {
        let [q, k, v] = [0, 1, 2].map(|i: usize| activation(t, &qkv[i].tensor()));
        t.attention(shape, [&q?, &k?, &v?], None)
    });

    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let (batch, queries, keys, query_offset, window) = (2, 8, 8, 0, None);
    let p = Attention { batch, queries, keys, heads, kv_heads, head_dim, scale, query_offset, window, compute };
    let [q, k, v] = [0, 1, 2].map(|i: usize| qkv[i].tensor());
    let mut out = b.alloc(DType::F32, p.query_elements()).unwrap();
    let mut lse = b.alloc(DType::F32, p.lse_elements()).unwrap();
    b.attention(&p, q.view(), k.view(), v.view(), None, out.view_mut(), lse.view_mut()).unwrap();
    let [q, k, v, out] = [q.buffer(), k.buffer(), v.buffer(), &out].map(|x| rounded(b.as_ref(), x));
    let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| b.alloc(DType::F32, x.len()).unwrap());
    let dout = numbers(b.as_ref(), 0, out.len());
    let saved =
        AttentionSaved { q: q.view(), k: k.view(), v: v.view(), starts: None, out: out.view(), lse: lse.view() };
    let grads = AttentionGrads { dq: Some(dq.view_mut()), dk: Some(dk.view_mut()), dv: Some(dv.view_mut()) };
    b.attention_grad(&p, saved, dout.view(), grads).unwrap();
    assert!(found == [&dq, &dk, &dv].map(|grad| values(b.as_ref(), grad)));
}

/// A parameter is held anyway: to round it would take memory, not save it.
#[test]
fn parameters_are_not_rounded() {
    let b = cpu();
    let all = [(1, [4, 32]), (2, [16, 32])].map(|(s, dims)| parameter(b.as_ref(), s, &dims));
    let f = |t: &Tape| t.linear(&all[0].tensor(), &Base::Dense(all[1].tensor()), None, None, Compute::F32);
    let [computed, rounded] = BOTH.map(|saved_as| gradients(&b, saved_as, &all, &f));
    assert!(computed == rounded);
}

/// Bytes between forward and backward beyond y's, of a function of an activation [64, 512]: powers of two, which the
/// backend's blocks hold exactly.
fn kept(saved_as: SavedAs, f: impl Fn(&Tape, &Tensor, &Base) -> Result<Tensor>) -> usize {
    let cpu = Arc::new(CpuBackend::new(Some(1)));
    let b: Arc<dyn Backend> = cpu.clone();
    let (x, w) = (parameter(b.as_ref(), 1, &[64, 512]), parameter(b.as_ref(), 2, &[64, 512]));
    let tape = Tape::saving(b, saved_as);
    let before = cpu.memory().live;
    let y = activation(&tape, &x.tensor()).and_then(|x| f(&tape, &x, &Base::Dense(w.tensor()))).unwrap();
    cpu.memory().live - before - 4 * y.shape().elements()
}

#[test]
fn an_activation_that_several_operations_save_is_kept_once_in_half_the_bytes() {
    let three = |t: &Tape, x: &Tensor, w: &Base| {
        let y = || t.linear(x, w, None, None, Compute::F32);
        t.add(&t.add(&y()?, &y()?)?, &y()?)
    };
    assert_eq!(BOTH.map(|saved_as| kept(saved_as, three)), [4, 2].map(|size| size * 64 * 512));
    let checkpoint = |t: &Tape, x: &Tensor, w: &Base| {
        let w = w.clone();
        t.checkpoint(x, move |t, x| t.linear(x, &w, None, None, Compute::F32))
    };
    assert_eq!(BOTH.map(|saved_as| kept(saved_as, checkpoint)), [4, 2].map(|size| size * 64 * 512));
}

/// Nothing of a tensor that is gone is taken for another that lies where it lay.
#[test]
fn activations_one_after_another_are_told_apart() {
    let b = cpu();
    let all: Vec<Parameter> = (1..9).map(|stream| parameter(b.as_ref(), stream, &[4, 32])).collect();
    let w = parameter(b.as_ref(), 9, &[16, 32]);
    let each = |t: &Tape, x: &Parameter| {
        let x = activation(t, &x.tensor())?;
        t.linear(&x, &Base::Dense(w.tensor()), None, None, Compute::F32)
    };
    let sum = |t: &Tape| {
        let mut sum = each(t, &all[0])?;
        for x in &all[1..] {
            sum = t.add(&sum, &each(t, x)?)?;
        }
        Ok(sum)
    };
    let [_, found] = gradients(&b, SavedAs::Bf16, std::slice::from_ref(&w), &sum);
    all.iter().for_each(|x| round(b.as_ref(), x));
    let [_, by_hand] = gradients(&b, SavedAs::Computed, std::slice::from_ref(&w), &sum);
    assert!(found == by_hand);
}
