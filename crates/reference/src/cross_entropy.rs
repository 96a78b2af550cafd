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

/// log softmax(x)_j for every j: x_j less the logarithm of Σ exp(x), both shifted by the largest x, so that no
/// exponential overflows and no digits are lost to the logits' common size.
fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    x.iter().map(|x| (x - max) - log_sum).collect()
}

/// The losses.
pub(crate) fn cross_entropy(p: &CrossEntropy, logits: View, labels: View, mut losses: ViewMut) -> Result<()> {
    let kernel = Kernel("cross_entropy");
    p.check(kernel.0, logits.len(), &labels, &losses)?;
    let (logits, columns) = (kernel.floats("logits", logits)?, columns(p, kernel, labels)?);
    let mut losses = kernel.floats_mut("losses", &mut losses)?;
    let row = |r: usize| &logits[r * p.vocab..][..p.vocab];
    let loss = |(r, column): (usize, Option<usize>)| column.map_or(0.0, |column| -log_softmax(row(r))[column]);
    losses.store(columns.into_iter().enumerate().map(loss));
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
    p.check(kernel.0, logits.len(), &labels, &losses)?;
    let columns = columns(p, kernel, labels)?;
    let mut logits = kernel.floats_mut("logits", &mut logits)?;
    let mut losses = kernel.floats_mut("losses", &mut losses)?;

    let mut values = logits.load();
    let mut row_losses = Vec::with_capacity(p.rows);
    for (r, column) in columns.into_iter().enumerate() {
        let row = &mut values[r * p.vocab..][..p.vocab];
        let Some(column) = column else {
            row_losses.push(0.0);
            row.fill(0.0);
            continue;
        };
        let log_probabilities = log_softmax(row);
        row_losses.push(-log_probabilities[column]);
        for (j, x) in row.iter_mut().enumerate() {
            let onehot = if j == column { 1.0 } else { 0.0 };
            *x = scale * (log_probabilities[j].exp() - onehot);
        }
    }
    logits.store(values);
    losses.store(row_losses);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};
    use rankfold_backend::Error;
    use rankfold_backend::params::IGNORED;

    const P: CrossEntropy = CrossEntropy { rows: 3, vocab: 4 };

    fn losses(logits: &[f64], labels: &[i64]) -> Result<Vec<f64>> {
        let mut losses = output(labels.len());
        let p = CrossEntropy { rows: labels.len(), vocab: logits.len() / labels.len() };
        BACKEND.cross_entropy(&p, buffer(logits).view(), BACKEND.upload(labels)?.view(), losses.view_mut())?;
        Ok(values(&losses))
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_vocabulary_whatever_their_size() {
        let logits = [[0.0; 4], [1e4; 4], [-1e4; 4]].concat();
        assert_close("losses", &losses(&logits, &[0, 3, 1]).unwrap(), &[4f64.ln(); 3]);
    }

    #[test]
    fn an_ignored_row_has_no_loss_and_no_gradient() {
        let logits = numbers(1, 12);
        let labels = [2, IGNORED, 0];
        assert_eq!(losses(&logits, &labels).unwrap()[1], 0.0);
        let (mut grad, mut out) = (buffer(&logits), output(3));
        let labels_buffer = BACKEND.upload(&labels).unwrap();
        BACKEND.cross_entropy_grad_in_place(&P, 0.5, grad.view_mut(), labels_buffer.view(), out.view_mut()).unwrap();
        assert_eq!(values(&out), losses(&logits, &labels).unwrap());
        let grad = values(&grad);
        assert_eq!(grad[4..8], [0.0; 4]);
        // A softmax sums to 1, and so does the onehot.
        assert_close("row sum", &[grad[..4].iter().sum()], &[0.0]);
        assert_gradient("logits", &logits, &grad, |x| dot(&losses(x, &labels).unwrap(), &[0.5; 3]));
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_named_and_the_logits_stay() {
        for label in [4, -1, i64::MIN] {
            let (mut logits, labels) = (buffer(&[1.0; 12]), BACKEND.upload(&[0, label, 0]).unwrap());
            let mut out = output(3);
            let error = BACKEND
                .cross_entropy_grad_in_place(&P, 1.0, logits.view_mut(), labels.view(), out.view_mut())
                .unwrap_err();
            assert_eq!(error, Error::TokenId { position: 1, id: label, vocab: 4 });
            assert_eq!(values(&logits), [1.0; 12]);
        }
    }
}
