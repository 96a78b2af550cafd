//! AdaLoRA's importance of a triplet (Zhang et al. 2023, eq. 8–10): smoothed sensitivity times its uncertainty.
//!
//! With I = |w · g|, g = grad_scale·grad:
//!   mean ← β1 mean + (1 − β1) I,   deviation ← β2 deviation + (1 − β2) |I − mean|
//!   scores_i = the mean over triplet i's elements of mean · deviation
//!
//! Each task takes whole rows. Where the triplets are rows their sums are formed in f64; where they are columns each
//! task sums its rows' part of every column, and the parts are added in the order of the tasks.

use crate::elementwise::{AddInPlace, Dot};
use crate::row_norms::rows_a_task;
use crate::scale_columns::SumProducts;
use crate::scratch;
use crate::simd::{Float, Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::{Importance, Rows, Triplets};

/// One step of both averages, in place, and the scores of what they then are.
pub(crate) fn importance(
    threads: &Threads,
    isa: Isa,
    p: &Importance,
    [weight, grad]: [&[f32]; 2],
    [mean, deviation]: [&mut [f32]; 2],
    scores: &mut [f32],
) {
    let state = [mean, deviation].map(Disjoint::new);
    let (width, rows_a_task) = (p.width, rows_a_task(&Rows { rows: p.rows, width: p.width }));
    // Without columns there is nothing to do, however many rows there are.
    let rows = if width == 0 { 0 } else { p.rows };
    let parts = if p.triplets == Triplets::Columns { rows.div_ceil(rows_a_task) * width } else { 0 };
    scratch::with(parts, |parts| {
        let (all_parts, all_scores) = (Disjoint::new(&mut *parts), Disjoint::new(&mut *scores));
        threads.run_chunks(rows, rows_a_task, |rows| {
            let elements = rows.start * width..rows.end * width;
            let part = rows.start / rows_a_task * width;
            // SAFETY: the rows of two tasks do not overlap, nor do their parts of the sums.
            let [mean, deviation] = state.each_ref().map(|all| unsafe { all.get(elements.clone()) });
            let averages = [&mut *mean, &mut *deviation];
            isa.run(Step { p, weight: &weight[elements.clone()], grad: &grad[elements], averages });
            match p.triplets {
                // SAFETY: as above.
                Triplets::Rows => isa.run(RowMeans { a: mean, b: deviation, means: unsafe { all_scores.get(rows) } }),
                Triplets::Columns => {
                    // SAFETY: as above.
                    let part = unsafe { all_parts.get(part..part + width) };
                    isa.run(SumProducts { a: mean, b: deviation, part });
                }
            }
        });
        if p.triplets == Triplets::Columns {
            scores.fill(0.0);
            parts.chunks(width.max(1)).for_each(|x| isa.run(AddInPlace { x, out: scores }));
            scores.iter_mut().for_each(|sum| *sum /= p.rows as f32);
        }
    });
}

/// Both averages of one task's elements.
struct Step<'a> {
    p: &'a Importance,
    weight: &'a [f32],
    grad: &'a [f32],
    /// mean, deviation
    averages: [&'a mut [f32]; 2],
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (p, len, [means, deviations]) = (self.p, self.weight.len(), self.averages);
        assert!([self.grad.len(), means.len(), deviations.len()] == [len; 3]);
        let [beta1, beta2, scale] = [p.beta1, p.beta2, p.grad_scale].map(|x| x as f32);
        let [rest1, rest2] = [p.beta1, p.beta2].map(|beta| (1.0 - beta) as f32);
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: elements i … i + n − 1 of all four.
            unsafe {
                let (mean, deviation) = (means.as_mut_ptr().add(i), deviations.as_mut_ptr().add(i));
                let weight = f32::load_part::<S>(self.weight.as_ptr().add(i), n);
                let grad = S::mul(f32::load_part::<S>(self.grad.as_ptr().add(i), n), S::splat(scale));
                let sensitivity = S::abs(S::mul(weight, grad));
                let average = |old, beta, new, rest| S::add(S::mul(old, S::splat(beta)), S::mul(new, S::splat(rest)));
                let mean1 = average(f32::load_part::<S>(mean, n), beta1, sensitivity, rest1);
                let apart = S::abs(S::sub(sensitivity, mean1));
                let deviation1 = average(f32::load_part::<S>(deviation, n), beta2, apart, rest2);
                f32::store_part::<S>(mean, mean1, n);
                f32::store_part::<S>(deviation, deviation1, n);
            }
        }
    }
}

/// means_r = Σ_j a_rj b_rj / width
struct RowMeans<'a> {
    a: &'a [f32],
    b: &'a [f32],
    means: &'a mut [f32],
}

impl Kernel for RowMeans<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.a.len() / self.means.len();
        for (row, mean) in self.means.iter_mut().enumerate() {
            let row = row * width..(row + 1) * width;
            // SAFETY: the caller's machine has S.
            let sum = unsafe { Dot(&self.a[row.clone()], &self.b[row]).run::<S>() };
            *mean = (sum / width as f64) as f32;
        }
    }
}
