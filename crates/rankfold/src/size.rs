//! Amounts of memory as people write them: `512 MiB`, `1.5GiB`, `4096` (bytes).

use crate::show;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Units by name, the longest first.
const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Bytes. As text it keeps the spelling that it was given in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size {
    text: String,
    bytes: u64,
}

impl Size {
    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}': expected a size like 512MiB, 1.5GiB (KiB, MiB, GiB or TiB), above 0");
        let unit = UNITS.iter().find_map(|(name, bytes)| Some((text.strip_suffix(name)?, *bytes)));
        let (number, unit) = unit.unwrap_or((text, 1));
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        let bytes = number * unit as f64;
        // Beyond 2⁵³ not every number of bytes is an f64; no machine has as many.
        if !(1.0..=(1u64 << 53) as f64).contains(&bytes) {
            return Err(wrong());
        }
        Ok(Self { text: text.into(), bytes: bytes as u64 })
    }
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.text
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show::bytes(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_and_fractions_are_read() {
        for (text, bytes) in
            [("1", 1), ("4096", 4096), ("1KiB", 1024), ("2 MiB", 2 << 20), ("1.5GiB", 3 << 29), ("0.5TiB", 1 << 39)]
        {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_was_expected() {
        for text in ["", "MiB", "0", "0.4", "-1GiB", "4GB", "4 gib", "NaN", "inf", "1e300GiB", "GiB4"] {
            let why = text.parse::<Size>().unwrap_err();
            assert!(why.contains(text) && why.contains("expected"), "{why}");
        }
    }

    #[test]
    fn a_size_in_a_file_is_the_text_that_was_given() {
        let size: Size = "1.5GiB".parse().unwrap();
        let table = toml::Table::from_iter([("size".to_owned(), toml::Value::try_from(&size).unwrap())]);
        assert_eq!(table.to_string().trim(), "size = \"1.5GiB\"");
        assert_eq!(table["size"].clone().try_into::<Size>().unwrap(), size);
    }
}
