//! Dropout (Srivastava et al. 2014), inverted: y_i = x_i / (1 − p) where kept, 0 where dropped.
//!
//! Element i is kept where the Philox word at position i of the stream is at least p·2³²: the mask is a function of
//! (seed, stream, i) and is never stored. dx_i = dy_i / (1 − p) where kept: the same kernel on dy.

use crate::operands::Kernel;
use rankfold_backend::params::Dropout;
use rankfold_backend::philox;
use rankfold_backend::{Result, View, ViewMut};

/// y = dropout(x).
pub(crate) fn dropout(p: &Dropout, x: View, mut y: ViewMut) -> Result<()> {
    p.check(&x, &y)?;
    let kernel = Kernel("dropout");
    let x = kernel.floats("x", x)?;
    kernel.floats_mut("y", &mut y)?.store(dropped(p, &x));
    Ok(())
}

/// The same on numbers, numbered from 0.
pub(crate) fn dropped(p: &Dropout, x: &[f64]) -> Vec<f64> {
    let (threshold, keep_scale) = (p.threshold(), f64::from(p.keep_scale()));
    let kept = |i: usize| philox::word(p.seed, p.stream, i as u64) >= threshold;
    x.iter().enumerate().map(|(i, &x)| if kept(i) { x * keep_scale } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Dropout = Dropout { probability: 0.25, seed: 7, stream: 3 };

    #[test]
    fn a_mask_is_a_function_of_seed_and_stream_and_position() {
        let ones = vec![1.0; 64];
        let mask = dropped(&P, &ones);
        assert_eq!(mask, dropped(&P, &ones));
        assert_eq!(mask[..10], dropped(&P, &ones[..10]));
        assert_ne!(mask, dropped(&Dropout { stream: 4, ..P }, &ones));
        assert_ne!(mask, dropped(&Dropout { seed: 8, ..P }, &ones));
    }

    /// The number dropped of n is binomial: within 6 standard deviations, √(n p (1 − p)), of n·p (two in 10⁹).
    #[test]
    fn drops_its_share_and_keeps_the_mean() {
        let n = 100_000;
        let mask = dropped(&P, &vec![1.0; n]);
        let dropped = mask.iter().filter(|&&y| y == 0.0).count() as f64;
        let (mean, deviation) = (n as f64 * 0.25, (n as f64 * 0.25 * 0.75).sqrt());
        assert!((dropped - mean).abs() < 6.0 * deviation, "{dropped} dropped, expected about {mean}");
        assert!(mask.iter().all(|&y| y == 0.0 || y == f64::from(P.keep_scale())));
    }

    #[test]
    fn probability_zero_is_the_identity() {
        let x = [1.5, -2.0, f64::MIN_POSITIVE];
        assert_eq!(dropped(&Dropout { probability: 0.0, ..P }, &x), x);
    }
}
