//! Where NF4's table comes from (Dettmers et al. 2023, QLoRA, §3 and appendix E).
//!
//! NF4 puts its values at quantiles of N(0, 1), so that weights drawn from a normal distribution use its codes
//! about equally often. A table of quantiles alone would have no exact zero; so the two halves are built apart,
//! eight steps up from zero and seven down, and share it. With δ = 0.9677083, the offset that keeps the outermost
//! quantile finite, and Φ⁻¹ the normal quantile function:
//!
//!   positive:   Φ⁻¹(linspace(δ, ½, 9)) without the last
//!   negative:  −Φ⁻¹(linspace(δ, ½, 8)) without the last
//!
//! and zero, sorted and divided by the largest. The published bits are of this arithmetic: linspace in f32
//! ([`linspace_f32`]), Φ⁻¹ in f64, rounded to f32, divided in f32.

use rankfold_backend::linspace_f32;

/// The outermost probability: the mean of 1 − 1/(2·15) and 1 − 1/(2·16).
const OFFSET: f32 = 0.967_708_3;

/// NF4's sixteen values, ascending, derived.
pub fn nf4() -> [f32; 16] {
    let quantiles = |steps: usize| {
        let probabilities = linspace_f32(OFFSET, 0.5, steps + 1);
        probabilities.into_iter().take(steps).map(|p| normal_quantile(f64::from(p)) as f32)
    };
    let mut values = [0.0; 16];
    for (value, quantile) in values.iter_mut().zip(quantiles(7)) {
        *value = -quantile;
    }
    for (value, quantile) in values.iter_mut().rev().zip(quantiles(8)) {
        *value = quantile;
    }
    let largest = values[15];
    values.map(|value| value / largest)
}

/// Φ⁻¹(p): the x that a standard normal variable stays below with probability p, for p in (0, 1).
///
/// Wichura 1988, "Algorithm AS 241: the percentage points of the normal distribution", PPND16: a rational function
/// of q² in the middle, of √(−ln p) in the tails, accurate to about 1 part in 10¹⁶. 0 and 1 give ∓∞, anything else
/// outside NaN.
pub fn normal_quantile(p: f64) -> f64 {
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        return q * polynomial(&CENTRE.0, r) / polynomial(&CENTRE.1, r);
    }
    if p == 0.0 || p == 1.0 {
        return f64::INFINITY.copysign(q);
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let x = if r <= 5.0 {
        polynomial(&TAIL.0, r - 1.6) / polynomial(&TAIL.1, r - 1.6)
    } else {
        polynomial(&FAR_TAIL.0, r - 5.0) / polynomial(&FAR_TAIL.1, r - 5.0)
    };
    x.copysign(q)
}

/// Σ coefficients_i xⁱ, by Horner's rule.
fn polynomial(coefficients: &[f64; 8], x: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, coefficient| sum * x + coefficient)
}

/// Numerator and denominator, as published, lowest power first.
type Rational = ([f64; 8], [f64; 8]);

#[rustfmt::skip]
#[allow(clippy::excessive_precision)] // the paper's digits, so that they can be compared
const CENTRE: Rational = (
    [
        3.387_132_872_796_366_608_0e0, 1.331_416_678_917_843_774_5e2, 1.971_590_950_306_551_442_7e3,
        1.373_169_376_550_946_112_5e4, 4.592_195_393_154_987_145_7e4, 6.726_577_092_700_870_085_3e4,
        3.343_057_558_358_812_810_5e4, 2.509_080_928_730_122_672_7e3,
    ],
    [
        1.0, 4.231_333_070_160_091_125_2e1, 6.871_870_074_920_579_083_0e2, 5.394_196_021_424_751_107_7e3,
        2.121_379_430_158_659_586_7e4, 3.930_789_580_009_271_061_0e4, 2.872_908_573_572_194_267_4e4,
        5.226_495_278_852_854_561_0e3,
    ],
);

#[rustfmt::skip]
#[allow(clippy::excessive_precision)] // the paper's digits, so that they can be compared
const TAIL: Rational = (
    [
        1.423_437_110_749_683_577_34e0, 4.630_337_846_156_545_295_90e0, 5.769_497_221_460_691_405_50e0,
        3.647_848_324_763_204_605_04e0, 1.270_458_252_452_368_382_58e0, 2.417_807_251_774_506_117_70e-1,
        2.272_384_498_926_918_458_33e-2, 7.745_450_142_783_414_076_40e-4,
    ],
    [
        1.0, 2.053_191_626_637_758_821_87e0, 1.676_384_830_183_803_849_40e0, 6.897_673_349_851_000_045_50e-1,
        1.481_039_764_274_800_745_90e-1, 1.519_866_656_361_645_719_66e-2, 5.475_938_084_995_344_946_00e-4,
        1.050_750_071_644_416_843_24e-9,
    ],
);

#[rustfmt::skip]
#[allow(clippy::excessive_precision)] // the paper's digits, so that they can be compared
const FAR_TAIL: Rational = (
    [
        6.657_904_643_501_103_777_20e0, 5.463_784_911_164_114_369_90e0, 1.784_826_539_917_291_335_80e0,
        2.965_605_718_285_048_912_30e-1, 2.653_218_952_657_612_309_30e-2, 1.242_660_947_388_078_438_60e-3,
        2.711_555_568_743_487_578_15e-5, 2.010_334_399_292_288_132_65e-7,
    ],
    [
        1.0, 5.998_322_065_558_879_376_90e-1, 1.369_298_809_227_358_053_10e-1, 1.487_536_129_085_061_485_25e-2,
        7.868_691_311_456_132_591_00e-4, 1.846_318_317_510_054_681_80e-5, 1.421_511_758_316_445_888_70e-7,
        2.044_263_103_389_939_785_64e-15,
    ],
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rankfold_backend::Format;

    #[test]
    fn nf4s_table_is_derived_bit_for_bit() {
        assert_eq!(nf4().map(f32::to_bits), Format::Nf4.values().map(f32::to_bits));
    }

    #[test]
    fn the_offset_is_the_papers() {
        let mean = ((1.0 - 1.0 / 30.0) + (1.0 - 1.0 / 32.0)) / 2.0;
        assert!((f64::from(OFFSET) - mean).abs() < 1e-7, "published with seven digits: {mean}");
    }

    /// Φ(x) − ½ = φ(x) (x + x³/3 + x⁵/(3·5) + …) (Marsaglia 2004, "Evaluating the normal distribution"): for x > 0
    /// all terms are positive, so that nothing cancels.
    fn probability_between_0_and(x: f64) -> f64 {
        let (mut term, mut sum, mut odd) = (x, x, 1.0);
        while term.abs() > 1e-20 * sum.abs() {
            odd += 2.0;
            term *= x * x / odd;
            sum += term;
        }
        sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    }

    proptest! {
        /// Over the middle, where p − ½ is exact and Φ's series has full relative accuracy. An error of ε in x moves
        /// Φ(x) − ½ by φ(x)·ε·x, less than ε·|Φ(x) − ½| since φ falls away from 0; the series adds some 50 roundings
        /// of 2⁻⁵³, AS 241 its 10⁻¹⁶ and 20 roundings: 100·2⁻⁵³ in all, 1.2e-14.
        #[test]
        fn the_quantile_inverts_the_distribution(q in -0.499f64..0.499) {
            let back = probability_between_0_and(normal_quantile(0.5 + q));
            // 0.5 + q rounds: the test asks for what the function was given.
            let asked = (0.5 + q) - 0.5;
            prop_assert!((back - asked).abs() <= 1.2e-14 * asked.abs(), "{back} for {asked}");
        }
    }

    /// 1 − Φ(x) = φ(x)/(x + 1/(x + 2/(x + 3/…))) (Laplace 1805), which converges for x > 0.
    fn probability_above(x: f64) -> f64 {
        let mills = (1..400).rev().fold(x, |tail, k| x + f64::from(k) / tail);
        (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt() / mills
    }

    /// x² rounds before the exponential, which moves the probability by x²/2·2⁻⁵³ and so, its logarithm having a
    /// slope of at least x, the quantile by x/2·2⁻⁵³; the other roundings of the continued fraction (which do not
    /// grow along it), of AS 241 and of its logarithm and root are some dozens: 90·2⁻⁵³·x in all, 10⁻¹⁴·x.
    #[test]
    fn the_tails_are_as_exact_as_the_middle() {
        for i in 8..=148 {
            let x = f64::from(i) / 4.0;
            let quantile = normal_quantile(probability_above(x));
            assert!((quantile + x).abs() < 1e-14 * x, "{quantile} for −{x}");
        }
    }

    #[test]
    fn the_ends_are_infinite_and_beyond_them_is_nothing() {
        assert_eq!(normal_quantile(0.0), f64::NEG_INFINITY);
        assert_eq!(normal_quantile(1.0), f64::INFINITY);
        assert!([-0.5, 1.5, f64::NAN].into_iter().all(|p| normal_quantile(p).is_nan()));
    }
}
