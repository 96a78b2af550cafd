//! AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2).
//!
//! A block of 256 at a time, so that its moments in f32 are two arrays that stay in the nearest cache: decoded, moved
//! by the step of [`crate::adamw`], and encoded again with the search of [`crate::quantize8`], but for a v that is not
//! 0, whose least code is 1 (the contract says why). The step, the products and the maxima are vectors; the lookups of
//! values and of codes, two each an element, are what takes the time.

use crate::adamw::{Constants, Step};
use crate::quantize8::{Search, absmax};
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::DynamicMap;
use rankfold_backend::params::{AdamW, MOMENT_BLOCK};

/// Elements of a task: whole blocks.
const CHUNK: usize = 16 * MOMENT_BLOCK;

/// A moment, or a task's part of it.
pub(crate) struct Coded<'a> {
    pub(crate) codes: &'a mut [u8],
    /// A scale a block.
    pub(crate) absmax: &'a mut [f32],
}

/// One step, in place.
pub(crate) fn adamw_8bit(threads: &Threads, isa: Isa, p: &AdamW, grad: &[f32], param: &mut [f32], m: Coded, v: Coded) {
    let constants = Constants::new(p);
    let param = Disjoint::new(param);
    let moments = [m, v].map(|Coded { codes, absmax }| (Disjoint::new(codes), Disjoint::new(absmax)));
    threads.run_chunks(grad.len(), CHUNK, |range| {
        let blocks = range.start / MOMENT_BLOCK..range.end.div_ceil(MOMENT_BLOCK);
        // SAFETY: the ranges of two tasks do not overlap, and a task begins with a block: no two share a scale.
        let param = unsafe { param.get(range.clone()) };
        let [m, v] = moments.map(|(codes, absmax)| {
            // SAFETY: as above.
            let (codes, absmax) = unsafe { (codes.get(range.clone()), absmax.get(blocks.clone())) };
            Coded { codes, absmax }
        });
        isa.run(Blocks { constants, grad: &grad[range], param, m, v });
    });
}

/// A step of one task's blocks.
struct Blocks<'a> {
    constants: Constants,
    grad: &'a [f32],
    param: &'a mut [f32],
    m: Coded<'a>,
    v: Coded<'a>,
}

impl Kernel for Blocks<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { constants, grad, param, m, v } = self;
        let [signed, unsigned] = [DynamicMap::Signed, DynamicMap::Unsigned].map(|map| (map.values(), Search::of(map)));
        let (mut means, mut squares) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
        let steps = grad.chunks(MOMENT_BLOCK).zip(param.chunks_mut(MOMENT_BLOCK));
        let m = m.codes.chunks_mut(MOMENT_BLOCK).zip(m.absmax);
        let v = v.codes.chunks_mut(MOMENT_BLOCK).zip(v.absmax);
        for ((grad, param), ((m, m_absmax), (v, v_absmax))) in steps.zip(m.zip(v)) {
            let (means, squares) = (&mut means[..grad.len()], &mut squares[..grad.len()]);
            decode(signed.0, m, *m_absmax, means);
            decode(unsigned.0, v, *v_absmax, squares);
            // SAFETY: the caller's machine has S.
            unsafe { Step { constants, grad, state: [param, means, squares] }.run::<S>() };
            (*m_absmax, *v_absmax) = (absmax(means), absmax(squares));
            signed.1.encode(means, *m_absmax, m);
            unsigned.1.encode(squares, *v_absmax, v);
            for (code, square) in v.iter_mut().zip(squares) {
                *code = (*code).max(u8::from(*square > 0.0));
            }
        }
    }
}

/// out_i = values[code_i] · absmax
#[inline(always)]
fn decode(values: &[f32; 256], codes: &[u8], absmax: f32, out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = values[usize::from(*code)] * absmax;
    }
}
