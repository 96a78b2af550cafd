//! c_tj = or += Σ_i x_ti w_ji: R stored rows of the weight beside each other, LANES of i at a time.
//!
//! T·R vectors hold the sums while i runs through the whole row; a vector of the weight is loaded or decoded once and
//! multiplied with a vector of each of T rows of x, which lie in L1 or L2. At the end the lanes of a vector are summed
//! by halves. So an element is LANES chains of FMAs from 0 in the order of i, whatever T and R are. More rows than a
//! group read and decode the same rows of the weight again, from L1.

use super::{ALONE, GROUP, finish};
use crate::gemm::pack::{Elements, with_elements};
use crate::gemm::{Gemm, Output, Shared, Term};
use crate::simd::{Float, Kernel, Simd};
use std::ops::Range;

/// Elements of the weight in a task: some ten microseconds of work.
const TASK: usize = 1 << 16;

impl Gemm<'_> {
    /// [`Gemm::product`] where every right operand is stored as [n, k] and rows are few.
    pub(super) fn dots(&self, terms: &[Term], output: Output) {
        let depth: usize = terms.iter().map(|term| term.k).sum();
        let width = (TASK / depth.max(1)).max(1).next_multiple_of(16);
        let c = Shared(output.c.as_mut_ptr());
        let task = |task: usize| {
            let columns = task * width..output.columns.min((task + 1) * width);
            self.isa.run(Dots { terms, output: &output, columns, c });
        };
        let tasks = output.columns.div_ceil(width);
        if depth * output.columns < ALONE { (0..tasks).for_each(task) } else { self.threads.run(tasks, task) }
    }
}

/// One task: some columns of c.
struct Dots<'a> {
    terms: &'a [Term<'a>],
    /// c itself apart, which tasks share.
    output: &'a Output<'a>,
    columns: Range<usize>,
    c: Shared,
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (i, term) in self.terms.iter().enumerate() {
            let keep = self.output.accumulate || i > 0;
            // SAFETY: `product` checked the operands' lengths; this task alone writes its columns of c.
            unsafe { with_elements!(S, term.right.data, elements => self.term::<S, _>(elements, term, keep)) }
        }
        for row in 0..self.output.rows {
            // SAFETY: this task's own part of the row.
            let c = unsafe {
                let start = self.c.0.add(row * self.output.columns + self.columns.start);
                std::slice::from_raw_parts_mut(start, self.columns.len())
            };
            finish(c, self.output, self.columns.clone());
        }
    }
}

impl Dots<'_> {
    /// c = or += one term.
    ///
    /// # Safety
    /// The machine has S; `elements` are those of the term's right operand; no other thread touches these columns.
    #[inline(always)]
    unsafe fn term<S: Simd, E: Elements<S>>(&self, elements: &E, term: &Term, keep: bool) {
        let Range { start, end } = self.columns.clone();
        for first in (start..end).step_by(4) {
            for row in (0..self.output.rows).step_by(GROUP) {
                // SAFETY: the caller's. As many sums at once as hide the latency of an FMA and leave registers for
                // decoding.
                unsafe {
                    match self.output.rows - row {
                        1 => self.block::<S, E, 1, 4>(elements, term, row, first, keep),
                        2 => self.block::<S, E, 2, 4>(elements, term, row, first, keep),
                        _ => {
                            self.block::<S, E, GROUP, 2>(elements, term, row, first, keep);
                            self.block::<S, E, GROUP, 2>(elements, term, row, first + 2, keep);
                        }
                    }
                }
            }
        }
    }

    /// T rows of c from `row` on in R columns from `first` on; of both, those that exist.
    ///
    /// # Safety
    /// As [`Dots::term`].
    #[inline(always)]
    unsafe fn block<S: Simd, E: Elements<S>, const T: usize, const R: usize>(
        &self,
        elements: &E,
        term: &Term,
        row: usize,
        first: usize,
        keep: bool,
    ) {
        let (k, rows) = (term.k, T.min(self.output.rows - row));
        // The last row stands in for those that T is above their number: its sums are stored once.
        let mut xs = [term.left.data.as_ptr(); T];
        for (t, x) in xs.iter_mut().enumerate() {
            // SAFETY: a row of the left operand.
            *x = unsafe { x.add((row + t.min(rows - 1)) * k) };
        }
        let columns = first..self.columns.end.min(first + R);
        if columns.is_empty() {
            return;
        }
        // Where there are fewer than R columns the last stands in for the rest likewise.
        let mut starts = [0; R];
        for (r, start) in starts.iter_mut().enumerate() {
            *start = (first + r).min(columns.end - 1) * k;
        }
        let whole = if E::whole(k) { k / S::LANES * S::LANES } else { 0 };
        // SAFETY: vectors lie within their rows of both operands.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; T];
            let mut i = 0;
            while i < whole {
                let (mut factors, mut run) = ([S::splat(0.0); R], whole - i);
                for (factor, start) in factors.iter_mut().zip(starts) {
                    *factor = elements.factor(start + i);
                    run = run.min(elements.run(start + i));
                }
                for i in (i..i + run).step_by(S::LANES) {
                    let mut w = [S::splat(0.0); R];
                    for ((w, start), factor) in w.iter_mut().zip(starts).zip(factors) {
                        *w = elements.within(start + i, factor);
                    }
                    for (sums, x) in sums.iter_mut().zip(xs) {
                        let x = S::load(x.add(i));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = S::fma(x, w, *sum);
                        }
                    }
                }
                i += run;
            }
            for i in (whole..k).step_by(S::LANES) {
                let n = S::LANES.min(k - i);
                let mut w = [S::splat(0.0); R];
                for (w, start) in w.iter_mut().zip(starts) {
                    *w = elements.vector(start + i, n);
                }
                for (sums, x) in sums.iter_mut().zip(xs) {
                    let x = f32::load_part::<S>(x.add(i), n);
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = S::fma(x, w, *sum);
                    }
                }
            }
            for (t, sums) in sums.into_iter().take(rows).enumerate() {
                for (column, sum) in columns.clone().zip(sums) {
                    let c = self.c.0.add((row + t) * self.output.columns + column);
                    *c = if keep { *c + S::sum(sum) } else { S::sum(sum) };
                }
            }
        }
    }
}
