//! Softmax cross-entropy: loss_r = −log softmax(logits_r)[label_r] = log Σ_j exp(logits_rj) − logits_r[label_r].
//!
//! logits [rows, vocab], labels i64 [rows], losses [rows]; an ignored label (−100) has loss 0 and gradient 0.

use crate::operands::Kernel;
use rankfold_backend::params::CrossEntropy;
use rankfold_backend::{Result, View, ViewMut};

/// The label of every row as a column, `None` where ignored.
fn columns(p: &CrossEntropy, kernel: Kernel, labels: View) -> Result<Vec<Option<usize>>> {
    let labels = kernel.elements::<i64>("labels", labels)?.iter().enumerate();
    labels.map(|(row, &label)| p.column(row, label)).collect()
}

/// log Σ exp(x_j), shifted by the largest x so that no exponential overflows.
fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

fn loss(logits: &[f64], column: Option<usize>) -> f64 {
    column.map_or(0.0, |column| log_sum_exp(logits) - logits[column])
}

/// The losses.
pub(crate) fn cross_entropy(p: &CrossEntropy, logits: View, labels: View, mut losses: ViewMut) -> Result<()> {
    let kernel = Kernel("cross_entropy");
    p.check(logits.len(), &labels, &losses)?;
    let (logits, columns) = (kernel.floats("logits", logits)?, columns(p, kernel, labels)?);
    let mut losses = kernel.floats_mut("losses", &mut losses)?;
    let row = |r: usize| &logits[r * p.vocab..][..p.vocab];
    losses.store(columns.into_iter().enumerate().map(|(r, column)| loss(row(r), column)));
    Ok(())
}

/// ∂loss/∂logits_j = softmax_j − [j = label]: from ∂/∂x_j log Σ exp(x) = exp(x_j) / Σ exp(x). In place of the
/// logits, times `scale`.
pub(crate) fn cross_entropy_grad_in_place(
    p: &CrossEntropy,
    scale: f64,
    mut logits: ViewMut,
    labels: View,
    mut losses: ViewMut,
) -> Result<()> {
    let kernel = Kernel("cross_entropy_grad_in_place");
    p.check(logits.len(), &labels, &losses)?;
    let columns = columns(p, kernel, labels)?;
    let mut logits = kernel.floats_mut("logits", &mut logits)?;
    let mut losses = kernel.floats_mut("losses", &mut losses)?;

    let mut values = logits.load();
    let mut row_losses = Vec::with_capacity(p.rows);
    for (r, column) in columns.into_iter().enumerate() {
        let row = &mut values[r * p.vocab..][..p.vocab];
        row_losses.push(loss(row, column));
        let Some(column) = column else {
            row.fill(0.0);
            continue;
        };
        let log_sum = log_sum_exp(row);
        for (j, x) in row.iter_mut().enumerate() {
            let onehot = if j == column { 1.0 } else { 0.0 };
            *x = scale * ((*x - log_sum).exp() - onehot);
        }
    }
    logits.store(values);
    losses.store(row_losses);
    Ok(())
}
