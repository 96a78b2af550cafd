//! The Euclidean norm of every row: ‖W + sBA‖ of DoRA (Liu et al. 2024, eq. 5).
//!
//! norms_r = √(Σ_j x_rj²)
//!
//! The squares are summed in f64, where none of an f32 overflows or is lost to 0: the kernel is bound by memory.

use crate::elementwise::{CHUNK, Dot};
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Rows;

/// Rows of a task of any kernel that works row by row.
pub(crate) fn rows_a_task(p: &Rows) -> usize {
    (CHUNK / p.width.max(1)).max(1)
}

/// The norm of every row.
pub(crate) fn row_norms(threads: &Threads, isa: Isa, p: &Rows, x: &[f32], norms: &mut [f32]) {
    let norms = Disjoint::new(norms);
    threads.run_chunks(p.rows, rows_a_task(p), |rows| {
        let x = &x[rows.start * p.width..rows.end * p.width];
        // SAFETY: the rows of two tasks do not overlap.
        isa.run(Norms { width: p.width, x, norms: unsafe { norms.get(rows) } });
    });
}

struct Norms<'a> {
    width: usize,
    x: &'a [f32],
    norms: &'a mut [f32],
}

impl Kernel for Norms<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (row, norm) in self.norms.iter_mut().enumerate() {
            let x = &self.x[row * self.width..(row + 1) * self.width];
            // SAFETY: the caller's machine has S.
            *norm = unsafe { Dot(x, x).run::<S>() }.sqrt() as f32;
        }
    }
}
