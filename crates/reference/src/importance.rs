//! AdaLoRA's importance of a triplet (Zhang et al. 2023, eq. 8–10): smoothed sensitivity times its uncertainty.
//!
//! With I = |w · g|, elementwise, g = grad_scale·grad:
//!   mean ← β1 mean + (1 − β1) I                     (eq. 9)
//!   deviation ← β2 deviation + (1 − β2) |I − mean|  (eq. 10, of the new mean)
//!   scores_i = the mean over triplet i's elements of mean · deviation
//!
//! weight, grad, mean, deviation [rows, width]; scores [rows] where the triplets are rows (A, E), [width] where they
//! are columns (B). |w · g| is what the loss changes by, to first order, if w becomes 0 (eq. 8).

use crate::operands::Kernel;
use rankfold_backend::params::{Importance, Triplets};
use rankfold_backend::{Result, View, ViewMut};

/// One step of both averages, in place, and the scores of what they then are.
pub(crate) fn importance(
    p: &Importance,
    weight: View,
    grad: View,
    mut mean: ViewMut,
    mut deviation: ViewMut,
    mut scores: ViewMut,
) -> Result<()> {
    p.check(&weight, &grad, &mean, &deviation, &scores)?;
    let kernel = Kernel("importance");
    let (weight, grad) = (kernel.floats("weight", weight)?, kernel.floats("grad", grad)?);
    let mut mean = kernel.floats_mut("mean", &mut mean)?;
    let mut deviation = kernel.floats_mut("deviation", &mut deviation)?;
    let mut scores = kernel.floats_mut("scores", &mut scores)?;

    let (mut means, mut deviations) = (mean.load(), deviation.load());
    let (triplets, elements) = p.split();
    let mut sums = vec![0.0; triplets];
    for i in 0..weight.len() {
        let sensitivity = (weight[i] * (p.grad_scale * grad[i])).abs();
        means[i] = p.beta1 * means[i] + (1.0 - p.beta1) * sensitivity;
        deviations[i] = p.beta2 * deviations[i] + (1.0 - p.beta2) * (sensitivity - means[i]).abs();
        let triplet = match p.triplets {
            Triplets::Rows => i / p.width,
            Triplets::Columns => i % p.width,
        };
        sums[triplet] += means[i] * deviations[i];
    }
    mean.store(means);
    deviation.store(deviations);
    scores.store(sums.into_iter().map(|sum| sum / elements as f64));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, buffer, numbers, output, values};

    const P: Importance =
        Importance { rows: 2, width: 3, triplets: Triplets::Rows, beta1: 0.85, beta2: 0.75, grad_scale: 1.0 };

    /// One step from (mean, deviation): both, and the scores.
    fn step(p: &Importance, weight: &[f64], grad: &[f64], state: [&[f64]; 2]) -> [Vec<f64>; 3] {
        let ([mut mean, mut deviation], mut scores) = (state.map(buffer), output(p.split().0));
        let (weight, grad) = (buffer(weight), buffer(grad));
        let (m, d, s) = (mean.view_mut(), deviation.view_mut(), scores.view_mut());
        BACKEND.importance(p, weight.view(), grad.view(), m, d, s).unwrap();
        [mean, deviation, scores].map(|x| values(&x))
    }

    /// From nothing mean = (1 − β1) I and |I − mean| = β1 I.
    #[test]
    fn the_first_step_is_a_multiple_of_the_sensitivity() {
        let (weight, grad) = (numbers(1, 6), numbers(2, 6));
        let [mean, deviation, scores] = step(&P, &weight, &grad, [&[0.0; 6]; 2]);
        let sensitivity: Vec<f64> = weight.iter().zip(&grad).map(|(w, g)| (w * g).abs()).collect();
        assert_close("mean", &mean, &sensitivity.iter().map(|i| 0.15 * i).collect::<Vec<_>>());
        assert_close("deviation", &deviation, &sensitivity.iter().map(|i| 0.25 * 0.85 * i).collect::<Vec<_>>());
        let of_row = |row: &[f64]| row.iter().map(|i| 0.15 * i * 0.25 * 0.85 * i).sum::<f64>() / 3.0;
        assert_close("scores", &scores, &sensitivity.chunks(3).map(of_row).collect::<Vec<_>>());
    }

    /// |I − mean| is that of the new mean: where I is what it always was, it is 0 and the deviation decays.
    #[test]
    fn a_steady_sensitivity_has_no_uncertainty() {
        let p = Importance { rows: 1, width: 1, beta1: 0.5, ..P };
        assert_eq!(step(&p, &[2.0], &[-4.0], [&[8.0], &[1.0]]), [vec![8.0], vec![0.75], vec![6.0]]);
    }

    #[test]
    fn columns_of_a_matrix_are_the_rows_of_its_transpose() {
        let transposed = |x: &[f64]| (0..6).map(|i| x[i % 2 * 3 + i / 2]).collect::<Vec<f64>>();
        let [weight, grad, mean, deviation] = [1, 2, 3, 4].map(|stream| numbers(stream, 6));
        let rows = step(&P, &weight, &grad, [&mean, &deviation]);
        let p = Importance { rows: 3, width: 2, triplets: Triplets::Columns, ..P };
        let state = [&transposed(&mean)[..], &transposed(&deviation)];
        let columns = step(&p, &transposed(&weight), &transposed(&grad), state);
        assert_eq!(columns, [transposed(&rows[0]), transposed(&rows[1]), rows[2].clone()]);
    }

    #[test]
    fn the_clips_factor_is_a_factor_of_the_gradient() {
        let (weight, grad, state) = (numbers(1, 6), numbers(2, 6), [&[0.5; 6][..]; 2]);
        let clipped = step(&Importance { grad_scale: 0.25, ..P }, &weight, &grad, state);
        let quarter: Vec<f64> = grad.iter().map(|g| 0.25 * g).collect();
        assert_eq!(clipped, step(&P, &weight, &quarter, state));
    }

    #[test]
    fn a_triplet_without_an_element_is_an_error() {
        let (x, mut state, mut scores) = (output(0), [output(0), output(0)], output(3));
        let [mean, deviation] = state.each_mut().map(|x| x.view_mut());
        let p = Importance { rows: 0, triplets: Triplets::Columns, ..P };
        assert!(BACKEND.importance(&p, x.view(), x.view(), mean, deviation, scores.view_mut()).is_err());
    }
}
