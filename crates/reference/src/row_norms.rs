//! The Euclidean norm of every row: ‖W + sBA‖ of DoRA (Liu et al. 2024, eq. 5), W's rows being its outputs.
//!
//! norms_r = √(Σ_j x_rj²)
//!
//! x [rows, width]; norms [rows]. There is no gradient: DoRA takes the norm as a constant (§4.3).

use crate::operands::Kernel;
use rankfold_backend::params::Rows;
use rankfold_backend::{Result, View, ViewMut};

/// The norm of every row.
pub(crate) fn row_norms(p: &Rows, x: View, mut norms: ViewMut) -> Result<()> {
    let kernel = Kernel("row_norms");
    p.check_norms(&x, &norms)?;
    let x = kernel.floats("x", x)?;
    let row = |row: usize| &x[row * p.width..][..p.width];
    kernel.floats_mut("norms", &mut norms)?.store((0..p.rows).map(|r| norm(row(r))));
    Ok(())
}

/// ‖x‖ = m·√(Σ (x_j/m)²) with m = max |x_j|: no square overflows, and the largest is not lost to 0. (Only f64 needs it;
/// the squares of all other types lie well within its range.)
fn norm(x: &[f64]) -> f64 {
    let largest = x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    // Of zeros, or with an infinity among them, the plain sum is right.
    let unit = if largest > 0.0 && largest.is_finite() { largest } else { 1.0 };
    unit * x.iter().map(|x| (x / unit) * (x / unit)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, buffer, numbers, output, values};

    fn norms(rows: usize, x: &[f64]) -> Vec<f64> {
        let mut norms = output(rows);
        let p = Rows { rows, width: x.len() / rows };
        BACKEND.row_norms(&p, buffer(x).view(), norms.view_mut()).unwrap();
        values(&norms)
    }

    #[test]
    fn a_right_triangle_has_its_hypotenuse() {
        assert_eq!(norms(3, &[3.0, -4.0, 0.0, 0.0, 5.0, 12.0]), [5.0, 0.0, 13.0]);
    }

    #[test]
    fn a_norm_is_finite_and_not_lost_at_the_ends_of_the_range() {
        let (large, small) = (2f64.powi(1022), 2f64.powi(-1070));
        assert_eq!(norms(2, &[3.0 / 4.0 * large, -large, 3.0 * small, 4.0 * small]), [1.25 * large, 5.0 * small]);
    }

    #[test]
    fn what_is_not_finite_shows() {
        let found = norms(3, &[1.0, f64::NEG_INFINITY, f64::NAN, 0.0, f64::NAN, f64::INFINITY]);
        assert!(found[0] == f64::INFINITY && found[1].is_nan() && found[2].is_nan(), "{found:?}");
    }

    #[test]
    fn a_row_without_elements_has_norm_0() {
        assert_eq!(norms(2, &[]), [0.0, 0.0]);
    }

    /// ‖c·x‖ = |c|·‖x‖, and a row's norm has no part of another's.
    #[test]
    fn norms_are_homogeneous_row_by_row() {
        let x = numbers(1, 12);
        let scaled: Vec<f64> = x.iter().enumerate().map(|(i, x)| x * [-3.0, 0.5][i / 6]).collect();
        let (before, after) = (norms(2, &x), norms(2, &scaled));
        assert_close("norms", &after, &[3.0 * before[0], 0.5 * before[1]]);
    }
}
