//! Every operation's gradient against central differences, in f64 on the reference backend.

use rankfold_autograd::gradcheck::{parameter, worst_error};
use rankfold_autograd::{AttentionShape, Base, Gradients, LinearAdapter, Parameter, Result, Tape, Tensor};
use rankfold_backend::params::{Activation, Dropout, HardConcrete, IGNORED, Triplets};
use rankfold_backend::{Backend, Buffer, Compute, DType, Format, Quantized, rope};
use rankfold_reference::ReferenceBackend;
use std::slice::from_ref;
use std::sync::Arc;

/// What the two roundings and the truncation of a central difference leave, many times over: see `gradcheck`.
const ALLOWED: f64 = 1e-7;

fn reference() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend::new())
}

fn constant(backend: &Arc<dyn Backend>, stream: u64, dims: &[usize]) -> Tensor {
    parameter(backend, stream, dims).unwrap().tensor().detach()
}

fn ids(backend: &Arc<dyn Backend>, ids: &[u32]) -> Arc<Buffer> {
    Arc::new(backend.upload(ids).unwrap())
}

fn check(backend: &Arc<dyn Backend>, parameters: &[Parameter], f: impl Fn(&Tape) -> Result<Tensor>) {
    let worst = worst_error(backend, parameters, f).unwrap();
    assert!(worst < ALLOWED, "worst error {worst:e}");
}

#[test]
fn add_gives_both_terms_the_sums_gradient() {
    let b = reference();
    let (x, y) = (parameter(&b, 1, &[2, 3]).unwrap(), parameter(&b, 2, &[2, 3]).unwrap());
    check(&b, &[x.clone(), y.clone()], |t| t.add(&x.tensor(), &t.add(&x.tensor(), &y.tensor())?));
}

#[test]
fn a_gradient_shared_by_two_terms_is_copied_before_one_is_added_to() {
    let b = reference();
    let (x, g) = (parameter(&b, 1, &[2, 3]).unwrap(), parameter(&b, 2, &[3]).unwrap());
    // x + (norm(x) + x): the residual's gradient is shared, then added to by the norm's.
    check(&b, &[x.clone(), g.clone()], |t| {
        let x = t.add(&x.tensor(), &x.tensor())?;
        t.add(&x, &t.add(&t.rms_norm(&x, &g.tensor(), 1e-5)?, &x)?)
    });
}

#[test]
fn silu_mul_matches_differences() {
    let b = reference();
    let (gate, up) = (parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[3, 4]).unwrap());
    check(&b, &[gate.clone(), up.clone()], |t| t.silu_mul(&gate.tensor(), &up.tensor()));
}

#[test]
fn activations_match_differences() {
    let b = reference();
    let x = parameter(&b, 1, &[3, 4]).unwrap();
    for f in [Activation::Relu, Activation::Silu, Activation::Tanh] {
        // Twice, so that the second pass adds to what is there.
        check(&b, from_ref(&x), |t| t.add(&t.activate(f, &x.tensor())?, &t.activate(f, &x.tensor())?));
    }
}

#[test]
fn quotients_match_differences() {
    let b = reference();
    let (a, n) = (parameter(&b, 1, &[2, 3]).unwrap(), constant(&b, 2, &[2, 3]));
    check(&b, from_ref(&a), |t| t.divide(&a.tensor(), &n));
}

#[test]
fn scaled_columns_match_differences() {
    let b = reference();
    let (x, f) = (parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[4]).unwrap());
    let both = [x.clone(), f.clone()];
    check(&b, &both, |t| t.scale_columns(&t.scale_columns(&x.tensor(), &f.tensor())?, &f.tensor()));
    check(&b, &both, |t| t.add(&t.scale_columns(&x.tensor(), &f.tensor())?, &x.tensor()));
}

#[test]
fn gates_match_differences_with_their_noise_held() {
    let b = reference();
    let (log_alpha, x) = (parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[3, 4]).unwrap());
    for noise in [None, Some((3, 5))] {
        let p = HardConcrete { temperature: 0.7, low: -1.5, high: 1.5, noise };
        let gated = |t: &Tape| t.gated(p, &log_alpha.tensor(), &x.tensor());
        check(&b, &[log_alpha.clone(), x.clone()], |t| t.add(&gated(t)?, &gated(t)?));
    }
}

#[test]
fn rows_before_every_sequence_match_differences() {
    let b = reference();
    let (p, x) = (parameter(&b, 1, &[2, 3]).unwrap(), parameter(&b, 2, &[6, 3]).unwrap());
    for batch in [1, 3] {
        let both = |t: &Tape| t.prepend(&p.tensor(), &x.tensor(), batch);
        check(&b, &[p.clone(), x.clone()], |t| t.silu_mul(&both(t)?, &both(t)?));
    }
    let y = Tape::inference(b.clone()).prepend(&p.tensor(), &x.tensor(), 3).unwrap();
    let rows = |of: &Tensor| b.download::<f64>(of.view()).unwrap();
    let (y, p, x) = (rows(&y), rows(&p.tensor()), rows(&x.tensor()));
    assert!((0..3).all(|i| y[i * 12..][..6] == p && y[i * 12 + 6..][..6] == x[i * 6..][..6]));
}

#[test]
fn parts_match_differences_and_are_the_elements_that_they_name() {
    let b = reference();
    let x = parameter(&b, 1, &[4, 5]).unwrap();
    for (rows, columns) in [(1..3, 2..5), (0..4, 0..5), (2..4, 0..5), (1..1, 0..5)] {
        let part = |t: &Tape| t.part(&x.tensor(), rows.clone(), columns.clone());
        check(&b, from_ref(&x), |t| t.silu_mul(&part(t)?, &part(t)?));
        let y = b.download::<f64>(part(&Tape::inference(b.clone())).unwrap().view()).unwrap();
        let x = b.download::<f64>(x.tensor().view()).unwrap();
        let elements = rows.flat_map(|i| columns.clone().map(move |j| i * 5 + j));
        assert_eq!(y, elements.map(|i| x[i]).collect::<Vec<_>>());
    }
    assert!(Tape::inference(b.clone()).part(&x.tensor(), 0..5, 0..1).is_err());
}

/// Keys and values that every sequence sees before its own.
#[test]
fn attention_behind_a_prefix_matches_differences() {
    let b = reference();
    let one = |stream, rows: usize, width: usize| parameter(&b, stream, &[rows, width]).unwrap();
    let (q, kv) = (one(1, 6, 4), [one(2, 6, 2), one(3, 6, 2)]);
    let prefix = [one(4, 2, 2), one(5, 2, 2)];
    let shape = AttentionShape {
        batch: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        query_offset: 2,
        window: None,
        compute: Compute::F32,
    };
    let all = [vec![q.clone()], kv.to_vec(), prefix.to_vec()].concat();
    check(&b, &all, |t| {
        let k = t.prepend(&prefix[0].tensor(), &kv[0].tensor(), 2)?;
        let v = t.prepend(&prefix[1].tensor(), &kv[1].tensor(), 2)?;
        t.attention(shape, [&q.tensor(), &k, &v], None)
    });
}

#[test]
fn orthogonality_matches_differences_and_is_none_of_orthonormal_triplets() {
    let b = reference();
    let (rows, columns) = (parameter(&b, 1, &[2, 5]).unwrap(), parameter(&b, 2, &[4, 3]).unwrap());
    for squared in [false, true] {
        check(&b, &[rows.clone(), columns.clone()], |t| {
            let matrices = [(rows.tensor(), Triplets::Rows), (columns.tensor(), Triplets::Columns)];
            Ok(t.orthogonality(&matrices, squared)?.0)
        });
    }
    let orthonormal = Tensor::constant(b.upload(&[0.6f64, 0.8, 0.0, 0.0, 0.0, -1.0]).unwrap(), [2, 3]).unwrap();
    let nothing = Tensor::constant(b.upload::<f64>(&[]).unwrap(), [0, 3]).unwrap();
    let matrices = [(orthonormal, Triplets::Rows), (nothing, Triplets::Rows)];
    let (_, value) = Tape::inference(b).orthogonality(&matrices, false).unwrap();
    assert!(value < 1e-15, "{value}");
}

#[test]
fn rms_norm_matches_differences_by_row_and_by_head() {
    let b = reference();
    let x = parameter(&b, 1, &[3, 8]).unwrap();
    for width in [8, 4] {
        let gain = parameter(&b, 2, &[width]).unwrap();
        check(&b, &[x.clone(), gain.clone()], |t| t.rms_norm(&x.tensor(), &gain.tensor(), 1e-5));
    }
}

#[test]
fn rope_matches_differences() {
    let b = reference();
    let x = parameter(&b, 1, &[3, 8]).unwrap();
    let frequencies = rope::frequencies(100.0, 4, rope::Scaling::None);
    let (cos, sin) = rope::tables(&frequencies, 6);
    let table = |values: &[f32]| Tensor::constant(b.upload(values).unwrap(), [6, 2]).unwrap();
    let (cos, sin, positions) = (table(&cos), table(&sin), ids(&b, &[0, 5, 3]));
    check(&b, from_ref(&x), |t| t.rope(&x.tensor(), &positions, &cos, &sin));
}

#[test]
fn attention_matches_differences_with_groups_segments_offset_and_window() {
    let b = reference();
    for (queries, keys, query_offset, window, starts) in
        [(4, 4, 0, None, None), (4, 4, 0, None, Some([0, 0, 2, 2])), (3, 5, 2, None, None), (4, 4, 0, Some(2), None)]
    {
        let shape = AttentionShape {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 3,
            query_offset,
            window,
            compute: Compute::F32,
        };
        let q = parameter(&b, 1, &[2 * queries, 12]).unwrap();
        let k = parameter(&b, 2, &[2 * keys, 6]).unwrap();
        let v = parameter(&b, 3, &[2 * keys, 6]).unwrap();
        let starts = starts.map(|s: [u32; 4]| ids(&b, &[s, s].concat()));
        check(&b, &[q.clone(), k.clone(), v.clone()], |t| {
            t.attention(shape, [&q.tensor(), &k.tensor(), &v.tensor()], starts.as_ref())
        });
    }
}

#[test]
fn embedding_adds_repeated_rows() {
    let b = reference();
    let table = parameter(&b, 1, &[5, 3]).unwrap();
    let ids = ids(&b, &[4, 0, 4, 2]);
    check(&b, from_ref(&table), |t| t.embedding(&ids, &table.tensor(), DType::F64));
}

#[test]
fn dropout_matches_differences() {
    let b = reference();
    let x = parameter(&b, 1, &[4, 5]).unwrap();
    check(&b, from_ref(&x), |t| t.dropout(&x.tensor(), Dropout { probability: 0.4, seed: 3, stream: 9 }));
}

/// The low-rank cases of `linear`: LoRA, with dropout, AdaLoRA's e, DoRA's g, and all of it.
fn adapters(b: &Arc<dyn Backend>) -> Vec<(Vec<Parameter>, [bool; 3])> {
    [[false; 3], [true, false, false], [false, true, false], [false, false, true], [true, true, true]]
        .map(|cases| {
            let dims: [&[usize]; 4] = [&[2, 4], &[3, 2], &[2], &[3]];
            let parameters = dims.iter().zip(10..).map(|(dims, stream)| parameter(b, stream, dims).unwrap()).collect();
            (parameters, cases)
        })
        .into()
}

fn adapter(p: &[Parameter], [dropout, e, g]: [bool; 3]) -> LinearAdapter {
    LinearAdapter {
        a: p[0].tensor(),
        b: p[1].tensor(),
        scale: 0.75,
        per_rank: e.then(|| p[2].tensor()),
        row_scale: g.then(|| p[3].tensor()),
        dropout: dropout.then_some(Dropout { probability: 0.3, seed: 5, stream: 1 }),
    }
}

#[test]
fn linear_matches_differences_for_every_adapter_and_trained_base() {
    let b = reference();
    let x = parameter(&b, 1, &[5, 4]).unwrap();
    let w = parameter(&b, 2, &[3, 4]).unwrap();
    let bias = parameter(&b, 3, &[3]).unwrap();
    let trained = [x.clone(), w.clone(), bias.clone()];
    check(&b, &trained, |t| t.linear(&x.tensor(), &Base::Dense(w.tensor()), Some(&bias.tensor()), None, Compute::F32));
    for (parameters, cases) in adapters(&b) {
        let base = Base::Dense(w.tensor().detach());
        let all = [vec![x.clone(), bias.clone()], parameters.clone()].concat();
        check(&b, &all, |t| {
            t.linear(&x.tensor(), &base, Some(&bias.tensor()), Some(&adapter(&parameters, cases)), Compute::F32)
        });
    }
}

#[test]
fn linear_matches_differences_on_a_quantised_base() {
    let b = reference();
    let x = parameter(&b, 1, &[2, 32]).unwrap();
    let weight: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
    for double in [false, true] {
        let w = b.upload(&weight).unwrap();
        let quantised = Quantized::quantize(b.as_ref(), w.view(), [3, 32], Format::Nf4, 32, double).unwrap();
        let base = Base::Quantized(Arc::new(quantised));
        let lora = [parameter(&b, 5, &[2, 32]).unwrap(), parameter(&b, 6, &[3, 2]).unwrap()];
        check(&b, &[vec![x.clone()], lora.to_vec()].concat(), |t| {
            let adapter = LinearAdapter {
                a: lora[0].tensor(),
                b: lora[1].tensor(),
                scale: 2.0,
                per_rank: None,
                row_scale: None,
                dropout: None,
            };
            t.linear(&x.tensor(), &base, None, Some(&adapter), Compute::F32)
        });
    }
}

#[test]
fn linear_cross_entropy_matches_differences_with_ignored_labels() {
    let b = reference();
    let (x, head) = (parameter(&b, 1, &[4, 3]).unwrap(), parameter(&b, 2, &[6, 3]).unwrap());
    let labels = b.upload(&[5i64, IGNORED, 0, 3]).unwrap();
    check(&b, &[x.clone(), head.clone()], |t| {
        let head = Base::Dense(head.tensor());
        Ok(t.linear_cross_entropy(&x.tensor(), &head, &labels, 3.0, Compute::F32)?.0)
    });
}

#[test]
fn checkpointed_gradients_are_those_of_the_plain_tape_to_the_bit() {
    let b = reference();
    let (x, gain, w) =
        (parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[4]).unwrap(), parameter(&b, 3, &[4, 4]).unwrap());
    let (g, m) = (gain.clone(), w.clone());
    let block = move |t: &Tape, x: &Tensor| {
        let h = t.rms_norm(x, &g.tensor(), 1e-5)?;
        let h = t.dropout(&h, Dropout { probability: 0.2, seed: 1, stream: 2 })?;
        t.add(x, &t.linear(&h, &Base::Dense(m.tensor()), None, None, Compute::F32)?)
    };
    let gradients = |checkpointed: bool| {
        let tape = Tape::new(b.clone());
        let mut h = x.tensor();
        for _ in 0..2 {
            h = if checkpointed { tape.checkpoint(&h, block.clone()) } else { block(&tape, &h) }.unwrap();
        }
        let seed = b.filled(DType::F64, 12, 0.7).unwrap();
        let mut gradients = Gradients::new(b.clone());
        tape.backward(&h, seed, &mut gradients).unwrap();
        [&x, &gain, &w].map(|p| b.download::<f64>(gradients.of(p).unwrap().view()).unwrap())
    };
    assert_eq!(gradients(false), gradients(true));
}

#[test]
fn frozen_inputs_have_no_gradient_and_an_inference_tape_none_at_all() {
    let b = reference();
    let x = constant(&b, 1, &[2, 4]);
    let base = Base::Dense(constant(&b, 2, &[3, 4]));
    let tape = Tape::new(b.clone());
    let y = tape.linear(&x, &base, None, None, Compute::F32).unwrap();
    assert_eq!(y.variable(), None);

    let w = parameter(&b, 2, &[3, 4]).unwrap();
    let forgetful = Tape::inference(b.clone());
    let y = forgetful.linear(&x, &Base::Dense(w.tensor()), None, None, Compute::F32).unwrap();
    assert_eq!(y.variable(), None);
}

#[test]
fn saved_tensors_are_freed_as_the_walk_goes() {
    let b = reference();
    let x = parameter(&b, 1, &[2, 4]).unwrap();
    let tape = Tape::new(b.clone());
    let gate = tape.add(&x.tensor(), &x.tensor()).unwrap();
    let held = Arc::downgrade(gate.buffer());
    let y = tape.silu_mul(&gate, &gate).unwrap();
    drop(gate);
    assert!(held.upgrade().is_some(), "silu_mul saves its gate");
    let mut gradients = Gradients::new(b.clone());
    tape.backward(&y, b.filled(DType::F64, 8, 1.0).unwrap(), &mut gradients).unwrap();
    assert!(held.upgrade().is_none(), "and frees it in backward");
    drop(y);
    x.update(|_| Ok(())).expect("nothing holds the parameter after the walk");
}

#[test]
fn what_silu_mul_gives_a_linear_layer_is_made_again_and_gives_the_same_bits() {
    let b = reference();
    let (gate, up) = (parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[3, 4]).unwrap());
    let (a, outputs) = (parameter(&b, 3, &[2, 4]).unwrap(), parameter(&b, 4, &[5, 2]).unwrap());
    let base = Base::Dense(constant(&b, 5, &[5, 4]));
    // The gradient of A through a layer whose input is `inner`, or a constant of its bits.
    let gradient = |is_made: bool| {
        let tape = Tape::new(b.clone());
        let mut inner = tape.silu_mul(&gate.tensor(), &up.tensor()).unwrap();
        if !is_made {
            inner = Tensor::constant(inner.buffer().clone(), [3, 4]).unwrap();
        }
        let held = Arc::downgrade(inner.buffer());
        let [a_now, b_now] = [&a, &outputs].map(Parameter::tensor);
        let adapter = LinearAdapter { a: a_now, b: b_now, scale: 2.0, per_rank: None, row_scale: None, dropout: None };
        let y = tape.linear(&inner, &base, None, Some(&adapter), Compute::F32).unwrap();
        drop((inner, adapter));
        assert_eq!(held.upgrade().is_none(), is_made, "whether it is kept");
        let mut gradients = Gradients::new(b.clone());
        tape.backward(&y, b.filled(DType::F64, 15, 0.7).unwrap(), &mut gradients).unwrap();
        b.download::<f64>(gradients.of(&a).unwrap().view()).unwrap()
    };
    assert_eq!(gradient(true), gradient(false));
}
