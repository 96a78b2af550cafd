//! What kernels hold. Holds are counted, in tests alone, by the thread that takes them, which is a kernel's caller's.

use super::*;
use crate::CpuBackend;
use rankfold_backend::params::*;
use rankfold_backend::{Backend, Buffer, DType, Error, Format, Quantized};
use rankfold_pager::{Access, Limit, Options, Pager};
use std::cell::{Cell, RefCell};

thread_local! {
    /// Holds that were taken, in order: what of its buffer, and for what.
    static TAKEN: RefCell<Vec<(Range<usize>, Access)>> = const { RefCell::new(Vec::new()) };
    /// Those that are there.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

pub(super) fn taken(part: &Range<usize>, access: Access) {
    TAKEN.with_borrow_mut(|taken| taken.push((part.clone(), access)));
    HELD.set(HELD.get() + 1);
}

pub(super) fn released(holds: usize) {
    HELD.set(HELD.get() - holds);
}

const PAGE: usize = 64 << 10;

/// A pager whose pages never need to leave.
pub(super) fn unlimited() -> Pager {
    Pager::new(Options { page: PAGE, ..Options::new(Limit::Pages(usize::MAX), None) }).unwrap()
}

fn paged_from(bytes: usize) -> CpuBackend {
    CpuBackend::new(Some(2)).on_pager_from(unlimited(), bytes)
}

/// What a call holds, for reading (`r`) and writing (`w`) in the order of its tensors, and its answer. After it,
/// nothing is held.
fn holds<T>(call: impl FnOnce() -> T) -> (String, T) {
    TAKEN.take();
    let answer = call();
    assert_eq!(HELD.get(), 0, "held beyond the call");
    let letter = |(_, access)| if access == Access::Read { 'r' } else { 'w' };
    (TAKEN.take().into_iter().map(letter).collect(), answer)
}

#[test]
fn memory_is_zero_when_it_is_new_and_aligned() {
    let pools = [Pool::default(), Pool::paged(Paging { pager: unlimited(), from: 1 })];
    for pool in pools.map(Arc::new) {
        for bytes in [0, 1, 1000, PAGE, PAGE + 1] {
            let (mut memory, holds) = (pool.take(bytes).unwrap(), Holds::default());
            let all = memory.bytes(0..bytes, &holds).unwrap();
            assert!(all.len() == bytes && all.iter().all(|byte| *byte == 0));
            assert_eq!(all.as_ptr() as usize % ALIGN, 0);
            memory.bytes_mut(bytes / 2..bytes, &holds).unwrap().fill(7);
            let mut host = memory.host_bytes().unwrap();
            assert!(host.iter().enumerate().all(|(i, byte)| *byte == if i < bytes / 2 { 0 } else { 7 }));
            host.fill(9);
            drop(host);
            assert!(memory.bytes(0..bytes, &holds).unwrap().iter().all(|byte| *byte == 9));
            drop(memory);
            pool.trim();
        }
    }
}

#[test]
fn a_kernel_holds_each_of_its_tensors_while_it_runs_and_none_after() {
    let paged = paged_from(1);
    let b: &dyn Backend = &paged;
    let random = |n: usize| b.upload(&(0..n).map(|i| (i % 17) as f32 - 8.0).collect::<Vec<_>>()).unwrap();
    let p = Linear { tokens: 3, inputs: 64, outputs: 5, compute: Compute::F32 };
    let (x, w, mut y) = (random(3 * 64), random(5 * 64), random(3 * 5));

    assert_eq!(holds(|| b.write(&[0; 4 * 15], y.view_mut())).0, "w");
    assert_eq!(holds(|| b.read(y.view(), &mut [0; 4 * 15])).0, "r");
    assert_eq!(holds(|| b.fill(1.0, y.view_mut())).0, "w");
    assert_eq!(holds(|| b.sum_squares(y.view())).0, "r");
    let mut sum = random(64 * 5);
    assert_eq!(holds(|| b.add(w.view(), w.view(), sum.view_mut())).0, "rrw");

    let q = Quantized::quantize(b, w.view(), [5, 64], Format::Nf4, 64, true).unwrap();
    let (a, lora_b, e, g) = (random(2 * 64), random(5 * 2), random(2), random(5));
    let low_rank = LowRank {
        rank: 2,
        a: a.view(),
        b: lora_b.view(),
        scale: 1.0,
        per_rank: Some(e.view()),
        row_scale: Some(g.view()),
        dropout: None,
    };
    let quantized = Weight::Quantized(&q);
    let (held, answer) = holds(|| b.linear(&p, x.view(), &quantized, Some(&low_rank), Some(g.view()), y.view_mut()));
    // x; codes, scale codes and nested absmax; a, b, e, g; bias; y.
    assert_eq!((held.as_str(), answer), ("rrrrrrrrrw", Ok(())));

    let mut grads = [random(5 * 64), random(5)];
    let [dw, d_bias] = &mut grads;
    let asked = LinearGrads { weight: Some(dw.view_mut()), bias: Some(d_bias.view_mut()), ..LinearGrads::default() };
    let dense = Weight::Dense(w.view());
    let (held, answer) = holds(|| b.linear_grad_weight(&p, x.view(), y.view(), &dense, None, asked));
    // Not the weight, which only the gradient of g is formed of.
    assert_eq!((held.as_str(), answer), ("rrww", Ok(())));
}

#[test]
fn a_kernel_that_fails_holds_nothing_after() {
    let (paged, other) = (paged_from(1), rankfold_reference::ReferenceBackend::new());
    let b: &dyn Backend = &paged;
    let (x, other): (Buffer, &dyn Backend) = (b.filled(DType::F32, 6, 1.0).unwrap(), &other);
    let mut wrong = b.filled(DType::Bf16, 6, 0.0).unwrap();
    let mut foreign = other.filled(DType::F32, 6, 0.0).unwrap();
    let (held, answer) = holds(|| b.add(x.view(), x.view(), wrong.view_mut()));
    assert!(held == "rr" && matches!(answer, Err(Error::DType { tensor: "out", .. })), "{held} {answer:?}");
    let (held, answer) = holds(|| b.add(x.view(), x.view(), foreign.view_mut()));
    assert!(held == "rr" && answer == Err(Error::Foreign { backend: "cpu" }), "{held} {answer:?}");
    let (labels, mut losses) = (b.upload(&[1i64, 3]).unwrap(), b.filled(DType::F32, 2, 0.0).unwrap());
    let p = CrossEntropy { rows: 2, vocab: 3 };
    let (held, answer) = holds(|| b.cross_entropy(&p, x.view(), labels.view(), losses.view_mut()));
    assert!(held == "rrw" && answer.is_err(), "{held} {answer:?}");
}

#[test]
fn a_view_of_a_part_holds_that_part_alone() {
    let paged = paged_from(1);
    let b: &dyn Backend = &paged;
    let (x, mut y) = (b.filled(DType::F32, 4 * PAGE, 1.0).unwrap(), b.filled(DType::F32, 4 * PAGE, 0.0).unwrap());
    TAKEN.take();
    b.copy(x.slice(PAGE, 10).unwrap(), y.slice_mut(3 * PAGE, 10).unwrap()).unwrap();
    let part = |offset: usize| 4 * offset..4 * (offset + 10);
    assert_eq!(TAKEN.take(), [(part(PAGE), Access::Read), (part(3 * PAGE), Access::Write)]);
    b.copy(x.slice(5, 0).unwrap(), y.slice_mut(5, 0).unwrap()).unwrap();
    assert_eq!(TAKEN.take(), [], "nothing needs no hold");
}

#[test]
fn nothing_is_held_in_the_systems_memory() {
    for backend in [CpuBackend::new(Some(2)), paged_from(PAGE)] {
        let b: &dyn Backend = &backend;
        let mut x = b.filled(DType::U8, PAGE - 1, 1.0).unwrap();
        assert_eq!(holds(|| b.fill(2.0, x.view_mut())).0, "");
        assert_eq!(backend.memory().paged, 0);
    }
}
