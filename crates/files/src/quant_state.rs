//! What bitsandbytes says of a 4-bit weight, in JSON in a tensor of bytes beside it.
//!
//! ```text
//! {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 192],
//!  "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.2585652768611908}
//! ```
//!
//! on one line, the nested fields only where the scales are quantised too (checked against files that bitsandbytes
//! 0.50.2 wrote). The name of the tensor ends in the maker and the format; Int4, which bitsandbytes does not have,
//! is ours.

use crate::pairs::Object;
use rankfold_backend::{DType, Format, NESTED_BLOCK};
use serde::Deserialize;
use std::fmt::Write;

/// The description of a 4-bit weight.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// What the codes mean.
    pub format: Format,
    /// Elements a block: a power of two from 32 to 4096.
    pub block: usize,
    /// f32, bf16 or f16: what the weight was before, and to which dequantised values are rounded.
    pub dtype: DType,
    /// \[outputs, inputs\].
    pub shape: [usize; 2],
    /// With double quantisation, the mean of the scales; finite.
    pub offset: Option<f32>,
}

/// The JSON as it stands.
#[derive(Deserialize)]
struct Json {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// The longest text of a state: its words, two sizes and a block of at most 20 digits, and an offset of at most 24
/// characters (17 digits, point, two signs, "e" and an exponent of two: an f32's is above −46).
pub(crate) const MAX_TEXT: usize = 300;

impl QuantState {
    /// The end of the name of the tensor that holds a state of this format: `NAME.` and this.
    pub fn key(format: Format) -> String {
        let maker = match format {
            Format::Nf4 | Format::Fp4 => "bitsandbytes",
            Format::Int4 => "rankfold",
        };
        format!("quant_state.{maker}__{format}")
    }

    /// Parse the tensor's bytes.
    ///
    /// Errors, as a sentence for [`crate::Error::QuantState`]: no such JSON; an unknown format, block or type; a
    /// shape that is not of two dimensions or whose product overflows; nested fields that are not all there.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let Object(json): Object<Json> =
            serde_json::from_slice(json).map_err(|e| format!("its quantisation state: {e}"))?;
        let format = json.quant_type.parse()?;
        let block = json.blocksize;
        if !(block.is_power_of_two() && (32..=4096).contains(&block)) {
            return Err(format!("blocksize {block}, expected a power of two from 32 to 4096"));
        }
        let dtype = parse_dtype(&json.dtype)?;
        let Ok(shape) = <[usize; 2]>::try_from(json.shape.as_slice()) else {
            return Err(format!("shape {:?}, expected two dimensions", json.shape));
        };
        if shape[0].checked_mul(shape[1]).is_none() {
            return Err(format!("shape {shape:?} has more elements than a machine can hold"));
        }
        let offset = match (json.nested_blocksize, json.nested_dtype.as_deref(), json.nested_offset) {
            (None, None, None) => None,
            (Some(NESTED_BLOCK), Some("float32"), Some(offset)) => {
                // The text is the shortest decimal of an f64 that is an f32. Parsing it may miss that f64 by an
                // f64 ulp, 2⁻²⁹ of an f32 ulp, so rounding to f32 finds the f32 that was written.
                let offset = offset as f32;
                if !offset.is_finite() {
                    return Err("nested_offset is beyond the range of f32".into());
                }
                Some(offset)
            }
            (block, dtype, offset) => {
                let found = format!("nested_blocksize {block:?}, nested_dtype {dtype:?}, nested_offset {offset:?}");
                return Err(format!("{found}: expected {NESTED_BLOCK}, \"float32\" and a number, or none of them"));
            }
        };
        Ok(Self { format, block, dtype, shape, offset })
    }

    /// The tensor's bytes, as bitsandbytes writes them.
    pub fn to_json(&self) -> String {
        let Self { format, block, shape: [outputs, inputs], .. } = self;
        let dtype = dtype_name(self.dtype);
        let mut json = format!(
            r#"{{"quant_type": "{format}", "blocksize": {block}, "dtype": "{dtype}", "shape": [{outputs}, {inputs}]"#
        );
        if let Some(offset) = self.offset {
            let offset = python_repr(f64::from(offset));
            // Writing to a String cannot fail.
            let _ = write!(
                json,
                r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#
            );
        }
        json.push('}');
        json
    }
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    [DType::F32, DType::Bf16, DType::F16]
        .into_iter()
        .find(|&dtype| dtype_name(dtype) == name)
        .ok_or_else(|| format!("dtype '{name}', expected float32, bfloat16 or float16"))
}

/// A finite number as Python writes it: the shortest digits that read back as the same f64, in plain notation for
/// exponents from −4 to 15, else with an exponent of at least two digits.
fn python_repr(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(-4..16) => format!("{x:?}"),
        Ok(e) => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
        Err(_) => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As CPython 3 prints them.
    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (x, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (f64::from(0.258_625_27_f32), "0.2586252689361572"),
            (f64::from(1e-4_f32), "9.999999747378752e-05"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            (f64::from(f32::MIN_POSITIVE), "1.1754943508222875e-38"),
            (f64::from(f32::from_bits(1)), "1.401298464324817e-45"),
        ] {
            assert_eq!(python_repr(x), text);
        }
    }

    proptest! {
        #[test]
        fn a_state_survives_its_text(
            format in prop::sample::select(Format::ALL.to_vec()),
            log_block in 5u32..=12,
            dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
            shape in prop::array::uniform2(0usize..1 << 31),
            offset in prop::option::of(any::<f32>().prop_filter("finite", |x| x.is_finite())),
        ) {
            let state = QuantState { format, block: 1 << log_block, dtype, shape, offset };
            let json = state.to_json();
            prop_assert!(json.len() <= MAX_TEXT);
            let read = QuantState::parse(json.as_bytes()).unwrap();
            prop_assert_eq!(read.offset.map(f32::to_bits), offset.map(f32::to_bits));
            prop_assert_eq!(read, state);
        }

        #[test]
        fn any_bytes_are_a_state_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = QuantState::parse(&bytes);
        }
    }

    const WHOLE: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 192], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}"#;

    #[test]
    fn a_state_is_an_object() {
        let fields = r#"["nf4", 64, "float32", [64, 192], 256, "float32", 0.25]"#;
        for (text, found) in [(fields, "sequence"), ("[]", "sequence"), ("null", "null"), ("3", "integer")] {
            let error = QuantState::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(found) && error.contains("expected an object"), "{text}: {error}");
        }
    }

    #[test]
    fn every_field_is_checked() {
        assert!(QuantState::parse(WHOLE.as_bytes()).is_ok());
        for (whole, broken, message) in [
            ("nf4", "nf5", "unknown 4-bit format 'nf5'"),
            (": 64,", ": 48,", "blocksize 48"),
            (": 64,", ": 8192,", "blocksize 8192"),
            (": 64,", ": -64,", "quantisation state"),
            ("float32\", \"shape", "float64\", \"shape", "dtype 'float64'"),
            ("[64, 192]", "[64]", "two dimensions"),
            ("[64, 192]", "[6442450944, 6442450944]", "more elements"),
            ("blocksize\": 256", "blocksize\": 128", "expected 256"),
            ("\"nested_blocksize\": 256, ", "", "nested_blocksize None"),
            ("float32\", \"nested", "bfloat16\", \"nested", "nested_dtype Some(\"bfloat16\")"),
            ("0.25", "1e39", "range of f32"),
            ("0.25", "NaN", "quantisation state"),
            ("0.25", "null", "nested_offset None"),
            ("\"shape\"", "\"blocksize\"", "duplicate field"),
            ("0.25}", "0.25", "EOF"),
        ] {
            assert!(WHOLE.contains(whole), "{whole}");
            let error = QuantState::parse(WHOLE.replacen(whole, broken, 1).as_bytes()).unwrap_err();
            assert!(error.contains(message), "{broken}: {error}");
        }
    }
}
