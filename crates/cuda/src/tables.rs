//! The formats' tables on the device, made once a backend: values, and where one code ends and the next begins.

use crate::memory::DeviceMemory;
use crate::{Argument, Driver, Result};
use rankfold_backend::{DType, DynamicMap, Format};
use std::sync::Arc;

/// Codes of a 4-bit format.
const CODES: usize = 16;
/// Values of an 8-bit map.
const VALUES: usize = 256;

/// One allocation of f32: the values and the thresholds of each format, then those of each map.
#[derive(Debug)]
pub(crate) struct Tables {
    memory: DeviceMemory,
}

impl Tables {
    /// The tables on a driver's device.
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> Result<Self> {
        let mut tables = Vec::new();
        for format in Format::ALL {
            tables.extend(format.values());
            tables.extend(padded::<CODES>(&format.thresholds().between));
        }
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            tables.extend(map.values());
            tables.extend(padded::<VALUES>(&midpoints(map)));
        }
        let memory = DeviceMemory::new(driver, None, size_of_val(&tables[..]))?;
        driver.upload(bytemuck::cast_slice(&tables), memory.address())?;
        Ok(Self { memory })
    }

    fn at(&self, element: usize) -> Argument {
        Argument::input(DType::F32, self.memory.address() + (element * size_of::<f32>()) as u64)
    }

    /// The value of each code: f32 `[16]`.
    pub(crate) fn values(&self, format: Format) -> Argument {
        self.at(format as usize * 2 * CODES)
    }

    /// The thresholds between codes in the order of [`order`]: f32 `[16]`, +∞ after the last.
    pub(crate) fn thresholds(&self, format: Format) -> Argument {
        self.at((format as usize * 2 + 1) * CODES)
    }

    /// The values of a map: f32 `[256]`.
    pub(crate) fn map(&self, map: DynamicMap) -> Argument {
        self.at(Format::ALL.len() * 2 * CODES + map as usize * 2 * VALUES)
    }

    /// The midpoints between them, rounded down: f32 `[256]`, +∞ after the last.
    pub(crate) fn midpoints(&self, map: DynamicMap) -> Argument {
        self.at(Format::ALL.len() * 2 * CODES + (map as usize * 2 + 1) * VALUES)
    }
}

/// A format's codes by ascending value, a nibble each, the least value's the lowest.
pub(crate) fn order(format: Format) -> u64 {
    format.thresholds().codes.iter().rev().fold(0, |order, code| order << 4 | u64::from(*code))
}

/// Thresholds, and behind them those that nothing exceeds.
fn padded<const N: usize>(thresholds: &[f32]) -> [f32; N] {
    std::array::from_fn(|i| thresholds.get(i).copied().unwrap_or(f32::INFINITY))
}

/// The midpoints between a map's values, each the largest f32 that is not above it: an f32 exceeds one where it exceeds
/// the other.
fn midpoints(map: DynamicMap) -> Vec<f32> {
    let midpoint = |pair: &[f32]| {
        // The sum of two neighbours is exact in f64.
        let exact = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
        let nearest = exact as f32;
        if f64::from(nearest) > exact { nearest.next_down() } else { nearest }
    };
    map.values().windows(2).map(midpoint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At every midpoint and one f32 to either side of it.
    #[test]
    fn a_rounded_midpoint_decides_as_the_exact_one() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            for (rounded, pair) in midpoints(map).into_iter().zip(map.values().windows(2)) {
                let exact = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
                for v in [rounded.next_down(), rounded, rounded.next_up(), pair[0], pair[1]] {
                    assert_eq!(v > rounded, f64::from(v) > exact, "{v} beside {exact}");
                }
            }
        }
    }

    /// Kernels leave out the clamp of v to [−1, 1].
    #[test]
    fn no_threshold_lies_at_the_ends_or_beyond() {
        let inside = |thresholds: Vec<f32>| thresholds.into_iter().all(|t| -1.0 < t && t < 1.0);
        assert!(Format::ALL.into_iter().all(|format| inside(format.thresholds().between)));
        assert!([DynamicMap::Signed, DynamicMap::Unsigned].into_iter().all(|map| inside(midpoints(map))));
    }

    #[test]
    fn a_nibble_of_the_order_is_the_code_of_that_rank() {
        assert_eq!(order(Format::Nf4), 0xfedc_ba98_7654_3210);
        for format in Format::ALL {
            for (rank, code) in format.thresholds().codes.into_iter().enumerate() {
                assert_eq!(order(format) >> (4 * rank) & 15, u64::from(code), "{format}");
            }
        }
    }
}
