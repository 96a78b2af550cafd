//! A learned factor a column: the activations of (IA)³ (Liu et al. 2022, §3.3), y = l ∘ x.
//!
//! y_rj = x_rj · factors_j
//!
//! x, y [rows, width]; factors [width]; saved for backward: x and factors.

use crate::operands::Kernel;
use rankfold_backend::params::Rows;
use rankfold_backend::{Result, View, ViewMut};

/// y_rj = x_rj · factors_j
pub(crate) fn scale_columns(p: &Rows, x: View, factors: View, mut y: ViewMut) -> Result<()> {
    let kernel = Kernel("scale_columns");
    p.check_scale(&x, &factors, &y)?;
    let (x, factors) = (kernel.floats("x", x)?, kernel.floats("factors", factors)?);
    kernel.floats_mut("y", &mut y)?.store(x.iter().zip(factors.iter().cycle()).map(|(x, factor)| x * factor));
    Ok(())
}

/// dx_rj = dy_rj · factors_j;   dfactors_j = Σ_r dy_rj x_rj
///
/// y_rj is a product of two numbers, and each one's derivative is the other; factors_j is in every row.
pub(crate) fn scale_columns_grad(
    p: &Rows,
    x: View,
    factors: View,
    dy: View,
    accumulate: bool,
    mut dx: Option<ViewMut>,
    mut dfactors: Option<ViewMut>,
) -> Result<()> {
    let kernel = Kernel("scale_columns_grad");
    p.check_scale_grad(&x, &factors, &dy, dx.as_ref(), dfactors.as_ref())?;
    let (x, factors) = (kernel.floats("x", x)?, kernel.floats("factors", factors)?);
    let dy = kernel.floats("dy", dy)?;
    let dx = kernel.some_mut("dx", &mut dx)?;
    let dfactors = kernel.some_mut("dfactors", &mut dfactors)?;

    let grad_x = dy.iter().zip(factors.iter().cycle()).map(|(dy, factor)| dy * factor);
    match dx {
        Some(mut dx) if accumulate => dx.add(grad_x),
        Some(mut dx) => dx.store(grad_x),
        None => {}
    }
    if let Some(mut dfactors) = dfactors {
        let mut grad_factors = vec![0.0; p.width];
        for i in 0..x.len() {
            grad_factors[i % p.width] += dy[i] * x[i];
        }
        dfactors.add(grad_factors);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_gradient, buffer, dot, numbers, output, values};

    const P: Rows = Rows { rows: 2, width: 3 };

    fn forward(x: &[f64], factors: &[f64]) -> Vec<f64> {
        let mut y = output(x.len());
        BACKEND.scale_columns(&P, buffer(x).view(), buffer(factors).view(), y.view_mut()).unwrap();
        values(&y)
    }

    fn backward(x: &[f64], factors: &[f64], dy: &[f64], before: f64) -> (Vec<f64>, Vec<f64>) {
        let (x, factors, dy) = (buffer(x), buffer(factors), buffer(dy));
        let (mut dx, mut dfactors) = (buffer(&[before; 6]), buffer(&[before; 3]));
        let (out, out_factors) = (Some(dx.view_mut()), Some(dfactors.view_mut()));
        let accumulate = before != 0.0;
        BACKEND.scale_columns_grad(&P, x.view(), factors.view(), dy.view(), accumulate, out, out_factors).unwrap();
        (values(&dx), values(&dfactors))
    }

    #[test]
    fn each_column_has_its_factor() {
        let y = forward(&[1.0, 2.0, 3.0, -1.0, -2.0, -3.0], &[1.0, 0.0, -2.0]);
        assert_eq!(y, [1.0, 0.0, -6.0, -1.0, 0.0, 6.0]);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (x, factors, dy) = (numbers(1, 6), numbers(2, 3), numbers(3, 6));
        let (dx, dfactors) = backward(&x, &factors, &dy, 0.0);
        assert_gradient("x", &x, &dx, |x| dot(&forward(x, &factors), &dy));
        assert_gradient("factors", &factors, &dfactors, |factors| dot(&forward(&x, factors), &dy));
        let more = |gradient: Vec<f64>| gradient.into_iter().map(|g| g + 0.5).collect::<Vec<f64>>();
        assert_eq!(backward(&x, &factors, &dy, 0.5), (more(dx), more(dfactors)));
    }
}
