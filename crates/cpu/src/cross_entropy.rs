//! Softmax cross-entropy: loss_r = −log softmax(logits_r)[label_r] = log Σ_j exp(logits_rj) − logits_r[label_r].
//!
//! logits [rows, vocab], labels i64 [rows], losses [rows]; an ignored label (−100) has loss 0 and gradient 0. The
//! exponentials are shifted by the row's largest logit, so that none overflows; a NaN among them makes the loss NaN.

use crate::elementwise::CHUNK;
use crate::simd::{Float, Isa, Kernel, Simd, exp};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::Result;
use rankfold_backend::params::CrossEntropy;

/// Exponentials that are summed in f32 before they join the row's f64 sum: the rounding of a sum of n grows with n.
const SUM_CHUNK: usize = 512;

fn rows_a_task(p: &CrossEntropy) -> usize {
    (CHUNK / p.vocab.max(1)).max(1)
}

/// The label of a row as a column, `None` where it is ignored. All are checked before.
fn column(p: &CrossEntropy, labels: &[i64], row: usize) -> Option<usize> {
    p.column(row, labels[row]).ok().flatten()
}

/// That every label is a column, or ignored.
fn check_labels(p: &CrossEntropy, labels: &[i64]) -> Result<()> {
    labels.iter().enumerate().try_for_each(|(row, label)| p.column(row, *label).map(drop))
}

/// The losses.
pub(crate) fn cross_entropy(
    threads: &Threads,
    isa: Isa,
    p: &CrossEntropy,
    logits: &[f32],
    labels: &[i64],
    losses: &mut [f32],
) -> Result<()> {
    check_labels(p, labels)?;
    let losses = Disjoint::new(losses);
    threads.run_chunks(p.rows, rows_a_task(p), |rows| {
        for r in rows {
            let logits = &logits[r * p.vocab..(r + 1) * p.vocab];
            let loss =
                column(p, labels, r).map_or(0.0, |column| isa.run(LogSumExp { logits }) - f64::from(logits[column]));
            // SAFETY: one task has this row.
            unsafe { losses.get(r..r + 1)[0] = loss as f32 };
        }
    });
    Ok(())
}

/// ∂loss/∂logits_j = softmax_j − [j = label]: from ∂/∂x_j log Σ exp(x) = exp(x_j) / Σ exp(x). In place of the
/// logits, times `scale`.
pub(crate) fn cross_entropy_grad_in_place(
    threads: &Threads,
    isa: Isa,
    p: &CrossEntropy,
    scale: f64,
    logits: &mut [f32],
    labels: &[i64],
    losses: &mut [f32],
) -> Result<()> {
    check_labels(p, labels)?;
    let (logits, losses) = (Disjoint::new(logits), Disjoint::new(losses));
    threads.run_chunks(p.rows, rows_a_task(p), |rows| {
        for r in rows {
            // SAFETY: one task has this row.
            let (logits, loss) = unsafe { (logits.get(r * p.vocab..(r + 1) * p.vocab), losses.get(r..r + 1)) };
            loss[0] = match column(p, labels, r) {
                Some(column) => isa.run(Gradient { logits, column, scale }),
                None => {
                    logits.fill(0.0);
                    0.0
                }
            };
        }
    });
    Ok(())
}

/// The largest of x; NaNs are passed over.
#[inline(always)]
unsafe fn largest<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: LANES elements from each i.
    unsafe {
        let (mut max, whole) = (S::splat(f32::NEG_INFINITY), x.len() / S::LANES * S::LANES);
        for i in (0..whole).step_by(S::LANES) {
            max = S::max(S::load(x.as_ptr().add(i)), max);
        }
        x[whole..].iter().fold(S::max_lane(max), |max, x| max.max(*x))
    }
}

/// exp(x_j − max) of `len` elements, summed; where `KEEP`, also in place of the elements.
#[inline(always)]
unsafe fn sum_exp<S: Simd, const KEEP: bool>(x: *mut f32, len: usize, max: f32) -> f64 {
    // SAFETY: n ≤ LANES elements from each i; 16 ≥ LANES.
    unsafe {
        let mut sum = 0.0;
        for start in (0..len).step_by(SUM_CHUNK) {
            let mut part = S::splat(0.0);
            for i in (start..len.min(start + SUM_CHUNK)).step_by(S::LANES) {
                let n = S::LANES.min(len - i);
                let mut e = exp::<S>(S::sub(f32::load_part::<S>(x.add(i), n), S::splat(max)));
                if n < S::LANES {
                    // The lanes beyond the end count for nothing.
                    let mut lanes = [0.0; 16];
                    S::store(lanes.as_mut_ptr(), e);
                    e = S::load_first(lanes.as_ptr(), n);
                }
                if KEEP {
                    f32::store_part::<S>(x.add(i), e, n);
                }
                part = S::add(part, e);
            }
            sum += f64::from(S::sum(part));
        }
        sum
    }
}

/// log Σ exp(x_j)
struct LogSumExp<'a> {
    logits: &'a [f32],
}

impl Kernel for LogSumExp<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        // SAFETY: all elements of the slice, which are only read.
        unsafe {
            let max = largest::<S>(self.logits);
            f64::from(max) + sum_exp::<S, false>(self.logits.as_ptr().cast_mut(), self.logits.len(), max).ln()
        }
    }
}

/// A row's logits replaced by their gradient; returns its loss.
struct Gradient<'a> {
    logits: &'a mut [f32],
    column: usize,
    scale: f64,
}

impl Kernel for Gradient<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let label = self.logits[self.column];
        // SAFETY: all elements of the slice.
        let (max, sum) = unsafe {
            let max = largest::<S>(self.logits);
            (max, sum_exp::<S, true>(self.logits.as_mut_ptr(), self.logits.len(), max))
        };
        let factor = (self.scale / sum) as f32;
        self.logits.iter_mut().for_each(|x| *x *= factor);
        self.logits[self.column] -= self.scale as f32;
        (f64::from(max) + sum.ln() - f64::from(label)) as f32
    }
}
