//! Where one code ends and the next begins: every table and every threshold of the formats, derived.
//!
//! The nearest of two neighbouring values a < b changes at their midpoint t; v takes the upper one where v > t, so a
//! tie takes the lower. In 4 bits t = (a + b)·½ in f32: the sum rounds once, the halving is exact. In 8 bits t is the
//! midpoint itself: the sum of two neighbours of a map is exact in f64.
//!
//! The values: NF4's are quantiles ([`crate::derive::nf4`]). FP4 is a sign, a two-bit exponent e and one bit m of
//! fraction, read as bitsandbytes reads them, in twelfths:
//!
//!   e = 0: m/16      e = 1, 2, 3: 2^(4 − e)·(1 + m/2)
//!
//! so 0, 1/16, 8, 12, 4, 6, 2, 3 of twelve; a larger e is a smaller number. Int4 is (c − 8)/7 for c from 1 on.

use crate::derive::nf4;
use rankfold_backend::{DynamicMap, Format, Thresholds};

/// FP4's value of each code. The zero of sign 1 is +0.
pub fn fp4() -> [f32; 16] {
    std::array::from_fn(|code| {
        let (negative, e, m) = (code & 8 != 0, code >> 1 & 3, (code & 1) as f32);
        let twelfths = if e == 0 { m / 16.0 } else { 2f32.powi(4 - e as i32) * (1.0 + m / 2.0) };
        let magnitude = twelfths / 12.0;
        if negative && magnitude > 0.0 { -magnitude } else { magnitude }
    })
}

/// Int4's value of each code; code 0, which is never written, decodes as code 1.
pub fn int4() -> [f32; 16] {
    std::array::from_fn(|code| (code.max(1) as f32 - 8.0) / 7.0)
}

/// The codes of a format in the order of their values, equal values in that of their codes, and the thresholds
/// between them.
pub fn four_bits(format: Format) -> Thresholds {
    let (values, unused) = match format {
        Format::Nf4 => (nf4(), 0),
        Format::Fp4 => (fp4(), 0),
        Format::Int4 => (int4(), 1),
    };
    let mut codes: Vec<u8> = (unused..16).collect();
    codes.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
    let value = |code: u8| values[usize::from(code)];
    let between = codes.windows(2).map(|pair| (value(pair[0]) + value(pair[1])) * 0.5).collect();
    Thresholds { codes, between }
}

/// The 255 midpoints of a dynamic map.
pub fn eight_bits(map: DynamicMap) -> Vec<f64> {
    map.values().windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: [DynamicMap; 2] = [DynamicMap::Signed, DynamicMap::Unsigned];

    #[test]
    fn fp4s_and_int4s_tables_are_derived_bit_for_bit() {
        assert_eq!(fp4().map(f32::to_bits), Format::Fp4.values().map(f32::to_bits));
        assert_eq!(int4().map(f32::to_bits), Format::Int4.values().map(f32::to_bits));
    }

    #[test]
    fn every_four_bit_threshold_is_derived_bit_for_bit() {
        for format in Format::ALL {
            let (derived, table) = (four_bits(format), format.thresholds());
            let bits = |thresholds: &[f32]| thresholds.iter().map(|t| t.to_bits()).collect::<Vec<_>>();
            assert_eq!(derived.codes, table.codes, "{format}");
            assert_eq!(bits(&derived.between), bits(&table.between), "{format}");
        }
    }

    /// The literals in the Triton kernels of bitsandbytes 0.50.2, in ascending order. Its NF4 figures are ours or their
    /// f32 neighbours (its CPU path has ours, as the golden vectors show); its FP4 figures have six to eight digits, so
    /// 5·10⁻⁷ of them.
    #[test]
    #[allow(clippy::excessive_precision)] // the digits as published
    fn the_thresholds_are_the_published_ones() {
        let nf4: [f32; 15] = [
            -0.848_096_400_499_343_9,
            -0.610_632_926_225_662_2,
            -0.459_995_269_775_390_6,
            -0.339_679_434_895_515_44,
            -0.234_607_405_960_559_84,
            -0.137_911_733_239_889_14,
            -0.045_525_018_125_772_476,
            0.039_790_149_778_127_67,
            0.120_255_250_483_751_3,
            0.203_521_251_678_466_8,
            0.292_013_771_831_989_3,
            0.389_312_535_524_368_3,
            0.501_663_416_624_069_2,
            0.642_786_920_070_648_2,
            0.861_478_418_111_801_1,
        ];
        let ours = Format::Nf4.thresholds().between;
        for (ours, theirs) in ours.iter().zip(nf4) {
            assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1, "{ours}, published as {theirs}");
        }
        let fp4 = [0.002_604_17f32, 0.085_937_5, 0.208_333_33, 0.291_666_67, 0.416_666_7, 0.583_333, 0.833_333_3];
        let positive: Vec<f32> = Format::Fp4.thresholds().between.into_iter().filter(|t| *t > 0.0).collect();
        assert_eq!(positive.len(), fp4.len());
        assert!(positive.iter().zip(fp4).all(|(ours, theirs)| (ours - theirs).abs() < 5e-7), "{positive:?}");
    }

    /// |t − midpoint| is at most half an ulp of the sum, halved: 2⁻²⁵ for sums below 2.
    #[test]
    fn a_four_bit_threshold_is_the_midpoint_rounded_once() {
        for format in Format::ALL {
            let Thresholds { codes, between } = format.thresholds();
            let value = |i: usize| f64::from(format.values()[usize::from(codes[i])]);
            for (i, t) in between.into_iter().enumerate() {
                let midpoint = (value(i) + value(i + 1)) / 2.0;
                assert!((f64::from(t) - midpoint).abs() <= 2f64.powi(-25), "{format}: {t} for {midpoint}");
                let apart = value(i) < f64::from(t) && f64::from(t) < value(i + 1);
                assert!(apart || (codes[i], codes[i + 1]) == (0, 8), "{format}: {t} is not between its neighbours");
            }
        }
    }

    /// The maps again, from their definition in f64: linspace, mean, power of ten and product round some six times in
    /// f32, which leaves them within 6 · 2⁻²⁴ of it.
    #[test]
    fn the_dynamic_maps_are_the_definitions() {
        for map in MAPS {
            let mut expected = vec![0.0, 1.0];
            for i in 0..7 {
                let n = 1 << if map == DynamicMap::Signed { i } else { i + 1 };
                for k in 0..n {
                    let value = (0.1 + 0.9 * (f64::from(k) + 0.5) / f64::from(n)) * 10f64.powi(i - 6);
                    expected.push(value);
                    if map == DynamicMap::Signed {
                        expected.push(-value);
                    }
                }
            }
            expected.sort_by(f64::total_cmp);
            assert_eq!(expected.len(), 256);
            for (found, expected) in map.values().iter().zip(expected) {
                let error = (f64::from(*found) - expected).abs();
                assert!(error <= 6.0 * 2f64.powi(-24) * expected.abs(), "{map:?}: {found} for {expected}");
            }
        }
    }

    /// What is added to a value comes off again, so nothing was rounded away.
    #[test]
    fn an_eight_bit_threshold_is_the_exact_midpoint() {
        for map in MAPS {
            let midpoints = eight_bits(map);
            for (t, pair) in midpoints.iter().zip(map.values().windows(2)) {
                let [a, b] = [pair[0], pair[1]].map(f64::from);
                assert!(2.0 * t - a == b && 2.0 * t - b == a && a < *t && *t < b, "{map:?}: {t} for {a} and {b}");
            }
        }
    }

    /// The parts of absmax that an element can be off by: half of NF4's gap from −1 to −0.6962, of FP4's third, of
    /// Int4's seventh. An ulp of rounding in the tables.
    #[test]
    fn the_worst_errors_are_half_the_widest_gaps() {
        let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() <= 2f64.powi(-24);
        assert!(close(Format::Nf4.worst_error(), (1.0 - 0.696_192_800_998_687_7) / 2.0));
        assert!(close(Format::Fp4.worst_error(), 1.0 / 6.0));
        assert!(close(Format::Int4.worst_error(), 1.0 / 14.0));
        // The widest gaps of the maps are a 64th and a 128th of 0.9; the signed one has no −1.
        assert!(close(DynamicMap::Signed.worst_error(), 0.9 / 128.0));
        assert!(close(DynamicMap::Unsigned.worst_error(), 0.9 / 256.0));
    }
}
