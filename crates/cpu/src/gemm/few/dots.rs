//! c_tj = or += Σ_i x_ti w_ji: R stored rows of the weight beside each other, LANES units of i at a time.
//!
//! T·R vectors hold the sums while i runs through the whole row; a vector of the weight is loaded or decoded once and
//! multiplied with a vector of each of T rows of x, which lie in L1 or L2. At the end the lanes of a vector are summed
//! by halves. So an element is LANES chains of multiply-adds from 0 in the order of i, whatever T and R are. More rows
//! than a group read and decode the same rows of the weight again, from L1.

use super::{ALONE, GROUP, Rows, finish, roomy};
use crate::gemm::micro::{Micro, Product};
use crate::gemm::pack::{Elements, along_anywhere, along_within, factors, with_elements};
use crate::gemm::unit::Unit;
use crate::gemm::{Gemm, Output, Shared, Term};
use crate::simd::{Float, Simd};
use std::ops::Range;

/// Elements of the weight in a task: some ten microseconds of work.
const TASK: usize = 1 << 16;

impl Gemm<'_> {
    /// [`Gemm::product`] where every right operand is stored as [n, k] and rows are few.
    pub(super) fn dots(&self, terms: &[Term], lefts: &[Rows], output: Output) {
        let depth: usize = terms.iter().map(|term| term.k).sum();
        let width = (TASK / depth.max(1)).max(1).next_multiple_of(16);
        let c = Shared(output.c.as_mut_ptr());
        let task = |task: usize| {
            let columns = task * width..output.columns.min((task + 1) * width);
            self.run(Dots { terms, lefts, output: &output, columns, c });
        };
        let tasks = output.columns.div_ceil(width);
        if depth * output.columns < ALONE { (0..tasks).for_each(task) } else { self.threads.run(tasks, task) }
    }
}

/// One task: some columns of c.
struct Dots<'a> {
    terms: &'a [Term<'a>],
    lefts: &'a [Rows],
    /// c itself apart, which tasks share.
    output: &'a Output<'a>,
    columns: Range<usize>,
    c: Shared,
}

impl Product for Dots<'_> {
    type Output = ();
    const IN_TILES: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        for (i, (term, left)) in self.terms.iter().zip(self.lefts).enumerate() {
            let (k, keep) = (term.k, self.output.accumulate || i > 0);
            // SAFETY: `product` checked the operands' lengths; this task alone writes its columns of c.
            unsafe {
                with_elements!(S, term.right.data, elements => self.term::<S, M::Unit, _>(elements, left, k, keep))
            }
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
    unsafe fn term<S: Simd, U: Unit<S>, E: Elements<S>>(&self, elements: &E, left: &Rows, k: usize, keep: bool) {
        let Range { start, end } = self.columns.clone();
        for first in (start..end).step_by(4) {
            for row in (0..self.output.rows).step_by(GROUP) {
                // SAFETY: the caller's. As many sums at once as hide the latency of an FMA and leave registers for
                // decoding.
                unsafe {
                    match self.output.rows - row {
                        1 => self.block::<S, U, E, 1, 4>(elements, left, k, row, first, keep),
                        2 if const { roomy::<S>() } => self.block::<S, U, E, 2, 4>(elements, left, k, row, first, keep),
                        _ => {
                            self.block::<S, U, E, GROUP, 2>(elements, left, k, row, first, keep);
                            self.block::<S, U, E, GROUP, 2>(elements, left, k, row, first + 2, keep);
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
    unsafe fn block<S: Simd, U: Unit<S>, E: Elements<S>, const T: usize, const R: usize>(
        &self,
        elements: &E,
        left: &Rows,
        k: usize,
        row: usize,
        first: usize,
        keep: bool,
    ) {
        let (step, rows) = (U::K * S::LANES, T.min(self.output.rows - row));
        // The last row stands in for those that T is above their number: its sums are stored once.
        let mut xs = [left.units; T];
        for (t, x) in xs.iter_mut().enumerate() {
            // SAFETY: a row of the left operand.
            *x = unsafe { x.add((row + t.min(rows - 1)) * left.stride) };
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
        let whole = if E::whole(k) { k / step * step } else { 0 };
        // SAFETY: vectors lie within their rows of both operands.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; T];
            let mut i = 0;
            while i < whole {
                let (mut of_rows, mut steps) = ([[S::splat(0.0); 2]; R], (whole - i) / step);
                for (of_row, start) in of_rows.iter_mut().zip(starts) {
                    let (factors, hold) = factors::<S, U>(elements, start + i);
                    (*of_row, steps) = (factors, steps.min(hold));
                }
                for i in (i..i + steps * step).step_by(step) {
                    let mut w = [S::splat(0.0); R];
                    for ((w, start), factors) in w.iter_mut().zip(starts).zip(of_rows) {
                        *w = along_within::<S, U>(elements, start + i, factors);
                    }
                    for (sums, x) in sums.iter_mut().zip(xs) {
                        let x = S::load(x.add(i / U::K));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = U::multiply_add(x, w, *sum);
                        }
                    }
                }
                i += steps * step;
            }
            for i in (whole..k).step_by(step) {
                let n = step.min(k - i);
                let mut w = [S::splat(0.0); R];
                for (w, start) in w.iter_mut().zip(starts) {
                    *w = along_anywhere::<S, U>(elements, start + i, n);
                }
                for (sums, x) in sums.iter_mut().zip(xs) {
                    let x = f32::load_part::<S>(x.add(i / U::K), n.div_ceil(U::K));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = U::multiply_add(x, w, *sum);
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
