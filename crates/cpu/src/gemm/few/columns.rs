//! c_tj = or += Σ_i x_ti w_ij: stored rows of the weight, each times an element of x, added to sums that stay in the
//! core's caches.
//!
//! ```text
//! for k, SEGMENTS at a time
//!   tasks: DEPTH units of k by STRETCH columns, on all threads
//!     for rows of the weight, ROWS units at a time: sums[task] += Σ x w      (sums in L1 or L2)
//!   tasks: columns of c: c += the sums of DEPTH after DEPTH            (a hundredth of the weight's bytes)
//! ```
//!
//! A task so reads long stretches of a few rows beside each other, which is how memory is read fastest. Its sums start
//! from 0 at every DEPTH of k and are added to c in the order of k: the order, and the bits, of the GEMM in registers.

use super::{ALONE, GROUP, Rows, finish, roomy};
use crate::gemm::micro::{Geometry, Micro, Product};
use crate::gemm::pack::{Elements, with_elements};
use crate::gemm::plan::{self, Segment};
use crate::gemm::unit::Unit;
use crate::gemm::{Gemm, Output, Shared, Term};
use crate::scratch;
use crate::simd::{Float, Kernel, Simd};
use std::ops::Range;

/// Segments of k whose sums are held at a time.
const SEGMENTS: usize = 16;

/// Units of rows of the weight at a time.
const ROWS: usize = 4;

/// Columns of a task, at most: a page of f32 and more, so that rows are read in long runs.
const STRETCH: usize = 4096;

/// Columns between two requests for memory ahead.
const STEP: usize = 64;

/// Columns of c to which a task adds the sums.
const ADDED: usize = 1024;

/// Tasks of one segment's columns, at least as many as keep a few threads busy where k is short.
fn width(segments: usize, columns: usize) -> usize {
    let parts = (8 / segments.max(1)).max(columns.div_ceil(STRETCH)).max(1);
    // Every task starts where the lookups of whole vectors do.
    columns.div_ceil(parts).next_multiple_of(64)
}

impl Gemm<'_> {
    /// [`Gemm::product`] where every right operand is stored as [k, n] and rows are few.
    pub(super) fn columns(&self, geometry: Geometry, terms: &[Term], lefts: &[Rows], output: Output) {
        let (rows, columns) = (output.rows, output.columns);
        let mut segments = Vec::new();
        for (term, &left) in terms.iter().zip(lefts) {
            let of_term = plan::segments(std::slice::from_ref(term), rows, columns, geometry);
            segments.extend(of_term.into_iter().map(|segment| (segment, left)));
        }
        let width = width(segments.len(), columns);
        let tasks = columns.div_ceil(width);
        let elements: usize = terms.iter().map(|term| term.k * columns).sum();
        let run = |tasks: usize, task: &(dyn Fn(usize) + Sync)| {
            if elements < ALONE { (0..tasks).for_each(task) } else { self.threads.run(tasks, task) }
        };
        let c = Shared(output.c.as_mut_ptr());
        // Whole groups (fewer variants to compile); the sums beyond c's rows stay 0.
        let held = rows.next_multiple_of(GROUP);
        let mut done = 0;
        loop {
            let group = &segments[done..segments.len().min(done + SEGMENTS)];
            let accumulate = output.accumulate || done > 0;
            done += group.len();
            let last = done == segments.len();
            scratch::with(group.len() * held * columns, |sums| {
                let sums = Shared(sums.as_mut_ptr());
                run(group.len() * tasks, &|task| {
                    let (segment, part) = (task / tasks, task % tasks);
                    let part = part * width..columns.min((part + 1) * width);
                    // SAFETY: the segment's own rows of sums.
                    let sums = unsafe { sums.at(segment * held * columns) };
                    let (segment, left) = &group[segment];
                    self.run(AddRows { segment, left: *left, rows, columns, part, sums });
                });
                run(columns.div_ceil(ADDED), &|task| {
                    let part = task * ADDED..columns.min((task + 1) * ADDED);
                    self.isa.run(AddSums {
                        output: &output,
                        c,
                        segments: group.len(),
                        held,
                        sums,
                        part,
                        accumulate,
                        last,
                    });
                });
            });
            if last {
                return;
            }
        }
    }
}

/// One task: the sums of a segment, in some columns.
struct AddRows<'a> {
    segment: &'a Segment<'a>,
    left: Rows,
    /// Rows and columns of c; the sums have as many columns, and rows up to whole groups.
    rows: usize,
    columns: usize,
    part: Range<usize>,
    sums: Shared,
}

impl Product for AddRows<'_> {
    type Output = ();
    const IN_TILES: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        // SAFETY: `product` checked the operands' lengths; this task alone writes these columns of the sums.
        unsafe { with_elements!(S, self.segment.term.right.data, elements => self.from::<S, M::Unit, _>(elements)) }
    }
}

impl AddRows<'_> {
    #[inline(always)]
    unsafe fn from<S: Simd, U: Unit<S>, E: Elements<S>>(&self, elements: &E) {
        let Range { start, end } = self.segment.ks;
        // SAFETY: rows of the weight within the segment; this task's columns of the sums.
        unsafe {
            for row in 0..self.rows.next_multiple_of(GROUP) {
                let sums = self.sums.0.add(row * self.columns + self.part.start);
                std::slice::from_raw_parts_mut(sums, self.part.len()).fill(0.0);
            }
            let mut one_by_one = start;
            if const { roomy::<S>() } {
                one_by_one += (end - start) / (ROWS * U::K) * ROWS * U::K;
                for i in (start..one_by_one).step_by(ROWS * U::K) {
                    self.groups::<S, U, E, ROWS>(elements, i);
                }
            }
            for i in (one_by_one..end).step_by(U::K) {
                self.groups::<S, U, E, 1>(elements, i);
            }
        }
    }

    /// All rows of sums += the products of x and R units of rows of w from row i on.
    #[inline(always)]
    unsafe fn groups<S: Simd, U: Unit<S>, E: Elements<S>, const R: usize>(&self, elements: &E, i: usize) {
        for row in (0..self.rows).step_by(GROUP) {
            // SAFETY: the caller's.
            unsafe {
                match self.rows - row {
                    1 => self.add::<S, U, E, 1, R>(elements, row, i),
                    2 if const { roomy::<S>() } => self.add::<S, U, E, 2, R>(elements, row, i),
                    _ => self.add::<S, U, E, GROUP, R>(elements, row, i),
                }
            }
        }
    }

    /// T rows of them, from `row` on.
    #[inline(always)]
    unsafe fn add<S: Simd, U: Unit<S>, E: Elements<S>, const T: usize, const R: usize>(
        &self,
        elements: &E,
        row: usize,
        i: usize,
    ) {
        let (left, stride, len) = (self.left, self.segment.term.right.stride, self.part.len());
        // Rows of the weight in a unit: one fewer where k ends within it.
        let in_unit = U::K.min(self.segment.ks.end - i);
        let whole = if E::whole(stride) && in_unit == U::K { len / S::LANES * S::LANES } else { 0 };
        // The first element of row v of unit r.
        let start = |r: usize, v: usize| (i + r * U::K + v) * stride + self.part.start;
        // SAFETY: vectors lie within the columns, of their rows of the weight and of the sums.
        unsafe {
            let sums = self.sums.0.add(row * self.columns + self.part.start);
            let mut x = [[S::splat(0.0); T]; R];
            for (r, x) in x.iter_mut().enumerate() {
                for (t, x) in x.iter_mut().take(self.rows - row).enumerate() {
                    *x = S::splat(*left.units.add((row + t) * left.stride + i / U::K + r));
                }
            }
            let mut j = 0;
            while j < whole {
                let (mut factors, mut run) = ([[S::splat(0.0); 2]; R], STEP.min(whole - j));
                for (r, factors) in factors.iter_mut().enumerate() {
                    for (v, factor) in factors[..U::K].iter_mut().enumerate() {
                        *factor = elements.factor(start(r, v) + j);
                        run = run.min(elements.run(start(r, v) + j));
                        elements.prefetch(start(r + R, v) + j, STEP);
                    }
                }
                for j in (j..j + run).step_by(S::LANES) {
                    let mut sum = [S::splat(0.0); T];
                    for (t, sum) in sum.iter_mut().enumerate() {
                        *sum = S::load(sums.add(t * self.columns + j));
                    }
                    for (r, (x, factors)) in x.iter().zip(factors).enumerate() {
                        let mut w = [S::splat(0.0); 2];
                        for (v, w) in w[..U::K].iter_mut().enumerate() {
                            *w = elements.within(start(r, v) + j, factors[v]);
                        }
                        let w = U::across(w);
                        for (sum, x) in sum.iter_mut().zip(x) {
                            *sum = U::multiply_add(*x, w, *sum);
                        }
                    }
                    for (t, sum) in sum.into_iter().enumerate() {
                        S::store(sums.add(t * self.columns + j), sum);
                    }
                }
                j += run;
            }
            for j in (whole..len).step_by(S::LANES) {
                let n = S::LANES.min(len - j);
                for (r, x) in x.iter().enumerate() {
                    let mut w = [S::splat(0.0); 2];
                    for (v, w) in w[..in_unit].iter_mut().enumerate() {
                        *w = elements.vector(start(r, v) + j, n);
                    }
                    let w = U::across(w);
                    for (t, x) in x.iter().enumerate() {
                        let sum = sums.add(t * self.columns + j);
                        f32::store_part::<S>(sum, U::multiply_add(*x, w, f32::load_part::<S>(sum, n)), n);
                    }
                }
            }
        }
    }
}

/// One task: some columns of c and all sums of a group of segments.
struct AddSums<'a> {
    /// c itself apart, which tasks share.
    output: &'a Output<'a>,
    c: Shared,
    segments: usize,
    /// Rows of a segment's sums.
    held: usize,
    sums: Shared,
    part: Range<usize>,
    accumulate: bool,
    /// Whether nothing more is to be added.
    last: bool,
}

impl Kernel for AddSums<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Output { rows, columns, .. } = *self.output;
        for row in 0..rows {
            let at = |row: usize| row * columns + self.part.start;
            // SAFETY: this task's own part of the row, and of each segment's row of sums, which are complete.
            let (c, sums) = unsafe {
                let sums =
                    |s: usize| std::slice::from_raw_parts(self.sums.0.add(at(s * self.held + row)), self.part.len());
                (std::slice::from_raw_parts_mut(self.c.0.add(at(row)), self.part.len()), sums)
            };
            for segment in 0..self.segments {
                if self.accumulate || segment > 0 {
                    c.iter_mut().zip(sums(segment)).for_each(|(c, sum)| *c += sum);
                } else {
                    c.copy_from_slice(sums(segment));
                }
            }
            if self.segments == 0 && !self.accumulate {
                c.fill(0.0);
            }
            if self.last {
                finish(c, self.output, self.part.clone());
            }
        }
    }
}
