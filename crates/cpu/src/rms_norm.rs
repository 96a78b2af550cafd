//! Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4).
//!
//! y_i = gain_i · x_i / ρ,   ρ = √(mean(x²) + ε)
//!
//! x, y [rows, width]; gain [width]; saved for backward: x, and 1/ρ of every row. Sums over a row are formed in f64:
//! the kernels are bound by memory, and a row's scale is shared by all its elements.

use crate::elementwise::{AddInPlace, CHUNK, Dot};
use crate::scratch;
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::RmsNorm;

/// Rows of a task.
fn rows_a_task(p: &RmsNorm) -> usize {
    (CHUNK / p.width.max(1)).max(1)
}

/// y and 1/ρ.
pub(crate) fn rms_norm(
    threads: &Threads,
    isa: Isa,
    p: &RmsNorm,
    x: &[f32],
    gain: &[f32],
    y: &mut [f32],
    inv_rms: &mut [f32],
) {
    let (y, inv_rms) = (Disjoint::new(y), Disjoint::new(inv_rms));
    threads.run_chunks(p.rows, rows_a_task(p), |rows| {
        let elements = rows.start * p.width..rows.end * p.width;
        // SAFETY: the rows of two tasks do not overlap.
        let (y, inv_rms) = unsafe { (y.get(elements.clone()), inv_rms.get(rows)) };
        isa.run(Forward { p, x: &x[elements], gain, y, inv_rms });
    });
}

struct Forward<'a> {
    p: &'a RmsNorm,
    x: &'a [f32],
    gain: &'a [f32],
    y: &'a mut [f32],
    inv_rms: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.p.width;
        for (row, inv_rms) in self.inv_rms.iter_mut().enumerate() {
            let row = row * width..(row + 1) * width;
            let (x, y, gain) = (&self.x[row.clone()], &mut self.y[row], &self.gain[..width]);
            // SAFETY: the caller's machine has S.
            let squares = unsafe { Dot(x, x).run::<S>() };
            let inverse = (1.0 / (squares / width as f64 + self.p.eps).sqrt()) as f32;
            for i in 0..width {
                y[i] = gain[i] * x[i] * inverse;
            }
            *inv_rms = inverse;
        }
    }
}

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) gain: &'a [f32],
    pub(crate) inv_rms: &'a [f32],
    pub(crate) dy: &'a [f32],
}

/// dx_i = (gain_i dy_i − x_i c) / ρ,   c = Σ_j gain_j x_j dy_j / (width·ρ²);   dgain_i += Σ_rows dy_i x_i / ρ
///
/// From ∂y_j/∂x_i = gain_j (δ_ij / ρ − x_j/ρ² · ∂ρ/∂x_i) and ∂ρ/∂x_i = x_i / (width·ρ): every element pulls on ρ,
/// and through it on every output; summed over j that pull is x_i c / ρ. Each task sums its rows' part of dgain, and
/// the parts are added in the order of the tasks.
pub(crate) fn rms_norm_grad(
    threads: &Threads,
    isa: Isa,
    p: &RmsNorm,
    saved: Saved,
    accumulate: bool,
    dx: Option<&mut [f32]>,
    dgain: Option<&mut [f32]>,
) {
    let (rows_a_task, width) = (rows_a_task(p), p.width);
    let parts = if dgain.is_some() { p.rows.div_ceil(rows_a_task) * width } else { 0 };
    let dx = dx.map(Disjoint::new);
    scratch::with(parts, |parts| {
        let all = Disjoint::new(&mut *parts);
        threads.run_chunks(p.rows, rows_a_task, |rows| {
            let elements = rows.start * width..rows.end * width;
            let part = rows.start / rows_a_task * width;
            // SAFETY: the rows of two tasks do not overlap, nor do their parts of dgain.
            let (dx, dgain) = unsafe {
                (dx.map(|dx| dx.get(elements.clone())), dgain.is_some().then(|| all.get(part..part + width)))
            };
            let (x, dy, inv_rms) = (&saved.x[elements.clone()], &saved.dy[elements], &saved.inv_rms[rows]);
            isa.run(Backward { width, saved: Saved { x, dy, inv_rms, ..saved }, accumulate, dx, dgain });
        });
        if let Some(dgain) = dgain {
            for x in parts.chunks(width.max(1)) {
                isa.run(AddInPlace { x, out: dgain });
            }
        }
    });
}

struct Backward<'a> {
    width: usize,
    saved: Saved<'a>,
    accumulate: bool,
    dx: Option<&'a mut [f32]>,
    dgain: Option<&'a mut [f32]>,
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let (width, gain) = (self.width, &self.saved.gain[..self.width]);
        if let Some(dgain) = &mut self.dgain {
            dgain.fill(0.0);
        }
        for (row, &inverse) in self.saved.inv_rms.iter().enumerate() {
            let row = row * width..(row + 1) * width;
            let (x, dy) = (&self.saved.x[row.clone()], &self.saved.dy[row.clone()]);
            if let Some(dx) = &mut self.dx {
                let dx = &mut dx[row];
                let c = (pull(gain, x, dy) * f64::from(inverse) * f64::from(inverse) / width as f64) as f32;
                if self.accumulate {
                    for i in 0..width {
                        dx[i] += (gain[i] * dy[i] - x[i] * c) * inverse;
                    }
                } else {
                    for i in 0..width {
                        dx[i] = (gain[i] * dy[i] - x[i] * c) * inverse;
                    }
                }
            }
            if let Some(dgain) = &mut self.dgain {
                let dgain = &mut dgain[..width];
                for i in 0..width {
                    dgain[i] += dy[i] * x[i] * inverse;
                }
            }
        }
    }
}

/// Σ_j gain_j x_j dy_j, in sixteen partial sums.
#[inline(always)]
fn pull(gain: &[f32], x: &[f32], dy: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let term = |j: usize| f64::from(gain[j]) * f64::from(x[j]) * f64::from(dy[j]);
    let whole = x.len() / 16 * 16;
    for j in (0..whole).step_by(16) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += term(j + i);
        }
    }
    for (sum, j) in sums.iter_mut().zip(whole..x.len()) {
        *sum += term(j);
    }
    sums.into_iter().sum()
}
