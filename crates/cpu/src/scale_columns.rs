//! A learned factor a column: the activations of (IA)³ (Liu et al. 2022, §3.3), y = l ∘ x.
//!
//! y_rj = x_rj · factors_j
//!
//! x, y [rows, width]; factors [width].

use crate::elementwise::AddInPlace;
use crate::row_norms::rows_a_task;
use crate::scratch;
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Rows;

/// y_rj = x_rj · factors_j
pub(crate) fn scale_columns(threads: &Threads, isa: Isa, p: &Rows, x: &[f32], factors: &[f32], y: &mut [f32]) {
    let y = Disjoint::new(y);
    by_rows(threads, p, |_, elements| {
        // SAFETY: the rows of two tasks do not overlap.
        isa.run(Scale { factors, x: &x[elements.clone()], accumulate: false, y: unsafe { y.get(elements) } });
    });
}

/// `task` on each task's number and elements.
fn by_rows(threads: &Threads, p: &Rows, task: impl Fn(usize, std::ops::Range<usize>) + Sync) {
    // Without columns there is nothing to do, however many rows there are.
    let (rows, rows_a_task) = (if p.width == 0 { 0 } else { p.rows }, rows_a_task(p));
    threads.run_chunks(rows, rows_a_task, |rows| {
        task(rows.start / rows_a_task, rows.start * p.width..rows.end * p.width);
    });
}

/// y = x · factors, row by row, or y += that.
struct Scale<'a> {
    factors: &'a [f32],
    x: &'a [f32],
    accumulate: bool,
    y: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.factors.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            let products = x.iter().zip(self.factors);
            if self.accumulate {
                y.iter_mut().zip(products).for_each(|(y, (x, factor))| *y += x * factor);
            } else {
                y.iter_mut().zip(products).for_each(|(y, (x, factor))| *y = x * factor);
            }
        }
    }
}

/// dx_rj = dy_rj · factors_j;   dfactors_j += Σ_r dy_rj x_rj
///
/// y_rj is a product of two numbers, and each one's derivative is the other; factors_j is in every row. Each task sums
/// its rows' part of dfactors, and the parts are added in the order of the tasks.
pub(crate) fn scale_columns_grad(
    threads: &Threads,
    isa: Isa,
    p: &Rows,
    [x, factors, dy]: [&[f32]; 3],
    accumulate: bool,
    dx: Option<&mut [f32]>,
    dfactors: Option<&mut [f32]>,
) {
    if let Some(dx) = dx.map(Disjoint::new) {
        by_rows(threads, p, |_, elements| {
            // SAFETY: the rows of two tasks do not overlap.
            isa.run(Scale { factors, x: &dy[elements.clone()], accumulate, y: unsafe { dx.get(elements) } });
        });
    }
    let (Some(dfactors), 1..) = (dfactors, p.width) else { return };
    scratch::with(p.rows.div_ceil(rows_a_task(p)) * p.width, |parts| {
        let all = Disjoint::new(&mut *parts);
        by_rows(threads, p, |task, elements| {
            // SAFETY: each task has a part of its own.
            let part = unsafe { all.get(task * p.width..(task + 1) * p.width) };
            isa.run(SumProducts { a: &dy[elements.clone()], b: &x[elements], part });
        });
        parts.chunks(p.width).for_each(|x| isa.run(AddInPlace { x, out: dfactors }));
    });
}

/// part_j = Σ_r a_rj b_rj
pub(crate) struct SumProducts<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) part: &'a mut [f32],
}

impl Kernel for SumProducts<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.part.fill(0.0);
        let width = self.part.len();
        for (a, b) in self.a.chunks_exact(width).zip(self.b.chunks_exact(width)) {
            self.part.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
        }
    }
}
