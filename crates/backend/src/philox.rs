//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based random numbers.
//!
//! The number at a position is a pure function of (seed, stream, position), so that every backend and every thread
//! count draws the same numbers, and a recomputed forward pass draws them again.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds on a 128-bit counter under a 64-bit key.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |i: usize, word: u32| u64::from(MULTIPLIER[i]) * u64::from(word);
        let (p0, p1) = (product(0, counter[0]), product(1, counter[2]));
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The four words for positions 4·`group` … 4·`group` + 3 of `stream`.
pub fn words(seed: u64, stream: u64, group: u64) -> [u32; 4] {
    let halves = |v: u64| [v as u32, (v >> 32) as u32];
    let ([c0, c1], [c2, c3]) = (halves(group), halves(stream));
    philox4x32_10([c0, c1, c2, c3], halves(seed))
}

/// The word at `position` of `stream`.
pub fn word(seed: u64, stream: u64, position: u64) -> u32 {
    words(seed, stream, position / 4)[(position % 4) as usize]
}

/// A number in [0, 1) from a word: its upper 24 bits, exactly representable in f32.
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// The `i`th number of `stream` from N(0, 1), from the first two words of group `i` (Box & Muller 1958): √(−2 ln u)·cos
/// 2πv, u in (0, 1], for the logarithm of 0 is not wanted.
pub fn normal(seed: u64, stream: u64, i: u64) -> f64 {
    let [a, b, ..] = words(seed, stream, i);
    let (u, v) = ((f64::from(a) + 1.0) / 4_294_967_296.0, f64::from(b) / 4_294_967_296.0);
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let n = 40_000;
        let draws: Vec<f64> = (0..n).map(|i| normal(3, 1, i)).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / n as f64;
        // Five standard errors: 5/√n of the mean, 5·√(2/n) of the variance.
        assert!(mean.abs() < 0.025 && (variance - 1.0).abs() < 0.036, "{mean} {variance}");
    }

    /// The known answers of the authors' Random123 distribution.
    #[test]
    fn equals_the_published_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }
}
