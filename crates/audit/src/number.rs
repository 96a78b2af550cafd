//! Numbers as people read them.

/// Four significant digits; powers of ten where there would be too many zeros.
pub(crate) fn short(x: f64) -> String {
    if x == 0.0 {
        return "0".into();
    }
    if !(1e-4..1e5).contains(&x.abs()) {
        return format!("{x:.2e}");
    }
    let digits = (3 - x.abs().log10().floor() as i32).max(0) as usize;
    format!("{x:.digits$}")
}

/// 1234567 → "1,234,567".
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A part of a bound as a percentage, rounded down: 100 % appears only where the bound is reached.
pub(crate) fn part(x: f64) -> String {
    format!("{:.4} %", (x * 1e6).floor() / 1e4)
}

/// Decibels, or a dash where there is no noise to compare with.
pub(crate) fn decibels(snr: Option<f64>) -> String {
    snr.map_or_else(|| "–".into(), |snr| format!("{snr:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits_and_counts_are_grouped() {
        assert_eq!([0.0, 0.0727981, 12.3456, -0.5, 1234.5].map(short), ["0", "0.07280", "12.35", "-0.5000", "1234"]);
        assert_eq!([0.999_999_9, 0.5, 1.0].map(part), ["99.9999 %", "50.0000 %", "100.0000 %"]);
        assert_eq!([3.21e-7, 1.5e9].map(short), ["3.21e-7", "1.50e9"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
    }
}
