//! What is wrong with a call is an error that says so, and nothing has been written.
//!
//! [`KERNELS`](kernels) lists every kernel as its arguments and a call of it. From the list follow the laws: each
//! argument in turn is made one element too long, given another element type, and given a buffer of another backend.

use super::harness::*;
use crate::params::*;
use crate::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Error, Format, Result, Storage, View, ViewMut,
};
use proptest::prelude::*;
use std::any::Any;

const F: DType = DType::F32;

type Call = Box<dyn Fn(&dyn Backend, &[View], &mut [ViewMut]) -> Result<()>>;

/// A kernel with one valid set of arguments.
struct Kernel {
    name: &'static str,
    inputs: Vec<(DType, usize)>,
    outputs: Vec<(DType, usize)>,
    call: Call,
}

fn kernel<const I: usize, const O: usize>(
    name: &'static str,
    inputs: [(DType, usize); I],
    outputs: [(DType, usize); O],
    call: impl Fn(&dyn Backend, &[View; I], [ViewMut; O]) -> Result<()> + 'static,
) -> Kernel {
    let call: Call = Box::new(move |backend, inputs, outputs| {
        let inputs: &[View; I] = inputs.try_into().expect("as many as listed");
        let mut outputs = outputs.iter_mut();
        call(backend, inputs, std::array::from_fn(|_| outputs.next().expect("as many as listed").reborrow()))
    });
    Kernel { name, inputs: inputs.into(), outputs: outputs.into(), call }
}

const MATMUL: MatMul = MatMul { m: 2, n: 3, k: 4, layout: Layout::Nn, accumulate: false, compute: Compute::F32 };
const LINEAR: Linear = Linear { tokens: 2, inputs: 3, outputs: 4, compute: Compute::F32 };
const RMS: RmsNorm = RmsNorm { rows: 2, width: 3, eps: 1e-5 };
const ROPE: Rope = Rope { tokens: 2, heads: 1, head_dim: 4, inverse: false };
const ATTENTION: Attention = Attention {
    batch: 1,
    queries: 2,
    keys: 3,
    heads: 2,
    kv_heads: 1,
    head_dim: 2,
    scale: 0.7,
    query_offset: 1,
    window: None,
    compute: Compute::F32,
};
const ROWS: Rows = Rows { rows: 2, width: 3 };
const IMPORTANCE: Importance =
    Importance { rows: 2, width: 3, triplets: Triplets::Columns, beta1: 0.9, beta2: 0.9, grad_scale: 1.0 };
const HARD_CONCRETE: HardConcrete = HardConcrete { temperature: 0.5, low: -0.1, high: 1.1, noise: Some((0, 0)) };
const EMBEDDING: Embedding = Embedding { tokens: 2, vocab: 3, width: 2 };
const CROSS_ENTROPY: CrossEntropy = CrossEntropy { rows: 2, vocab: 3 };
const DROPOUT: Dropout = Dropout { probability: 0.5, seed: 0, stream: 0 };
const ADAMW: AdamW = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };

fn low_rank<'a>(a: View<'a>, b: View<'a>, e: View<'a>, g: View<'a>) -> LowRank<'a> {
    LowRank { rank: 2, a, b, scale: 1.0, per_rank: Some(e), row_scale: Some(g), dropout: None }
}

/// Every kernel that takes views.
fn kernels() -> Vec<Kernel> {
    let (u8, u32, i64) = (DType::U8, DType::U32, DType::I64);
    vec![
        kernel("copy", [(F, 4)], [(F, 4)], |on, [x], [out]| on.copy(*x, out)),
        kernel("cast", [(F, 4)], [(DType::Bf16, 4)], |on, [x], [out]| on.cast(*x, out)),
        kernel("add", [(F, 4), (F, 4)], [(F, 4)], |on, [a, b], [out]| on.add(*a, *b, out)),
        kernel("divide", [(F, 4), (F, 4)], [(F, 4)], |on, [a, b], [out]| on.divide(*a, *b, out)),
        kernel("add_in_place", [(F, 4)], [(F, 4)], |on, [x], [out]| on.add_in_place(*x, out)),
        kernel("dropout", [(F, 4)], [(F, 4)], |on, [x], [y]| on.dropout(&DROPOUT, *x, y)),
        kernel("matmul", [(F, 8), (F, 12)], [(F, 6)], |on, [a, b], [c]| on.matmul(&MATMUL, *a, *b, c)),
        kernel("quantize_4bit", [(F, 64)], [(u8, 32), (F, 2)], |on, [w], [codes, absmax]| {
            on.quantize_4bit(Format::Nf4, 32, *w, codes, absmax)
        }),
        kernel("quantize_scales", [(F, 300)], [(u8, 300), (F, 2)], |on, [absmax], [codes, nested]| {
            on.quantize_scales(*absmax, codes, nested).map(|_| ())
        }),
        kernel("quantize_8bit", [(F, 64)], [(u8, 64), (F, 2)], |on, [x], [codes, absmax]| {
            on.quantize_8bit(DynamicMap::Signed, 32, *x, codes, absmax)
        }),
        kernel("dequantize_8bit", [(u8, 64), (F, 2)], [(F, 64)], |on, [codes, absmax], [out]| {
            on.dequantize_8bit(DynamicMap::Signed, 32, *codes, *absmax, out)
        }),
        kernel(
            "linear",
            [(F, 6), (F, 12), (F, 6), (F, 8), (F, 2), (F, 4), (F, 4)],
            [(F, 8)],
            |on, [x, w, a, b, e, g, bias], [y]| {
                on.linear(&LINEAR, *x, &Weight::Dense(*w), Some(&low_rank(*a, *b, *e, *g)), Some(*bias), y)
            },
        ),
        kernel(
            "linear_grad_input",
            [(F, 8), (F, 12), (F, 6), (F, 8), (F, 2), (F, 4)],
            [(F, 6)],
            |on, [dy, w, a, b, e, g], [dx]| {
                on.linear_grad_input(&LINEAR, *dy, &Weight::Dense(*w), Some(&low_rank(*a, *b, *e, *g)), true, dx)
            },
        ),
        kernel(
            "linear_grad_weight",
            [(F, 6), (F, 8), (F, 12), (F, 6), (F, 8), (F, 2), (F, 4)],
            [(F, 4), (F, 6), (F, 8), (F, 2), (F, 4)],
            |on, [x, dy, w, a, b, e, g], [dbias, da, db, de, dg]| {
                let (w, l) = (Weight::Dense(*w), low_rank(*a, *b, *e, *g));
                let [bias, a, b, per_rank, row_scale] = [dbias, da, db, de, dg].map(Some);
                on.linear_grad_weight(
                    &LINEAR,
                    *x,
                    *dy,
                    &w,
                    Some(&l),
                    LinearGrads { weight: None, bias, a, b, per_rank, row_scale },
                )
            },
        ),
        // dW needs no W, and a backend need not look at it: x, of the same shape here, stands in for it.
        kernel("linear_grad_weight", [(F, 12), (F, 16)], [(F, 12)], |on, [x, dy], [dw]| {
            let grads = LinearGrads { weight: Some(dw), ..LinearGrads::default() };
            on.linear_grad_weight(&Linear { tokens: 4, ..LINEAR }, *x, *dy, &Weight::Dense(*x), None, grads)
        }),
        kernel("rms_norm", [(F, 6), (F, 3)], [(F, 6), (F, 2)], |on, [x, gain], [y, inv_rms]| {
            on.rms_norm(&RMS, *x, *gain, y, inv_rms)
        }),
        kernel(
            "rms_norm_grad",
            [(F, 6), (F, 3), (F, 2), (F, 6)],
            [(F, 6), (F, 3)],
            |on, [x, gain, inv_rms, dy], [dx, dgain]| {
                on.rms_norm_grad(&RMS, *x, *gain, *inv_rms, *dy, true, Some(dx), Some(dgain))
            },
        ),
        // One gradient asked for alone, whether it needs every input or not.
        kernel("rms_norm_grad", [(F, 6), (F, 3), (F, 2), (F, 6)], [(F, 3)], |on, [x, gain, inv_rms, dy], [dgain]| {
            on.rms_norm_grad(&RMS, *x, *gain, *inv_rms, *dy, true, None, Some(dgain))
        }),
        kernel("rope", [(F, 8), (u32, 2), (F, 6), (F, 6)], [(F, 8)], |on, [x, positions, cos, sin], [y]| {
            on.rope(&ROPE, *x, *positions, *cos, *sin, y)
        }),
        kernel(
            "attention",
            [(F, 8), (F, 6), (F, 6), (u32, 2)],
            [(F, 8), (F, 4)],
            |on, [q, k, v, starts], [out, lse]| on.attention(&ATTENTION, *q, *k, *v, Some(*starts), out, lse),
        ),
        kernel(
            "attention_grad",
            [(F, 8), (F, 6), (F, 6), (u32, 2), (F, 8), (F, 4), (F, 8)],
            [(F, 8), (F, 6), (F, 6)],
            |on, [q, k, v, starts, out, lse, dout], [dq, dk, dv]| {
                let saved = AttentionSaved { q: *q, k: *k, v: *v, starts: Some(*starts), out: *out, lse: *lse };
                let [dq, dk, dv] = [dq, dk, dv].map(Some);
                on.attention_grad(&ATTENTION, saved, *dout, AttentionGrads { dq, dk, dv })
            },
        ),
        kernel(
            "attention_grad",
            [(F, 8), (F, 6), (F, 6), (u32, 2), (F, 8), (F, 4), (F, 8)],
            [(F, 6)],
            |on, [q, k, v, starts, out, lse, dout], [dv]| {
                let saved = AttentionSaved { q: *q, k: *k, v: *v, starts: Some(*starts), out: *out, lse: *lse };
                on.attention_grad(&ATTENTION, saved, *dout, AttentionGrads { dv: Some(dv), ..Default::default() })
            },
        ),
        kernel("silu_mul", [(F, 4), (F, 4)], [(F, 4)], |on, [gate, up], [out]| on.silu_mul(*gate, *up, out)),
        kernel("silu_mul_grad", [(F, 4), (F, 4), (F, 4)], [(F, 4), (F, 4)], |on, [gate, up, dout], [dgate, dup]| {
            on.silu_mul_grad(*gate, *up, *dout, Some(dgate), Some(dup))
        }),
        kernel("silu_mul_grad", [(F, 4), (F, 4), (F, 4)], [(F, 4)], |on, [gate, up, dout], [dup]| {
            on.silu_mul_grad(*gate, *up, *dout, None, Some(dup))
        }),
        kernel("activate", [(F, 4)], [(F, 4)], |on, [x], [y]| on.activate(Activation::Tanh, *x, y)),
        kernel("activate_grad", [(F, 4), (F, 4)], [(F, 4)], |on, [x, dy], [dx]| {
            on.activate_grad(Activation::Tanh, *x, *dy, dx)
        }),
        kernel("row_norms", [(F, 6)], [(F, 2)], |on, [x], [norms]| on.row_norms(&ROWS, *x, norms)),
        kernel("scale_columns", [(F, 6), (F, 3)], [(F, 6)], |on, [x, factors], [y]| {
            on.scale_columns(&ROWS, *x, *factors, y)
        }),
        kernel("scale_columns_grad", [(F, 6), (F, 3), (F, 6)], [(F, 6), (F, 3)], |on, [x, l, dy], [dx, dl]| {
            on.scale_columns_grad(&ROWS, *x, *l, *dy, true, Some(dx), Some(dl))
        }),
        kernel("scale_columns_grad", [(F, 6), (F, 3), (F, 6)], [(F, 3)], |on, [x, l, dy], [dl]| {
            on.scale_columns_grad(&ROWS, *x, *l, *dy, true, None, Some(dl))
        }),
        kernel("embedding", [(u32, 2), (F, 6)], [(F, 4)], |on, [ids, table], [rows]| {
            on.embedding(&EMBEDDING, *ids, *table, rows)
        }),
        kernel("embedding_grad", [(u32, 2), (F, 4)], [(F, 6)], |on, [ids, drows], [dtable]| {
            on.embedding_grad(&EMBEDDING, *ids, *drows, dtable)
        }),
        kernel("cross_entropy", [(F, 6), (i64, 2)], [(F, 2)], |on, [logits, labels], [losses]| {
            on.cross_entropy(&CROSS_ENTROPY, *logits, *labels, losses)
        }),
        kernel("cross_entropy_grad_in_place", [(i64, 2)], [(F, 6), (F, 2)], |on, [labels], [logits, losses]| {
            on.cross_entropy_grad_in_place(&CROSS_ENTROPY, 1.0, logits, *labels, losses)
        }),
        kernel("adamw", [(F, 4)], [(F, 4), (F, 4), (F, 4)], |on, [grad], [param, m, v]| {
            on.adamw(&ADAMW, *grad, param, m, v)
        }),
        kernel(
            "adamw_8bit",
            [(F, 300)],
            [(F, 300), (u8, 300), (F, 2), (u8, 300), (F, 2)],
            |on, [grad], [param, m_codes, m_absmax, v_codes, v_absmax]| {
                let m = Moment { codes: m_codes, absmax: m_absmax };
                let v = Moment { codes: v_codes, absmax: v_absmax };
                on.adamw_8bit(&ADAMW, *grad, param, m, v)
            },
        ),
        kernel(
            "importance",
            [(F, 6), (F, 6)],
            [(F, 6), (F, 6), (F, 3)],
            |on, [weight, grad], [mean, deviation, scores]| {
                on.importance(&IMPORTANCE, *weight, *grad, mean, deviation, scores)
            },
        ),
        kernel("hard_concrete", [(F, 4)], [(F, 4)], |on, [log_alpha], [z]| {
            on.hard_concrete(&HARD_CONCRETE, *log_alpha, z).map(|_| ())
        }),
        kernel("hard_concrete_grad", [(F, 4), (F, 4)], [(F, 4)], |on, [log_alpha, dz], [dlog_alpha]| {
            on.hard_concrete_grad(&HARD_CONCRETE, *log_alpha, *dz, 1.0, dlog_alpha)
        }),
    ]
}

/// What every byte of an output is before a call: a small number as f32, and no result of inputs that are 0.
const BEFORE: u8 = 0x3c;

/// Calls the kernel with its arguments, the `odd` one of them (inputs first) replaced by what `replace` makes of it.
/// Then every output has to be what it was before, where the call fails.
fn call_with(
    backend: &dyn Backend,
    kernel: &Kernel,
    odd: Option<usize>,
    replace: &dyn Fn((DType, usize)) -> Result<Buffer>,
) -> TestCaseResult<Result<()>> {
    let mut buffers = Vec::new();
    for (i, &(dtype, len)) in kernel.inputs.iter().chain(&kernel.outputs).enumerate() {
        let mut buffer = if odd == Some(i) { replace((dtype, len))? } else { backend.alloc(dtype, len)? };
        let byte = if i < kernel.inputs.len() { 0 } else { BEFORE };
        match backend.write(&vec![byte; buffer.bytes()], buffer.view_mut()) {
            Err(Error::Foreign { .. }) => {}
            written => written?,
        }
        buffers.push(buffer);
    }
    let (inputs, outputs) = buffers.split_at_mut(kernel.inputs.len());
    let inputs: Vec<View> = inputs.iter().map(Buffer::view).collect();
    let mut outputs: Vec<ViewMut> = outputs.iter_mut().map(Buffer::view_mut).collect();
    let answer = (kernel.call)(backend, &inputs, &mut outputs);
    if answer.is_err() {
        for (i, output) in outputs.iter().enumerate() {
            let mut bytes = vec![0; output.len() * output.dtype().size()];
            let read = backend.read(output.as_view(), &mut bytes);
            let foreign = matches!(read, Err(Error::Foreign { .. }));
            let untouched = foreign || bytes.iter().all(|&byte| byte == BEFORE);
            prop_assert!(untouched, "{}: output {i} was written", kernel.name);
        }
    }
    Ok(answer)
}

/// Every argument of every kernel in turn.
fn each_argument(
    backend: &dyn Backend,
    replace: &dyn Fn((DType, usize)) -> Result<Buffer>,
    expected: &dyn Fn(&Error) -> bool,
) -> TestCaseResult {
    for kernel in kernels() {
        let sound = call_with(backend, &kernel, None, replace)?;
        prop_assert!(sound.is_ok(), "{}: {sound:?}, though nothing is wrong", kernel.name);
        for odd in 0..kernel.inputs.len() + kernel.outputs.len() {
            let answer = call_with(backend, &kernel, Some(odd), replace)?;
            let as_expected = answer.as_ref().is_err_and(expected);
            prop_assert!(as_expected, "{}: argument {odd} is wrong, but the answer {answer:?}", kernel.name);
        }
    }
    Ok(())
}

/// One element too many is [`Error::Length`].
pub fn lengths(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        let longer = |(dtype, len)| candidate.filled(dtype, len + 1, 0.0);
        each_argument(candidate, &longer, &|error| matches!(error, Error::Length { .. }))?;
        let mut buffer = candidate.upload(&[1f32, 2.0])?;
        let is_length = |answer: Result<()>| matches!(answer, Err(Error::Length { .. }));
        prop_assert!(is_length(candidate.write(&[0; 7], buffer.view_mut())), "7 bytes were written to 2 f32");
        prop_assert!(is_length(candidate.read(buffer.view(), &mut [0; 9])), "2 f32 were read into 9 bytes");
        Ok(())
    })
}

/// A type that the kernel does not serve is [`Error::DType`].
pub fn dtypes(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        let other =
            |(dtype, len)| candidate.filled(if dtype == DType::I64 { DType::U32 } else { DType::I64 }, len, 0.0);
        let expected = |error: &Error| matches!(error, Error::DType { .. });
        each_argument(candidate, &other, &expected)?;
        let mut labels = candidate.upload(&[1i64, 2])?;
        prop_assert!(candidate.sum_squares(labels.view()).as_ref().is_err_and(expected), "sum_squares of i64");
        let scaled = candidate.scale_in_place(2.0, labels.view_mut());
        prop_assert!(scaled.as_ref().is_err_and(expected), "scale_in_place of i64");
        Ok(())
    })
}

/// Memory that is no backend's.
#[derive(Debug)]
struct Nobodys;

impl Storage for Nobodys {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// A buffer that another backend made is [`Error::Foreign`].
pub fn foreign(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        let nobodys = |(dtype, len)| Ok(Buffer::new(Nobodys, dtype, len));
        let expected = |error: &Error| matches!(error, Error::Foreign { .. });
        each_argument(candidate, &nobodys, &expected)?;
        let mut buffer = Buffer::new(Nobodys, F, 2);
        let answers = [
            candidate.write(&[0; 8], buffer.view_mut()),
            candidate.read(buffer.view(), &mut [0; 8]),
            candidate.fill(0.0, buffer.view_mut()),
            candidate.scale_in_place(2.0, buffer.view_mut()),
            candidate.sum_squares(buffer.view()).map(|_| ()),
        ];
        for (i, answer) in answers.iter().enumerate() {
            prop_assert!(answer.as_ref().is_err_and(expected), "call {i} of a foreign buffer answers {answer:?}");
        }
        let lent = matches!(candidate.host_bytes_mut(&mut buffer), Ok(Some(_)));
        prop_assert!(!lent, "a foreign buffer's bytes were handed out");
        Ok(())
    })
}

/// Ids, labels, positions and segment starts out of range, and values that cannot be quantised.
pub fn values(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        let blank = |len| candidate.filled(F, len, 0.0);
        let (table, mut rows, mut dtable) = (blank(6)?, blank(4)?, blank(6)?);
        let ids = candidate.upload(&[2u32, 3])?;
        let expected = Err(Error::TokenId { position: 1, id: 3, vocab: 3 });
        prop_assert_eq!(candidate.embedding(&EMBEDDING, ids.view(), table.view(), rows.view_mut()), expected.clone());
        prop_assert_eq!(candidate.embedding_grad(&EMBEDDING, ids.view(), rows.view(), dtable.view_mut()), expected);

        for label in [3i64, -1, -99, i64::MAX, i64::MIN] {
            let labels = candidate.upload(&[0, label])?;
            let (mut logits, mut losses) = (blank(6)?, blank(2)?);
            let expected = Err(Error::TokenId { position: 1, id: label, vocab: 3 });
            let p = &CROSS_ENTROPY;
            let answer = candidate.cross_entropy(p, logits.view(), labels.view(), losses.view_mut());
            prop_assert_eq!(answer, expected.clone());
            let (logits, losses) = (logits.view_mut(), losses.view_mut());
            prop_assert_eq!(candidate.cross_entropy_grad_in_place(p, 1.0, logits, labels.view(), losses), expected);
        }

        let (x, cos, mut y, positions) = (blank(8)?, blank(6)?, blank(8)?, candidate.upload(&[0u32, 3])?);
        let answer = candidate.rope(&ROPE, x.view(), positions.view(), cos.view(), cos.view(), y.view_mut());
        prop_assert_eq!(answer, Err(Error::Position { position: 3, positions: 3 }));

        let (q, k, mut out, mut lse) = (blank(8)?, blank(6)?, blank(8)?, blank(4)?);
        let starts = candidate.upload(&[0u32, 3])?;
        let (q, k) = (q.view(), k.view());
        let answer = candidate.attention(&ATTENTION, q, k, k, Some(starts.view()), out.view_mut(), lse.view_mut());
        prop_assert!(matches!(answer, Err(Error::Invalid { .. })), "a segment after its query answers {answer:?}");

        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut w = vec![1f32; 100];
            (w[67], w[99]) = (value, value);
            let w = candidate.upload(&w)?;
            let (mut codes4, mut codes8) = (candidate.alloc(DType::U8, 50)?, candidate.alloc(DType::U8, 100)?);
            let (mut absmax, mut nested) = (blank(4)?, blank(1)?);
            let answers = [
                candidate.quantize_4bit(Format::Nf4, 32, w.view(), codes4.view_mut(), absmax.view_mut()),
                candidate.quantize_8bit(DynamicMap::Signed, 32, w.view(), codes8.view_mut(), absmax.view_mut()),
                candidate.quantize_scales(w.view(), codes8.view_mut(), nested.view_mut()).map(|_| ()),
            ];
            for answer in answers {
                let names_it = matches!(answer, Err(Error::NonFinite { index: 67, .. }));
                prop_assert!(names_it, "element 67 is {value}, the answer {answer:?}");
            }
        }
        Ok(())
    })
}

/// Parameters that no call can have.
pub fn parameters(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        let blank = |len| candidate.filled(F, len, 0.0);
        let (w, mut absmax) = (blank(64)?, blank(64)?);
        for block in [0, 1, 16, 33, 48, 8192] {
            let scales = 64usize.checked_div(block).unwrap_or(1).max(1);
            let (mut codes4, mut codes8) = (candidate.alloc(DType::U8, 32)?, candidate.alloc(DType::U8, 64)?);
            let scales = absmax.slice_mut(0, scales)?;
            let answer = candidate.quantize_4bit(Format::Fp4, block, w.view(), codes4.view_mut(), scales);
            prop_assert_eq!(answer, Err(Error::Block { block }));
            let scales = absmax.slice_mut(0, 64usize.checked_div(block).unwrap_or(1).max(1))?;
            let answer = candidate.quantize_8bit(DynamicMap::Signed, block, w.view(), codes8.view_mut(), scales);
            prop_assert_eq!(answer, Err(Error::Block { block }));
        }
        let invalid = |what: &str, answer: Result<()>| {
            prop_assert!(matches!(answer, Err(Error::Invalid { .. })), "{what} answers {answer:?}");
            Ok(())
        };
        let (x, mut y) = (blank(4)?, blank(4)?);
        for probability in [1.0, -0.1, f32::NAN] {
            let p = Dropout { probability, ..DROPOUT };
            invalid("dropout with no such probability", candidate.dropout(&p, x.view(), y.view_mut()))?;
        }
        let (mut m, mut v) = (blank(4)?, blank(4)?);
        let p = AdamW { step: 0, ..ADAMW };
        invalid("step 0", candidate.adamw(&p, x.view(), y.view_mut(), m.view_mut(), v.view_mut()))?;
        let (mut m_codes, mut v_codes) = (candidate.alloc(DType::U8, 4)?, candidate.alloc(DType::U8, 4)?);
        let m = Moment { codes: m_codes.view_mut(), absmax: m.slice_mut(0, 1)? };
        let v = Moment { codes: v_codes.view_mut(), absmax: v.slice_mut(0, 1)? };
        invalid("step 0 in 8 bits", candidate.adamw_8bit(&p, x.view(), y.view_mut(), m, v))?;

        for (what, p) in [
            ("a decay of 1", Importance { beta1: 1.0, ..IMPORTANCE }),
            ("a decay below 0", Importance { beta2: -0.1, ..IMPORTANCE }),
            ("a decay that is NaN", Importance { beta2: f64::NAN, ..IMPORTANCE }),
            ("columns without rows", Importance { rows: 0, ..IMPORTANCE }),
        ] {
            let n = p.rows * p.width;
            let (x, mut mean, mut deviation, mut scores) = (blank(n)?, blank(n)?, blank(n)?, blank(3)?);
            let (mean, deviation) = (mean.view_mut(), deviation.view_mut());
            invalid(what, candidate.importance(&p, x.view(), x.view(), mean, deviation, scores.view_mut()))?;
        }
        for (what, p) in [
            ("a temperature of 0", HardConcrete { temperature: 0.0, ..HARD_CONCRETE }),
            ("an infinite temperature", HardConcrete { temperature: f64::INFINITY, ..HARD_CONCRETE }),
            ("gates that never close", HardConcrete { low: 0.0, ..HARD_CONCRETE }),
            ("gates that never open", HardConcrete { high: 1.0, ..HARD_CONCRETE }),
            ("a limit that is NaN", HardConcrete { low: f64::NAN, ..HARD_CONCRETE }),
        ] {
            let (x, mut out) = (blank(4)?, blank(4)?);
            invalid(what, candidate.hard_concrete(&p, x.view(), out.view_mut()).map(|_| ()))?;
            invalid(what, candidate.hard_concrete_grad(&p, x.view(), x.view(), 1.0, out.view_mut()))?;
        }

        let (q, k, mut out, mut lse) = (blank(8)?, blank(6)?, blank(8)?, blank(4)?);
        for (what, p) in [
            ("a window of 0", Attention { window: Some(0), ..ATTENTION }),
            ("heads that are no multiple", Attention { kv_heads: 3, ..ATTENTION }),
            ("no kv heads", Attention { kv_heads: 0, ..ATTENTION }),
            ("queries beyond the keys", Attention { query_offset: 2, ..ATTENTION }),
        ] {
            let (q, k) = (q.view(), k.view());
            invalid(what, candidate.attention(&p, q, k, k, None, out.view_mut(), lse.view_mut()))?;
        }

        let (x, cos, positions, mut y) = (blank(6)?, blank(3)?, candidate.upload(&[0u32, 0])?, blank(6)?);
        let p = Rope { head_dim: 3, ..ROPE };
        let answer = candidate.rope(&p, x.view(), positions.view(), cos.view(), cos.view(), y.view_mut());
        invalid("an odd head_dim", answer)?;

        let (x, dy, w, mut da) = (blank(6)?, blank(8)?, blank(12)?, blank(0)?);
        let grads = LinearGrads { a: Some(da.view_mut()), ..LinearGrads::default() };
        let answer = candidate.linear_grad_weight(&LINEAR, x.view(), dy.view(), &Weight::Dense(w.view()), None, grads);
        invalid("dA of no update", answer)
    })
}

/// Dimensions whose product wraps around to the lengths given are [`Error::Length`].
pub fn products(candidate: &dyn Backend, _: &dyn Backend) -> Verdict {
    once(|| {
        // 3 · n is 2 modulo 2⁶⁴.
        let n = usize::MAX / 3 + 1;
        let (nine, two) = (candidate.filled(F, 9, 0.0)?, candidate.filled(F, 2, 0.0)?);
        let mut out = candidate.filled(F, 2, 0.0)?;
        let p = MatMul { m: 3, n, k: 3, ..MATMUL };
        let answer = candidate.matmul(&p, nine.view(), two.view(), out.view_mut());
        prop_assert!(matches!(answer, Err(Error::Length { .. })), "matmul answers {answer:?}");
        let p = Linear { tokens: 3, inputs: 3, outputs: n, ..LINEAR };
        let answer = candidate.linear(&p, nine.view(), &Weight::Dense(two.view()), None, None, out.view_mut());
        prop_assert!(matches!(answer, Err(Error::Length { .. })), "linear answers {answer:?}");
        let p = Embedding { tokens: 2, vocab: n, width: 3 };
        let ids = candidate.upload(&[0u32, 0])?;
        let mut rows = candidate.filled(F, 6, 0.0)?;
        let answer = candidate.embedding(&p, ids.view(), two.view(), rows.view_mut());
        prop_assert!(matches!(answer, Err(Error::Length { .. })), "embedding answers {answer:?}");
        let p = Rows { rows: 3, width: n };
        let mut norms = candidate.filled(F, 3, 0.0)?;
        let answer = candidate.row_norms(&p, two.view(), norms.view_mut());
        prop_assert!(matches!(answer, Err(Error::Length { .. })), "row_norms answers {answer:?}");
        // Nothing is nothing, however many rows of it there are.
        let (nothing, p) = (candidate.filled(F, 0, 0.0)?, Rows { rows: usize::MAX, width: 0 });
        let mut empty = candidate.filled(F, 0, 0.0)?;
        candidate.scale_columns(&p, nothing.view(), nothing.view(), empty.view_mut())?;
        let (x, into) = (nothing.view(), Some(empty.view_mut()));
        candidate.scale_columns_grad(&p, x, x, x, false, None, into)?;
        Ok(())
    })
}
