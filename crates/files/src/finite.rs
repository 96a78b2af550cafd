//! Whether stored floats are numbers.

use rankfold_backend::DType;

/// The first element that is NaN or infinite: its exponent is all ones. Integers are all finite.
pub(crate) fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    // The top bytes of each little-endian element hold the exponent.
    let mask = match dtype {
        DType::F16 => 0x7c00,
        DType::Bf16 | DType::F32 => 0x7f80,
        DType::F64 => 0x7ff0,
        _ => return None,
    };
    let size = dtype.size();
    let top = |element: &[u8]| u16::from_le_bytes([element[size - 2], element[size - 1]]);
    bytes.chunks_exact(size).position(|element| top(element) & mask == mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn infinities_and_nan_are_found_in_every_type_and_the_largest_number_is_not() {
        let bytes = |dtype, x: f64| match dtype {
            DType::Bf16 => bf16::from_f64(x).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f64(x).to_le_bytes().to_vec(),
            DType::F32 => (x as f32).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let largest = [
            (DType::F64, f64::MAX),
            (DType::F32, f64::from(f32::MAX)),
            (DType::Bf16, f64::from(bf16::MAX)),
            (DType::F16, f64::from(f16::MAX)),
        ];
        for (dtype, largest) in largest {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert_eq!(first_not_finite(dtype, &[bytes(dtype, largest), bytes(dtype, bad)].concat()), Some(1));
            }
            assert_eq!(first_not_finite(dtype, &[bytes(dtype, largest), bytes(dtype, -0.0)].concat()), None);
        }
        assert_eq!(first_not_finite(DType::U32, &[255; 8]), None);
    }
}
