//! Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4).
//!
//! y_i = gain_i · x_i / ρ,   ρ = √(mean(x²) + ε)
//!
//! x, y [rows, width]; gain [width]; saved for backward: x, and 1/ρ of every row.

use crate::operands::Kernel;
use rankfold_backend::params::RmsNorm;
use rankfold_backend::{Result, View, ViewMut};

/// y and 1/ρ.
pub(crate) fn rms_norm(p: &RmsNorm, x: View, gain: View, mut y: ViewMut, mut inv_rms: ViewMut) -> Result<()> {
    let kernel = Kernel("rms_norm");
    p.check(&x, &gain, &y, &inv_rms)?;
    let (x, gain) = (kernel.floats("x", x)?, kernel.floats("gain", gain)?);
    let mut y = kernel.floats_mut("y", &mut y)?;
    let mut inv_rms = kernel.floats_mut("inv_rms", &mut inv_rms)?;

    let (mut normed, mut inverses) = (Vec::with_capacity(x.len()), Vec::with_capacity(p.rows));
    for row in 0..p.rows {
        let x = &x[row * p.width..][..p.width];
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / p.width as f64;
        let inverse = 1.0 / (mean_square + p.eps).sqrt();
        normed.extend(x.iter().zip(&gain).map(|(x, gain)| gain * x * inverse));
        inverses.push(inverse);
    }
    y.store(normed);
    inv_rms.store(inverses);
    Ok(())
}

/// dx_i = (gain_i dy_i − x_i c) / ρ,   c = Σ_j gain_j x_j dy_j / (width·ρ²);   dgain_i = Σ_rows dy_i x_i / ρ
///
/// From ∂y_j/∂x_i = gain_j (δ_ij / ρ − x_j/ρ² · ∂ρ/∂x_i) and ∂ρ/∂x_i = x_i / (width·ρ): every element pulls on ρ,
/// and through it on every output; summed over j that pull is x_i c / ρ.
pub(crate) fn rms_norm_grad(
    p: &RmsNorm,
    x: View,
    gain: View,
    inv_rms: View,
    dy: View,
    accumulate: bool,
    mut dx: Option<ViewMut>,
    mut dgain: Option<ViewMut>,
) -> Result<()> {
    let kernel = Kernel("rms_norm_grad");
    p.check_grad(&x, &gain, &inv_rms, &dy, dx.as_ref(), dgain.as_ref())?;
    let (x, gain) = (kernel.floats("x", x)?, kernel.floats("gain", gain)?);
    let (inv_rms, dy) = (kernel.floats("inv_rms", inv_rms)?, kernel.floats("dy", dy)?);
    let dx = kernel.some_mut("dx", &mut dx)?;
    let dgain = kernel.some_mut("dgain", &mut dgain)?;

    let mut grad_x = Vec::with_capacity(x.len());
    let mut grad_gain = vec![0.0; p.width];
    for row in 0..p.rows {
        let (x, dy) = (&x[row * p.width..][..p.width], &dy[row * p.width..][..p.width]);
        let inverse = inv_rms[row];
        let pull = (0..p.width).map(|j| gain[j] * x[j] * dy[j]).sum::<f64>();
        let c = pull * inverse * inverse / p.width as f64;
        for i in 0..p.width {
            grad_x.push((gain[i] * dy[i] - x[i] * c) * inverse);
            grad_gain[i] += dy[i] * x[i] * inverse;
        }
    }
    match dx {
        Some(mut dx) if accumulate => dx.add(grad_x),
        Some(mut dx) => dx.store(grad_x),
        None => {}
    }
    if let Some(mut dgain) = dgain {
        dgain.add(grad_gain);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};

    const P: RmsNorm = RmsNorm { rows: 2, width: 3, eps: 1e-2 };

    fn forward(p: &RmsNorm, x: &[f64], gain: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut y, mut inv_rms) = (output(x.len()), output(p.rows));
        BACKEND.rms_norm(p, buffer(x).view(), buffer(gain).view(), y.view_mut(), inv_rms.view_mut()).unwrap();
        (values(&y), values(&inv_rms))
    }

    fn backward(p: &RmsNorm, x: &[f64], gain: &[f64], dy: &[f64], before: f64) -> (Vec<f64>, Vec<f64>) {
        let (_, inv_rms) = forward(p, x, gain);
        let (x, gain, inv_rms, dy) = (buffer(x), buffer(gain), buffer(&inv_rms), buffer(dy));
        let (mut dx, mut dgain) = (buffer(&vec![before; x.len()]), buffer(&vec![before; p.width]));
        let (out, out_gain) = (Some(dx.view_mut()), Some(dgain.view_mut()));
        let accumulate = before != 0.0;
        BACKEND.rms_norm_grad(p, x.view(), gain.view(), inv_rms.view(), dy.view(), accumulate, out, out_gain).unwrap();
        (values(&dx), values(&dgain))
    }

    #[test]
    fn a_row_of_mean_square_1_is_scaled_by_the_gain_alone() {
        let p = RmsNorm { rows: 2, width: 2, eps: 0.0 };
        let (y, inv_rms) = forward(&p, &[1.0, -1.0, 3.0, 3.0], &[2.0, 5.0]);
        assert_eq!((y, inv_rms), (vec![2.0, -5.0, 2.0, 5.0], vec![1.0, 1.0 / 3.0]));
    }

    #[test]
    fn a_row_of_zeros_stays_zero() {
        let (y, inv_rms) = forward(&P, &[0.0; 6], &[1.0; 3]);
        assert_eq!(y, [0.0; 6]);
        assert_close("1/√ε", &inv_rms, &[10.0; 2]);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (x, gain, dy) = (numbers(1, 6), numbers(2, 3), numbers(3, 6));
        let (dx, dgain) = backward(&P, &x, &gain, &dy, 0.0);
        assert_gradient("x", &x, &dx, |x| dot(&forward(&P, x, &gain).0, &dy));
        assert_gradient("gain", &gain, &dgain, |gain| dot(&forward(&P, &x, gain).0, &dy));
        let more = |gradient: Vec<f64>| gradient.into_iter().map(|g| g + 0.5).collect::<Vec<f64>>();
        assert_eq!(backward(&P, &x, &gain, &dy, 0.5), (more(dx), more(dgain)));
    }

    /// Without ε the norm does not see x's length, so that its gradient has no part along x.
    #[test]
    fn the_gradient_is_at_right_angles_to_x() {
        let p = RmsNorm { rows: 1, width: 6, eps: 0.0 };
        let x = numbers(1, 6);
        let (dx, _) = backward(&p, &x, &numbers(2, 6), &numbers(3, 6), 0.0);
        assert_close("x·dx", &[dot(&x, &dx)], &[0.0]);
    }
}
