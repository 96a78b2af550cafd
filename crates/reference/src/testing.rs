//! What the operations' tests share: f64 buffers, numbers to fill them, and the finite-difference check.

use crate::ReferenceBackend;
use rankfold_backend::{Backend, Buffer, DType, philox};

/// The backend as the contract sees it.
pub(crate) const BACKEND: &dyn Backend = &ReferenceBackend;

/// A buffer of f64.
pub(crate) fn buffer(values: &[f64]) -> Buffer {
    BACKEND.upload(values).unwrap()
}

/// A buffer of f64 to be written: NaN, so that an element left out shows.
pub(crate) fn output(len: usize) -> Buffer {
    BACKEND.filled(DType::F64, len, f64::NAN).unwrap()
}

/// What an f64 buffer holds.
pub(crate) fn values(buffer: &Buffer) -> Vec<f64> {
    BACKEND.download(buffer.view()).unwrap()
}

/// `len` numbers in [−1, 1), others for every `stream`.
pub(crate) fn numbers(stream: u64, len: usize) -> Vec<f64> {
    let number = |i: usize| f64::from(philox::unit(philox::word(1, stream, i as u64))) * 2.0 - 1.0;
    (0..len).map(number).collect()
}

/// Σ x_i y_i: the loss that turns an output into a number, y being the gradient fed to backward.
pub(crate) fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// That `gradient` is the derivative of `loss` at `x`.
///
/// A central difference of step h = 10⁻⁵ is off by h²/6·|loss'''| and by the loss's own rounding over h. The tests'
/// losses are sums of a few dozen terms of size 1 with third derivatives below 10³ and some 10² roundings of
/// 2⁻⁵³: 2·10⁻⁸ + 10⁻⁹, so 10⁻⁷ separates a right gradient from a wrong one.
pub(crate) fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    let h = 1e-5;
    assert_eq!(x.len(), gradient.len(), "{what}");
    for i in 0..x.len() {
        let at = |step: f64| {
            let mut moved = x.to_vec();
            moved[i] += step;
            loss(&moved)
        };
        let difference = (at(h) - at(-h)) / (2.0 * h);
        assert!((gradient[i] - difference).abs() < 1e-7, "{what}: d {i} is {}, expected {difference}", gradient[i]);
    }
}

/// That two results of the same real-number formula, whose terms are of size 1, differ by roundings alone: a few
/// hundred of 2⁻⁵³ at the most in the tests' sizes, below 10⁻¹³.
pub(crate) fn assert_close(what: &str, x: &[f64], y: &[f64]) {
    assert_eq!(x.len(), y.len(), "{what}");
    for (i, (x, y)) in x.iter().zip(y).enumerate() {
        assert!((x - y).abs() < 1e-13, "{what}: element {i} is {x}, expected {y}");
    }
}
