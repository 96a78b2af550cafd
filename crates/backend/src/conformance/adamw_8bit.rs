//! AdamW with moments in 8 bits, step after step, each compared from the state that the candidate itself has reached.
//!
//! Decoding is exact to the bit. So the oracle's [`Backend::adamw`] on the decoded moments gives what is exact, and
//! what adamw.rs derives holds for the new param, and for the new moments before they are encoded: x̃ for x with
//! |x̃ − x| ≤ e.
//!
//! **absmax** a is the largest |x̃| of a block as it is: it lies between the largest |x| − e and the largest |x| + e.
//!
//! **Codes.** v = x̃/a, with the reciprocal and the product rounded: |v·a − x̃| ≤ γ₂|x̃|, since 2⁻¹²⁶ ≤ a ≤ 2¹²⁶ here
//! (the clamp brings v nearer). The code c is the nearest to v: for every code k
//!
//!   |map\[c\]·a − x| ≤ |map\[c\] − v|·a + |v·a − x| ≤ |map\[k\] − v|·a + |v·a − x| ≤ |map\[k\]·a − x| + 2|v·a − x|,
//!   |v·a − x| ≤ γ₂|x̃| + e ≤ γ₂(|x| + e) + e
//!
//! so no value of the map is nearer to x than the one chosen, but for twice that. With the map's worst error G
//! ([`DynamicMap::worst_error`]) that is |map\[c\]·a − x| ≤ a·G + e and twice the same; of a small x it asks much more.
//! In a zero block 10⁻³⁸ stands for a, as in the formula: its codes are those of 0.
//!
//! **A v that is not 0** is none of those: v > 0 exactly where x is, as e is a part of x, and then c ≥ 1. The nearest
//! is of the other values: where 0 was nearer, the least of them is.

use super::adamw;
use super::bound::gamma;
use super::draw::{Draw, abs, length};
use super::harness::*;
use crate::params::{AdamW, MOMENT_BLOCK, Moment};
use crate::{Backend, DynamicMap};
use proptest::prelude::*;

/// A moment on the host.
struct Coded {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Coded {
    fn decode(&self, map: DynamicMap) -> Vec<f32> {
        let value = |(i, code): (usize, &u8)| map.values()[usize::from(*code)] * self.absmax[i / MOMENT_BLOCK];
        self.codes.iter().enumerate().map(value).collect()
    }
}

struct State {
    param: Vec<f32>,
    m: Coded,
    v: Coded,
}

impl Bits for State {
    fn bits(&self) -> Vec<u8> {
        let scales = [&self.param, &self.m.absmax, &self.v.absmax].map(|x| bytemuck::cast_slice::<f32, u8>(x));
        [&scales.concat()[..], &self.m.codes, &self.v.codes].concat()
    }
}

fn call(backend: &dyn Backend, p: &AdamW, seed: u64, grad: &[f32], state: &State) -> TestCaseResult<State> {
    let desk = Desk::new(backend, seed);
    let (grad, mut param) = (desk.put(grad)?, desk.put(&state.param)?);
    let (mut m_codes, mut m_absmax) = (desk.put(&state.m.codes)?, desk.put(&state.m.absmax)?);
    let (mut v_codes, mut v_absmax) = (desk.put(&state.v.codes)?, desk.put(&state.v.absmax)?);
    let m = Moment { codes: m_codes.view_mut(), absmax: m_absmax.view_mut() };
    let v = Moment { codes: v_codes.view_mut(), absmax: v_absmax.view_mut() };
    backend.adamw_8bit(p, grad.view(), param.view_mut(), m, v)?;
    Ok(State {
        param: desk.take(&param)?,
        m: Coded { codes: desk.take(&m_codes)?, absmax: desk.take(&m_absmax)? },
        v: Coded { codes: desk.take(&v_codes)?, absmax: desk.take(&v_absmax)? },
    })
}

/// How far x is from the nearest of some values of a map, times `scale`.
fn least_distance(values: &[f32], scale: f64, x: f64) -> f64 {
    let above = values.partition_point(|value| f64::from(*value) * scale < x);
    let distance = |i: usize| (f64::from(values[i]) * scale - x).abs();
    distance(above.saturating_sub(1)).min(distance(above.min(values.len() - 1)))
}

/// That a moment is the exact one, quantised: the `error` is of its elements before that.
fn is_quantised(tensor: &str, map: DynamicMap, found: &Coded, exact: &[f64], error: &[f64]) -> TestCaseResult {
    let blocks = found.codes.chunks(MOMENT_BLOCK).zip(exact.chunks(MOMENT_BLOCK)).zip(error.chunks(MOMENT_BLOCK));
    for (b, ((codes, exact), error)) in blocks.enumerate() {
        let largest = |sign: f64| exact.iter().zip(error).map(|(x, e)| x.abs() + sign * e).fold(0.0, f64::max);
        let (absmax, least, most) = (f64::from(found.absmax[b]), largest(-1.0), largest(1.0));
        let is_between = least <= absmax && absmax <= most;
        prop_assert!(is_between, "{tensor} absmax[{b}] is {absmax:e}, expected {least:e} to {most:e}");
        // The least divisor of the formula.
        let scale = absmax.max(f64::from(1e-38f32));
        for (i, ((code, x), e)) in codes.iter().zip(exact).zip(error).enumerate() {
            let distance = (f64::from(map.values()[usize::from(*code)]) * scale - x).abs();
            let least = usize::from(map == DynamicMap::Unsigned && *x > 0.0);
            let at = b * MOMENT_BLOCK + i;
            prop_assert!(usize::from(*code) >= least, "{tensor} codes[{at}] is that of 0, {x:e} is not");
            let bound = least_distance(&map.values()[least..], scale, *x) + 2.0 * (gamma(2) * (x.abs() + e) + e);
            prop_assert!(distance <= bound, "{tensor} codes[{at}] is {code}, off {x:e} by {distance:e} of {bound:e}");
        }
    }
    Ok(())
}

/// Four steps from a fresh or an old state, with and without decay and clipping, and with gradients of one size or of
/// sizes so unlike that some squares are nothing to the map.
pub fn steps(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(32, &(adamw::first_steps(), length(), any::<u64>()), |(first, len, seed)| {
        let mut draw = Draw::new(seed);
        let blocks = len.div_ceil(MOMENT_BLOCK);
        // A scale of 0 makes any code 0.
        let mut moment = || {
            let absmax = if first.step > 1 { abs(&draw.scaled(blocks)) } else { vec![0.0; blocks] };
            Coded { codes: draw.bytes(len), absmax }
        };
        let (m, v) = (moment(), moment());
        let mut state = State { param: draw.scaled(len), m, v };
        let (still, unlike) = (draw.once_in(2), draw.once_in(2));
        for step in first.step..first.step + 4 {
            let p = AdamW { step, ..first };
            let mut grad = draw.scaled(len);
            if unlike {
                grad.iter_mut().for_each(|grad| *grad *= 2f32.powi(-(draw.below(24) as i32)));
            }
            if still {
                grad.iter_mut().take(MOMENT_BLOCK).for_each(|grad| *grad = 0.0);
            }
            let found = twice(|| call(candidate, &p, seed, &grad, &state))?;

            let (m, v) = (state.m.decode(DynamicMap::Signed), state.v.decode(DynamicMap::Unsigned));
            let decoded = adamw::State { param: state.param, m, v };
            let exact = adamw::call::<f64>(oracle, &p, seed, &grad, &decoded)?;
            let bounds: Vec<[f64; 3]> =
                (0..len).map(|i| adamw::bounds(&p, grad[i], decoded.param[i], decoded.m[i], decoded.v[i])).collect();
            let errors = |output: usize| -> Vec<f64> { bounds.iter().map(|bounds| bounds[output]).collect() };
            agree("param", &found.param, &exact[0], |i| bounds[i][0])?;
            is_quantised("m", DynamicMap::Signed, &found.m, &exact[1], &errors(1))?;
            is_quantised("v", DynamicMap::Unsigned, &found.v, &exact[2], &errors(2))?;
            state = found;
        }
        Ok(())
    })
}
