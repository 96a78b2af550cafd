//! The pointwise non-linearities of bottleneck adapters (Houlsby et al. 2019, §2.1) and of prefix tuning's
//! reparametrisation (Li & Liang 2021, §4.3).
//!
//! relu(x) = max(x, 0);   silu(x) = x·σ(x), σ(x) = 1/(1 + e^−x);   tanh x
//!
//! x, y: any one length; saved for backward: x. What is NaN in x is NaN in y and dx.

use crate::operands::Kernel;
use crate::silu_mul::sigmoid;
use rankfold_backend::params::Activation;
use rankfold_backend::{Result, View, ViewMut};

/// y = f(x)
pub(crate) fn activate(f: Activation, x: View, mut y: ViewMut) -> Result<()> {
    let kernel = Kernel("activate");
    f.check(&x, &y)?;
    let x = kernel.floats("x", x)?;
    kernel.floats_mut("y", &mut y)?.store(x.into_iter().map(|x| value(f, x)));
    Ok(())
}

/// dx = dy · f'(x)
pub(crate) fn activate_grad(f: Activation, x: View, dy: View, mut dx: ViewMut) -> Result<()> {
    let kernel = Kernel("activate_grad");
    f.check_grad(&x, &dy, &dx)?;
    let (x, dy) = (kernel.floats("x", x)?, kernel.floats("dy", dy)?);
    kernel.floats_mut("dx", &mut dx)?.store(x.into_iter().zip(dy).map(|(x, dy)| dy * slope(f, x)));
    Ok(())
}

fn value(f: Activation, x: f64) -> f64 {
    match f {
        Activation::Relu if x <= 0.0 => 0.0,
        Activation::Relu => x,
        Activation::Silu => x * sigmoid(x),
        Activation::Tanh => x.tanh(),
    }
}

/// relu': 1 above 0, 0 at 0 and below. silu' = σ(1 + x(1 − σ)), as in [`crate::silu_mul`].
///
/// tanh' = 1 − tanh² = 1/cosh² = 4e/(1 + e)² with e = e^−2|x|, since cosh x = (1 + e)/2 · e^|x|: no difference of two
/// numbers near 1.
fn slope(f: Activation, x: f64) -> f64 {
    match f {
        Activation::Relu if x > 0.0 => 1.0,
        Activation::Relu if x <= 0.0 => 0.0,
        Activation::Relu => x,
        Activation::Silu => sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))),
        Activation::Tanh => {
            let e = (-2.0 * x.abs()).exp();
            4.0 * e / ((1.0 + e) * (1.0 + e))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};

    const ALL: [Activation; 3] = [Activation::Relu, Activation::Silu, Activation::Tanh];

    fn forward(f: Activation, x: &[f64]) -> Vec<f64> {
        let mut y = output(x.len());
        BACKEND.activate(f, buffer(x).view(), y.view_mut()).unwrap();
        values(&y)
    }

    fn backward(f: Activation, x: &[f64], dy: &[f64]) -> Vec<f64> {
        let mut dx = output(x.len());
        BACKEND.activate_grad(f, buffer(x).view(), buffer(dy).view(), dx.view_mut()).unwrap();
        values(&dx)
    }

    #[test]
    fn each_is_its_limits_far_out_and_0_at_0() {
        let far = [-800.0, 0.0, 800.0];
        for (f, expected) in ALL.into_iter().zip([[0.0, 0.0, 800.0], [0.0, 0.0, 800.0], [-1.0, 0.0, 1.0]]) {
            assert_eq!(forward(f, &far), expected, "{f:?}");
        }
        for (f, expected) in ALL.into_iter().zip([[0.0, 0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 1.0, 0.0]]) {
            assert_eq!(backward(f, &far, &[1.0; 3]), expected, "{f:?}'");
        }
    }

    #[test]
    fn a_nan_stays_one() {
        for f in ALL {
            assert!(forward(f, &[f64::NAN])[0].is_nan() && backward(f, &[f64::NAN], &[1.0])[0].is_nan(), "{f:?}");
        }
    }

    #[test]
    fn silu_is_silu_mul_of_1() {
        let (x, ones, mut out) = (numbers(1, 8), [1.0; 8], output(8));
        BACKEND.silu_mul(buffer(&x).view(), buffer(&ones).view(), out.view_mut()).unwrap();
        assert_eq!(forward(Activation::Silu, &x), values(&out));
    }

    /// numbers() has none within 10⁻⁵ of 0, where relu has no derivative.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (x, dy) = (numbers(1, 16), numbers(2, 16));
        for f in ALL {
            assert_gradient("x", &x, &backward(f, &x, &dy), |x| dot(&forward(f, x), &dy));
        }
    }

    /// 1 − tanh² where it does not cancel.
    #[test]
    fn the_slope_of_tanh_is_1_less_its_square() {
        let x = numbers(1, 8);
        let expected: Vec<f64> = x.iter().map(|x| 1.0 - x.tanh() * x.tanh()).collect();
        assert_close("tanh'", &backward(Activation::Tanh, &x, &[1.0; 8]), &expected);
    }
}
