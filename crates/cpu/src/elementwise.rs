//! Kernels that treat every element alike: fill, copy, cast, scale, add, and Σ x².
//!
//! All of them are bound by memory. Their loops are plain Rust that the compiler vectorises for the instruction set
//! whose [`Isa::run`] they are inlined into; only conversions name vectors.

use crate::simd::{Float, Isa, Kernel, Simd};
use crate::slices::{Floats, FloatsMut};
use crate::threads::{Disjoint, Threads};

/// Elements of a task: long enough to be worth a thread, short enough to stay in a core's cache.
pub(crate) const CHUNK: usize = 1 << 14;

/// out_i = value
pub(crate) fn fill<T: Copy + Send + Sync>(threads: &Threads, value: T, out: &mut [T]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    // SAFETY: the ranges of two tasks do not overlap.
    threads.run_chunks(len, CHUNK, |range| unsafe { out.get(range) }.fill(value));
}

/// out = x
pub(crate) fn copy(threads: &Threads, x: &[u8], out: &mut [u8]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    // SAFETY: the ranges of two tasks do not overlap.
    threads.run_chunks(len, 4 * CHUNK, |range| unsafe { out.get(range.clone()) }.copy_from_slice(&x[range]));
}

/// out = x, rounded to nearest even.
pub(crate) fn cast(threads: &Threads, isa: Isa, x: Floats, out: FloatsMut) {
    match (x, out) {
        (Floats::F32(x), FloatsMut::F32(out)) => cast_all(threads, isa, x, out),
        (Floats::F32(x), FloatsMut::Bf16(out)) => cast_all(threads, isa, x, out),
        (Floats::F32(x), FloatsMut::F16(out)) => cast_all(threads, isa, x, out),
        (Floats::Bf16(x), FloatsMut::F32(out)) => cast_all(threads, isa, x, out),
        (Floats::Bf16(x), FloatsMut::Bf16(out)) => cast_all(threads, isa, x, out),
        (Floats::Bf16(x), FloatsMut::F16(out)) => cast_all(threads, isa, x, out),
        (Floats::F16(x), FloatsMut::F32(out)) => cast_all(threads, isa, x, out),
        (Floats::F16(x), FloatsMut::Bf16(out)) => cast_all(threads, isa, x, out),
        (Floats::F16(x), FloatsMut::F16(out)) => cast_all(threads, isa, x, out),
    }
}

fn cast_all<A: Float, B: Float>(threads: &Threads, isa: Isa, x: &[A], out: &mut [B]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Cast { x: &x[range.clone()], out: unsafe { out.get(range) } });
    });
}

/// out = x of one length.
struct Cast<'a, A, B> {
    x: &'a [A],
    out: &'a mut [B],
}

impl<A: Float, B: Float> Kernel for Cast<'_, A, B> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.x.len(), self.out.len());
        let (x, out, len) = (self.x.as_ptr(), self.out.as_mut_ptr(), self.x.len());
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: elements i … i + n − 1 of both.
            unsafe { B::store_part::<S>(out.add(i), A::load_part::<S>(x.add(i), n), n) }
        }
    }
}

/// x_i ← factor · x_i
pub(crate) fn scale_in_place(threads: &Threads, isa: Isa, factor: f32, x: &mut [f32]) {
    let (len, x) = (x.len(), Disjoint::new(x));
    // SAFETY: the ranges of two tasks do not overlap.
    threads.run_chunks(len, CHUNK, |range| isa.run(Scale(factor, unsafe { x.get(range) })));
}

struct Scale<'a>(f32, &'a mut [f32]);

impl Kernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.1.iter_mut().for_each(|x| *x *= self.0);
    }
}

/// out = a + b
pub(crate) fn add(threads: &Threads, isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Add(&a[range.clone()], &b[range.clone()], unsafe { out.get(range) }));
    });
}

struct Add<'a>(&'a [f32], &'a [f32], &'a mut [f32]);

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(a, b, out) = self;
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = a + b);
    }
}

/// out = a / b, 0 where b is
pub(crate) fn divide(threads: &Threads, isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Divide(&a[range.clone()], &b[range.clone()], unsafe { out.get(range) }));
    });
}

struct Divide<'a>(&'a [f32], &'a [f32], &'a mut [f32]);

impl Kernel for Divide<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(a, b, out) = self;
        let quotient = |a: f32, b: f32| if b == 0.0 { 0.0 } else { a / b };
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = quotient(*a, *b));
    }
}

/// out ← out + x
pub(crate) fn add_in_place(threads: &Threads, isa: Isa, x: &[f32], out: &mut [f32]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(AddInPlace { x: &x[range.clone()], out: unsafe { out.get(range) } });
    });
}

/// out ← out + x of one length.
pub(crate) struct AddInPlace<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for AddInPlace<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.out.iter_mut().zip(self.x).for_each(|(out, x)| *out += x);
    }
}

/// Σ x_i², in f64: chunk by chunk, chunks in order.
pub(crate) fn sum_squares(threads: &Threads, isa: Isa, x: &[f32]) -> f64 {
    let chunk = |i: usize| {
        let x = &x[i * CHUNK..x.len().min((i + 1) * CHUNK)];
        isa.run(Dot(x, x))
    };
    threads.map(x.len().div_ceil(CHUNK), chunk).into_iter().sum()
}

/// Σ a_i b_i of one length, in f64: sixteen partial sums.
pub(crate) struct Dot<'a>(pub(crate) &'a [f32], pub(crate) &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let mut sums = [0.0f64; 16];
        let (a, b) = (self.0.chunks_exact(16), self.1.chunks_exact(16));
        for (sum, (a, b)) in sums.iter_mut().zip(a.remainder().iter().zip(b.remainder())) {
            *sum = f64::from(*a) * f64::from(*b);
        }
        for (a, b) in a.zip(b) {
            for i in 0..16 {
                sums[i] += f64::from(a[i]) * f64::from(b[i]);
            }
        }
        sums.into_iter().sum()
    }
}
