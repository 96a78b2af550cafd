//! The bound that no weight's error can pass, and why.
//!
//! **Plain scales.** A block of absmax a is scaled by r = fl(1/a), v = fl(w·r) is clamped to \[−1, 1\] and given the
//! nearest value c of the format, and ŵ = fl(c·a). With h half the widest gap between neighbouring values and
//! u = 2⁻²⁴ the unit of f32's rounding:
//!
//! - |v − w/a| ≤ 2u + u²: two roundings of a number of at most 1;
//! - |c − v| ≤ h + u/2: thresholds are midpoints rounded to f32, all below 1;
//! - |ŵ − c·a| ≤ u·a: one rounding.
//!
//! Together |ŵ − w| ≤ a·(h + 3½u + u²) < **a·(h + 2⁻²²)**, with u/2 left for the rounding of h itself and for
//! products that underflow (at most 2⁻¹⁵⁰, and a ≥ 2⁻¹²⁶). Above a = 2¹²⁶ the reciprocal is subnormal and its own
//! rounding reaches 2⁻²²: there 2⁻²¹ takes the place of 2⁻²². Below 2⁻¹²⁶ the kernels divide by no less than 10⁻³⁸
//! and |v| may stay below 1: then only "ŵ has w's sign or is 0, and neither passes a" is left, so |ŵ − w| ≤ a.
//!
//! **Double quantisation.** The scales of 256 blocks, less their offset o, are themselves quantised blockwise in
//! 8 bits with nested absmax n: y = fl(a − o), a' = fl(fl(m·n) + o), m the nearest of the signed dynamic map's
//! values. By the same reasoning |m·n − y| ≤ n·(h₈ + 2⁻²²), where h₈ is half the map's widest gap (the map lacks −1,
//! whose distance to the lowest value counts too); the subtraction adds u·n and the addition u·(n + |o|). So
//!
//!   |a' − a| ≤ **d = n·(h₈ + 2⁻²²) + n·2⁻²² + |o|·2⁻²³**.
//!
//! The codes are those of plain scales, ŵ' = fl(c·a') and its rounding is at most u·|c|·(a + d), of which the plain
//! bound holds the part of a already:
//!
//!   |ŵ' − w| ≤ **a·(h + 2⁻²²) + |c|·d·(1 + 2⁻²³) + 2⁻¹⁴⁹**.
//!
//! Weights in bf16 and f16 are exact in f32; bounds are formed in f64, whose own roundings the slack above covers.

use rankfold_backend::{DynamicMap, Format, NESTED_BLOCK};

const TWO_POW_MINUS_21: f64 = 1.0 / (1u64 << 21) as f64;
const TWO_POW_MINUS_22: f64 = TWO_POW_MINUS_21 / 2.0;
const TWO_POW_MINUS_23: f64 = TWO_POW_MINUS_21 / 4.0;
/// The smallest positive f32.
const TINY: f64 = f32::from_bits(1) as f64;
/// 2¹²⁶: beyond it a reciprocal is subnormal.
const HUGE: f64 = 1.0 / f32::MIN_POSITIVE as f64;

/// The bound of the errors in one block: `fixed` + |c|·`per_value` for a weight whose code has the value c.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// What every weight of the block may be off.
    pub fixed: f64,
    /// What a weight may be off in proportion to its code's value: the scale's own error.
    pub per_value: f64,
}

impl Bound {
    /// Of a weight whose code has this value.
    pub fn of(&self, value: f64) -> f64 {
        self.fixed + value.abs() * self.per_value
    }
}

/// The bounds of one format.
#[derive(Clone, Copy, Debug)]
pub struct Certificate {
    half_gap: f64,
    half_gap_8bit: f64,
}

impl Certificate {
    /// For weights in `format`.
    pub fn new(format: Format) -> Self {
        Self { half_gap: format.worst_error().into(), half_gap_8bit: DynamicMap::Signed.worst_error().into() }
    }

    /// Of a block with the scale `absmax`, kept as it is.
    pub fn single(&self, absmax: f32) -> Bound {
        Bound { fixed: blockwise(self.half_gap, absmax), per_value: 0.0 }
    }

    /// Of a block with the scale `absmax`, quantised with others under the scale `nested`, less `offset`.
    pub fn double(&self, absmax: f32, nested: f32, offset: f32) -> Bound {
        let (n, o) = (f64::from(nested), f64::from(offset).abs());
        let scale = blockwise(self.half_gap_8bit, nested) + n * TWO_POW_MINUS_22 + o * TWO_POW_MINUS_23;
        Bound { fixed: blockwise(self.half_gap, absmax) + TINY, per_value: scale * (1.0 + TWO_POW_MINUS_23) }
    }

    /// The bounds of all blocks: with the `nested` scales and their offset, or without.
    pub(crate) fn blocks(&self, absmax: &[f32], nested: Option<(&[f32], f32)>) -> Vec<Bound> {
        let bound = |(i, &absmax): (usize, &f32)| match nested {
            None => self.single(absmax),
            Some((scales, offset)) => self.double(absmax, scales[i / NESTED_BLOCK], offset),
        };
        absmax.iter().enumerate().map(bound).collect()
    }
}

/// Blockwise quantisation to values whose widest gap is twice `half_gap`, under a scale `absmax`.
fn blockwise(half_gap: f64, absmax: f32) -> f64 {
    let absmax = f64::from(absmax);
    if absmax < f64::from(f32::MIN_POSITIVE) {
        absmax
    } else if absmax <= HUGE {
        absmax * (half_gap + TWO_POW_MINUS_22)
    } else {
        absmax * (half_gap + TWO_POW_MINUS_21)
    }
}
