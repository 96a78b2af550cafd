//! Finite differences: the check that every gradient must pass.
//!
//! For a function y(p) and fixed weights c, the loss Σ c_i y_i has the gradient that backward computes from the seed
//! c. Each element of each parameter is compared with the central difference (L(p + h) − L(p − h)) / 2h. In f64
//! with h = 1e-5 the difference is off by h²/6·|L‴| ≈ 2e-11 from truncation and ε·|L|/h ≈ 1e-11 from rounding, for
//! functions of order one: far below the 1e-7 that is allowed.

use crate::{Error, Gradients, Parameter, Result, Tape, Tensor};
use rankfold_backend::{Backend, DType, philox};
use std::sync::Arc;

/// Half the distance between the two points of a difference.
pub const STEP: f64 = 1e-5;

/// The largest difference between a gradient and its central difference, over max(1, |gradient|), over every
/// element of every parameter. `f` must be a pure function of the parameters' values, all f64.
pub fn worst_error(
    backend: &Arc<dyn Backend>,
    parameters: &[Parameter],
    f: impl Fn(&Tape) -> Result<Tensor>,
) -> Result<f64> {
    let tape = Tape::new(backend.clone());
    let y = f(&tape)?;
    let weights = normal_weights(y.shape().elements());
    let seed = backend.upload(&weights)?;
    let mut gradients = Gradients::new(backend.clone());
    tape.backward(&y, seed, &mut gradients)?;
    drop(y);

    let loss = || -> Result<f64> {
        let y = f(&Tape::inference(backend.clone()))?;
        Ok(backend.download::<f64>(y.view())?.iter().zip(&weights).map(|(y, c)| y * c).sum())
    };
    let mut worst = 0.0f64;
    for parameter in parameters {
        let value = backend.download::<f64>(parameter.tensor().view())?;
        let grad = match gradients.of(parameter) {
            Some(grad) => backend.download::<f64>(grad.view())?,
            None => vec![0.0; value.len()],
        };
        for i in 0..value.len() {
            let at = |offset: f64| -> Result<f64> {
                set(backend, parameter, i, value[i] + offset)?;
                loss()
            };
            let difference = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            set(backend, parameter, i, value[i])?;
            let error = (grad[i] - difference).abs() / grad[i].abs().max(1.0);
            // `max` forgets NaN.
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }
    Ok(worst)
}

fn set(backend: &Arc<dyn Backend>, parameter: &Parameter, i: usize, value: f64) -> Result<()> {
    parameter.update(|buffer| Ok(backend.fill(value, buffer.slice_mut(i, 1).map_err(Error::Kernel)?)?))
}

/// Fixed numbers in [−1, 1), none of them special.
fn normal_weights(n: usize) -> Vec<f64> {
    (0..n as u64).map(|i| 2.0 * f64::from(philox::unit(philox::word(11, 0, i))) - 1.0).collect()
}

/// A parameter of `dims` with fixed values in [−1, 1), in f64. For checks.
pub fn parameter(backend: &Arc<dyn Backend>, stream: u64, dims: &[usize]) -> Result<Parameter> {
    let elements = dims.iter().product::<usize>() as u64;
    let values: Vec<f64> =
        (0..elements).map(|i| 2.0 * f64::from(philox::unit(philox::word(7, stream, i))) - 1.0).collect();
    let buffer = backend.upload(&values)?;
    debug_assert_eq!(buffer.dtype(), DType::F64);
    Parameter::new(buffer, dims)
}
