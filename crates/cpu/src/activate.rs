//! The pointwise non-linearities of bottleneck adapters (Houlsby et al. 2019, §2.1) and of prefix tuning's
//! reparametrisation (Li & Liang 2021, §4.3): relu, silu(x) = x·σ(x), tanh.
//!
//! What is NaN in x is NaN in y and dx.

use crate::elementwise::CHUNK;
use crate::simd::{Float, Isa, Kernel, Simd, exp, sigmoid, tanh};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Activation;

/// y = f(x)
pub(crate) fn activate(threads: &Threads, isa: Isa, f: Activation, x: &[f32], y: &mut [f32]) {
    let (len, y) = (y.len(), Disjoint::new(y));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Forward { f, x: &x[range.clone()], y: unsafe { y.get(range) } });
    });
}

struct Forward<'a> {
    f: Activation,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { f, x, y } = self;
        // SAFETY: the caller's machine has S.
        unsafe {
            match f {
                Activation::Relu => y.iter_mut().zip(x).for_each(|(y, &x)| *y = if x <= 0.0 { 0.0 } else { x }),
                Activation::Silu => map::<S, 1>([x], y, |[x]| S::mul(x, sigmoid::<S>(x))),
                Activation::Tanh => map::<S, 1>([x], y, |[x]| tanh::<S>(x)),
            }
        }
    }
}

/// dx = dy · f'(x)
pub(crate) fn activate_grad(threads: &Threads, isa: Isa, f: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let (len, dx) = (dx.len(), Disjoint::new(dx));
    threads.run_chunks(len, CHUNK, |range| {
        let (x, dy) = (&x[range.clone()], &dy[range.clone()]);
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Backward { f, x, dy, dx: unsafe { dx.get(range) } });
    });
}

struct Backward<'a> {
    f: Activation,
    x: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
}

/// relu': 1 above 0, 0 at 0 and below. silu' = σ(1 + x(1 − σ)), from σ' = σ(1 − σ).
///
/// tanh' = 1 − tanh² = 1/cosh² = 4e/(1 + e)² with e = e^−2|x|, since cosh x = (1 + e)/2 · e^|x|: no difference of two
/// numbers near 1.
impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { f, x, dy, dx } = self;
        // SAFETY: the caller's machine has S.
        unsafe {
            let one = S::splat(1.0);
            match f {
                Activation::Relu => dx.iter_mut().zip(x.iter().zip(dy)).for_each(|(dx, (&x, dy))| {
                    let slope = if x <= 0.0 { 0.0 } else { x };
                    *dx = dy * if x > 0.0 { 1.0 } else { slope };
                }),
                Activation::Silu => map::<S, 2>([x, dy], dx, |[x, dy]| {
                    let sigma = sigmoid::<S>(x);
                    S::mul(dy, S::mul(sigma, S::add(one, S::mul(x, S::sub(one, sigma)))))
                }),
                Activation::Tanh => map::<S, 2>([x, dy], dx, |[x, dy]| {
                    let e = exp::<S>(S::mul(S::splat(-2.0), S::abs(x)));
                    let twice_cosh = S::add(one, e);
                    S::mul(dy, S::div(S::mul(S::splat(4.0), e), S::mul(twice_cosh, twice_cosh)))
                }),
            }
        }
    }
}

/// out_i = f(inputs_i)
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn map<S: Simd, const N: usize>(inputs: [&[f32]; N], out: &mut [f32], f: impl Fn([S::V; N]) -> S::V) {
    let len = out.len();
    assert!(inputs.iter().all(|x| x.len() == len));
    for i in (0..len).step_by(S::LANES) {
        let n = S::LANES.min(len - i);
        // SAFETY: elements i … i + n − 1 of all.
        unsafe {
            let inputs = inputs.map(|x| f32::load_part::<S>(x.as_ptr().add(i), n));
            f32::store_part::<S>(out.as_mut_ptr().add(i), f(inputs), n);
        }
    }
}
