//! The hard concrete gate (Louizos et al. 2018, eq. 10–12): the mask of diff pruning (Guo et al. 2021, §3.1).
//!
//! s = σ((ln u − ln(1 − u) + logα)/β), or σ(logα) without noise
//! z = clamp(s̄, 0, 1),  s̄ = s·(ζ − γ) + γ
//! P(z ≠ 0) = σ(logα − β·ln(−γ/ζ))
//!
//! Words of noise are drawn a group of [`PART`] at a time, as dropout draws them, and both σ are taken of a group;
//! what follows is plain Rust that the compiler vectorises. What depends on the parameters alone is formed in f64 and
//! rounded once.

use crate::dropout::{GROUPS, words};
use crate::elementwise::CHUNK;
use crate::simd::{Float, Isa, Kernel, Simd, sigmoid};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::HardConcrete;

/// Gates of a group.
const PART: usize = 4 * GROUPS;

/// The gates' constants.
#[derive(Clone, Copy)]
struct Constants {
    noise: Option<(u64, u64)>,
    /// 1/β, or 1 without noise.
    inner: f32,
    /// ζ − γ
    span: f32,
    /// γ
    low: f32,
    /// β·ln(−γ/ζ)
    shift: f32,
}

impl Constants {
    fn new(p: &HardConcrete) -> Self {
        Self {
            noise: p.noise,
            inner: if p.noise.is_some() { (1.0 / p.temperature) as f32 } else { 1.0 },
            span: (p.high - p.low) as f32,
            low: p.low as f32,
            shift: (p.temperature * (-p.low / p.high).ln()) as f32,
        }
    }

    /// s and P(z ≠ 0) of the gates `first`, `first` + 1, …, PART of them at most; 0 beyond the last. `first` is a
    /// multiple of 4.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    unsafe fn gates<S: Simd>(&self, first: usize, log_alpha: &[f32]) -> [[f32; PART]; 2] {
        let (mut arguments, mut shifted) = ([0.0f32; PART], [0.0f32; PART]);
        arguments[..log_alpha.len()].copy_from_slice(log_alpha);
        for (shifted, log_alpha) in shifted.iter_mut().zip(&arguments) {
            *shifted = log_alpha - self.shift;
        }
        if let Some((seed, stream)) = self.noise {
            let words = words(seed, stream, (first / 4) as u64);
            let mut noise = [0u32; PART];
            for (i, word) in noise.iter_mut().enumerate() {
                *word = words[i % 4][i / 4] as u32;
            }
            for (argument, word) in arguments.iter_mut().zip(noise) {
                *argument = (logit(word) + *argument) * self.inner;
            }
        }
        let (mut s, mut open) = ([0.0; PART], [0.0; PART]);
        for i in (0..log_alpha.len()).step_by(S::LANES) {
            let n = S::LANES.min(log_alpha.len() - i);
            // SAFETY: LANES divides PART, so i + LANES elements are in every array.
            unsafe {
                f32::store_part::<S>(s.as_mut_ptr().add(i), sigmoid::<S>(S::load(arguments.as_ptr().add(i))), n);
                f32::store_part::<S>(open.as_mut_ptr().add(i), sigmoid::<S>(S::load(shifted.as_ptr().add(i))), n);
            }
        }
        [s, open]
    }
}

/// ln u − ln(1 − u) for u = (word + ½)/2³²: the logarithm of one ratio, whose terms are rounded once or twice each.
#[inline(always)]
fn logit(word: u32) -> f32 {
    ln((word as f32 + 0.5) / (!word as f32 + 0.5))
}

/// ln x for positive normal x, within 3 ulp.
///
/// x = m·2ᵉ with m in [√½, √2), and ln m = 2·artanh t = 2t(1 + t²/3 + t⁴/5 + …) with t = (m − 1)/(m + 1): |t| is below
/// 0.172, where the first term left out, t¹⁰/11, is below 2⁻²⁸. ln 2 is in two parts, of which e times the first is
/// exact.
#[inline(always)]
fn ln(x: f32) -> f32 {
    const ROOT_HALF: u32 = std::f32::consts::FRAC_1_SQRT_2.to_bits();
    let bits = x.to_bits().wrapping_sub(ROOT_HALF);
    let e = (bits as i32 >> 23) as f32;
    let m = f32::from_bits((bits & 0x7F_FFFF) + ROOT_HALF);
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let series = t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 * (1.0 / 9.0))));
    e * 0.693_359_4 + (2.0 * t + (2.0 * t * series - e * 2.121_944_4e-4))
}

/// z, and Σ P(z ≠ 0) in f64, chunk by chunk, chunks in order.
pub(crate) fn hard_concrete(threads: &Threads, isa: Isa, p: &HardConcrete, log_alpha: &[f32], z: &mut [f32]) -> f64 {
    let (len, constants, z) = (z.len(), Constants::new(p), Disjoint::new(z));
    let chunk = |i: usize| {
        let range = i * CHUNK..len.min((i + 1) * CHUNK);
        // SAFETY: the ranges of two tasks do not overlap.
        let z = unsafe { z.get(range.clone()) };
        isa.run(Forward { constants, start: range.start, log_alpha: &log_alpha[range], z })
    };
    threads.map(len.div_ceil(CHUNK), chunk).into_iter().sum()
}

/// Gates `start`, `start` + 1, …, `start` a multiple of 4.
struct Forward<'a> {
    constants: Constants,
    start: usize,
    log_alpha: &'a [f32],
    z: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let (c, mut sums) = (self.constants, [0.0f64; PART]);
        for (part, (log_alpha, z)) in self.log_alpha.chunks(PART).zip(self.z.chunks_mut(PART)).enumerate() {
            // SAFETY: the caller's machine has S.
            let [s, open] = unsafe { c.gates::<S>(self.start + part * PART, log_alpha) };
            z.iter_mut().zip(s).for_each(|(z, s)| *z = (s * c.span + c.low).clamp(0.0, 1.0));
            sums.iter_mut().zip(open).for_each(|(sum, open)| *sum += f64::from(open));
        }
        sums.into_iter().sum()
    }
}

/// dlogα += dz · ∂z/∂logα + penalty · ∂P/∂logα
///
/// Where 0 < s̄ < 1: ∂z/∂logα = (ζ − γ)·s(1 − s)/β, from σ' = σ(1 − σ) and the 1/β within σ; without noise there is no
/// β. Where z was clamped it does not move. ∂P/∂logα = P(1 − P).
pub(crate) fn hard_concrete_grad(
    threads: &Threads,
    isa: Isa,
    p: &HardConcrete,
    log_alpha: &[f32],
    dz: &[f32],
    penalty: f64,
    dlog_alpha: &mut [f32],
) {
    let (len, constants, gradient) = (dz.len(), Constants::new(p), Disjoint::new(dlog_alpha));
    threads.run_chunks(len, CHUNK, |range| {
        let (start, log_alpha, dz) = (range.start, &log_alpha[range.clone()], &dz[range.clone()]);
        // SAFETY: the ranges of two tasks do not overlap.
        let gradient = unsafe { gradient.get(range) };
        isa.run(Backward { constants, start, log_alpha, dz, penalty: penalty as f32, gradient });
    });
}

/// As [`Forward`].
struct Backward<'a> {
    constants: Constants,
    start: usize,
    log_alpha: &'a [f32],
    dz: &'a [f32],
    penalty: f32,
    gradient: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (c, slope) = (self.constants, self.constants.span * self.constants.inner);
        let parts = self.log_alpha.chunks(PART).zip(self.dz.chunks(PART)).zip(self.gradient.chunks_mut(PART));
        for (part, ((log_alpha, dz), gradient)) in parts.enumerate() {
            // SAFETY: the caller's machine has S.
            let [s, open] = unsafe { c.gates::<S>(self.start + part * PART, log_alpha) };
            for (i, (gradient, dz)) in gradient.iter_mut().zip(dz).enumerate() {
                let stretched = s[i] * c.span + c.low;
                let moves = if stretched <= 0.0 || stretched >= 1.0 { 0.0 } else { slope * s[i] * (1.0 - s[i]) };
                *gradient += dz * moves + self.penalty * open[i] * (1.0 - open[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// t takes three roundings and the series two more, of terms whose sum is ln m, |ln m| ≤ ln √2; the last sum
    /// another, and where e is not 0 it is at least as large: 6 roundings, 3 ulp.
    #[test]
    fn ln_is_within_3_ulp_and_0_at_1() {
        let mut x = 2f32.powi(-34);
        while x < 2f32.powi(34) {
            let (found, exact) = (f64::from(ln(x)), f64::from(x).ln());
            assert!((found - exact).abs() <= 3.0 * f64::from(f32::EPSILON) * exact.abs(), "ln {x} = {found}, {exact}");
            x *= 1.000_17;
        }
        assert_eq!(ln(1.0), 0.0);
    }

    /// The ends of the range, and that words and their complements have opposite logits.
    #[test]
    fn a_logit_is_odd_in_the_word() {
        for word in [0, 1, 77, 1 << 20, (1 << 31) - 1, u32::MAX / 3] {
            let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
            let exact = u.ln() - (1.0 - u).ln();
            // ln's 6 roundings, and 5 of the ratio, which move its logarithm by as much.
            let bound = f64::from(f32::EPSILON) / 2.0 * (6.0 * exact.abs() + 5.0);
            for (word, exact) in [(word, exact), (!word, -exact)] {
                assert!((f64::from(logit(word)) - exact).abs() <= bound, "{word}: {} for {exact}", logit(word));
            }
        }
    }
}
