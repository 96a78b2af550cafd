//! What is done around the products: scaling by rows and columns, sums of columns, dropout of the low-rank input.
//!
//! Each touches every element once and is bound by memory; the loops are plain and left to the compiler, inside
//! functions compiled for the machine.

use crate::dropout;
use crate::elementwise::{self, CHUNK};
use crate::gemm::Gemm;
use crate::scratch;
use crate::simd::{Kernel, Simd};
use crate::threads::Disjoint;
use rankfold_backend::params::Dropout;

/// Columns a task.
const COLUMNS: usize = 64;

/// out = rows of x scaled by g, x [g.len(), width].
pub(super) fn scale_rows(x: &[f32], g: &[f32], width: usize, out: &mut [f32]) {
    for ((out, x), g) in out.chunks_exact_mut(width.max(1)).zip(x.chunks_exact(width.max(1))).zip(g) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = g * x);
    }
}

/// x [.., scales.len()] ← x · scales, column by column.
pub(super) fn scale_columns_in_place(x: &mut [f32], scales: &[f32]) {
    for row in x.chunks_exact_mut(scales.len().max(1)) {
        row.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
    }
}

impl Gemm<'_> {
    /// `f` on x·(g + shift), column by column; on x itself where there is no g.
    pub(super) fn with_column_scaled(&self, g: Option<(&[f32], f32)>, x: &[f32], f: impl FnOnce(&[f32])) {
        let Some((g, shift)) = g else { return f(x) };
        scratch::with(x.len(), |scaled| {
            if !g.is_empty() {
                let parts = Disjoint::new(scaled);
                let rows = CHUNK.div_ceil(g.len());
                self.threads.run_chunks(x.len(), rows * g.len(), |range| {
                    // SAFETY: chunks do not overlap.
                    let out = unsafe { parts.get(range.clone()) };
                    for (out, x) in out.chunks_exact_mut(g.len()).zip(x[range].chunks_exact(g.len())) {
                        out.iter_mut().zip(x).zip(g).for_each(|((out, x), g)| *out = x * (g + shift));
                    }
                });
            }
            f(scaled);
        });
    }

    /// `f` on dropout(x); on x itself where there is none.
    pub(super) fn with_dropped(&self, dropout: Option<Dropout>, x: &[f32], f: impl FnOnce(&[f32])) {
        let Some(dropout) = dropout else { return f(x) };
        scratch::with(x.len(), |dropped| {
            dropout::dropout(self.threads, self.isa, &dropout, x, dropped);
            f(dropped);
        });
    }

    /// out += dropout(x)
    pub(super) fn add_dropped(&self, dropout: Dropout, x: &[f32], out: &mut [f32]) {
        scratch::with(x.len(), |dropped| {
            dropout::dropout(self.threads, self.isa, &dropout, x, dropped);
            elementwise::add_in_place(self.threads, self.isa, dropped, out);
        });
    }

    /// out_j += Σ_t a_tj, or Σ_t a_tj b_tj: each column one sum in the order of t.
    pub(super) fn add_column_sums(&self, a: &[f32], b: Option<&[f32]>, out: &mut [f32]) {
        let width = out.len();
        let parts = Disjoint::new(out);
        self.threads.run_chunks(width, COLUMNS, |range| {
            let column = range.start;
            // SAFETY: chunks do not overlap.
            let out = unsafe { parts.get(range) };
            self.isa.run(ColumnSums { a, b, column, width, out });
        });
    }
}

/// Some columns of [`Gemm::add_column_sums`].
struct ColumnSums<'a> {
    a: &'a [f32],
    b: Option<&'a [f32]>,
    column: usize,
    width: usize,
    out: &'a mut [f32],
}

impl Kernel for ColumnSums<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut sums = [0.0; COLUMNS];
        let columns = self.column..self.column + self.out.len();
        for (t, a) in self.a.chunks_exact(self.width).enumerate() {
            let row = sums.iter_mut().zip(&a[columns.clone()]);
            match self.b {
                None => row.for_each(|(sum, a)| *sum += a),
                Some(b) => {
                    let b = &b[t * self.width..][columns.clone()];
                    row.zip(b).for_each(|((sum, a), b)| *sum += a * b);
                }
            }
        }
        self.out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}
