//! AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2).
//!
//! Block by block of 256: m and v are decoded, a step of [`crate::adamw`] forms the new ones and moves the parameters
//! by them, and they are encoded again, m with the signed map and v, which is never negative, with the unsigned. So
//! the state of a parameter is 2 bytes and 1/32, for 8 in f32.
//!
//! **A v that is not 0 stays so**: where its nearest value is 0 it is given the least that is not, c = 3.25·10⁻⁷ of
//! its block's absmax. For as v goes with g² and m with g, an element whose gradients are 10⁻⁴ of the block's largest
//! would lose its v and keep its m, and m̂/(√v̂ + ε) is m̂/ε where no gradient follows: hundreds of lr in the row of an
//! embedding whose token is rare. (bitsandbytes' CUDA kernels do lose it; `benches/peers/adamw8bit.py` shows what of.)
//!
//! No step is then larger than a bound, whatever ε and the gradients. With M and V the largest decoded |m| and v of a
//! block, decoded as they were, and g the gradient of the element with the largest new |m|,
//!   M' ≤ β1 M + (1 − β1)|g|,   V' ≥ β2 V,   V' ≥ (1 − β2) g²
//!   q' = M'/√V' ≤ (β1/√β2)·q + (1 − β1)/√(1 − β2),   so   q ≤ (1 − β1)/√(1 − β2) / (1 − β1/√β2),
//! and of any element |m| ≤ M and v ≥ c·V, or v = m = 0 (or g² below all f32s, and m far below any ε), so that its
//! new ones have
//!   |m'|/√v' ≤ u = (β1/√β2)·q/√c + (1 − β1)/√(1 − β2)
//! where β1² < β2, and the step is at most lr·u·√(1 − β2^t)/(1 − β1^t). That is for the worst of gradients, with u of
//! 5·10⁴ at β of 0.9 and 0.999; on those of the script above steps are as large as AdamW's.
//!
//! What is lost at a step, half a gap of the map at most, is carried on with the moment: errors of a step η, each
//! |η| ≤ G·absmax, add up to |δ| ≤ Σ β^(t−s)·|η_s| ≤ G·absmax/(1 − β) while absmax grows.
//!
//! grad, param: [n]; of each moment codes u8 [n], absmax f32 [⌈n/256⌉].

use crate::adamw;
use crate::operands::Kernel;
use crate::quantize8::{decode, encode};
use rankfold_backend::params::{AdamW, MOMENT_BLOCK, Moment};
use rankfold_backend::{DynamicMap, Result, View, ViewMut};

/// One step, in place.
pub(crate) fn adamw_8bit(p: &AdamW, grad: View, mut param: ViewMut, mut m: Moment, mut v: Moment) -> Result<()> {
    p.check_8bit(&grad, &param, &m, &v)?;
    let kernel = Kernel("adamw_8bit");
    let grad = kernel.floats("grad", grad)?;
    let mut param = kernel.floats_mut("param", &mut param)?;
    let m = (kernel.elements_mut("m codes", &mut m.codes)?, kernel.elements_mut("m absmax", &mut m.absmax)?);
    let v = (kernel.elements_mut("v codes", &mut v.codes)?, kernel.elements_mut("v absmax", &mut v.absmax)?);

    let mut params = param.load();
    let mut means = load(DynamicMap::Signed, m.0, m.1);
    let mut squares = load(DynamicMap::Unsigned, v.0, v.1);
    adamw::step(p, &grad, [&mut params, &mut means, &mut squares]);
    param.store(params);
    let (means, squares) = (rounded(&means), rounded(&squares));
    encode(DynamicMap::Signed, MOMENT_BLOCK, &means, m.0, m.1);
    encode(DynamicMap::Unsigned, MOMENT_BLOCK, &squares, v.0, v.1);
    for (code, square) in v.0.iter_mut().zip(squares) {
        *code = (*code).max(u8::from(square > 0.0));
    }
    Ok(())
}

fn load(map: DynamicMap, codes: &[u8], absmax: &[f32]) -> Vec<f64> {
    decode(map, MOMENT_BLOCK, codes, absmax).into_iter().map(f64::from).collect()
}

/// In f32, which is what quantisation is of.
fn rounded(moment: &[f64]) -> Vec<f32> {
    moment.iter().map(|&x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, buffer, numbers, values};
    use proptest::prelude::*;
    use rankfold_backend::{Buffer, DType, Error};

    const P: AdamW = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };

    /// One whole block and a part of another.
    const N: usize = 300;

    struct Coded {
        codes: Buffer,
        absmax: Buffer,
    }

    impl Coded {
        /// 0, whatever the codes.
        fn zero(n: usize) -> Self {
            let codes = BACKEND.filled(DType::U8, n, 77.0).unwrap();
            Self { codes, absmax: BACKEND.filled(DType::F32, n.div_ceil(MOMENT_BLOCK), 0.0).unwrap() }
        }

        fn quantized(map: DynamicMap, x: &[f32]) -> Self {
            let (mut coded, x) = (Self::zero(x.len()), BACKEND.upload(x).unwrap());
            let Moment { codes, absmax } = coded.moment();
            BACKEND.quantize_8bit(map, MOMENT_BLOCK, x.view(), codes, absmax).unwrap();
            coded
        }

        fn decoded(&self, map: DynamicMap) -> Vec<f64> {
            let mut out = BACKEND.alloc(DType::F32, self.codes.len()).unwrap();
            let (codes, absmax) = (self.codes.view(), self.absmax.view());
            BACKEND.dequantize_8bit(map, MOMENT_BLOCK, codes, absmax, out.view_mut()).unwrap();
            BACKEND.download::<f32>(out.view()).unwrap().into_iter().map(f64::from).collect()
        }

        fn moment(&mut self) -> Moment<'_> {
            Moment { codes: self.codes.view_mut(), absmax: self.absmax.view_mut() }
        }

        fn bits(&self) -> (Vec<u8>, Vec<f32>) {
            (BACKEND.download(self.codes.view()).unwrap(), BACKEND.download(self.absmax.view()).unwrap())
        }
    }

    fn step(p: &AdamW, grad: &[f64], param: &mut Buffer, m: &mut Coded, v: &mut Coded) -> Result<()> {
        BACKEND.adamw_8bit(p, buffer(grad).view(), param.view_mut(), m.moment(), v.moment())
    }

    /// The definition, of kernels that have laws of their own.
    #[test]
    fn a_step_is_to_decode_to_step_and_to_encode() {
        let (grad, start) = (numbers(1, N), numbers(2, N));
        let old = |stream| numbers(stream, N).into_iter().map(|x| x as f32);
        let mut m = Coded::quantized(DynamicMap::Signed, &old(3).collect::<Vec<_>>());
        let mut v = Coded::quantized(DynamicMap::Unsigned, &old(4).map(f32::abs).collect::<Vec<_>>());
        let p = AdamW { step: 5, ..P };

        let moments = [m.decoded(DynamicMap::Signed), v.decoded(DynamicMap::Unsigned)];
        let [mut expected, mut means, mut squares] = [&start, &moments[0], &moments[1]].map(|x| buffer(x));
        let moments = (means.view_mut(), squares.view_mut());
        BACKEND.adamw(&p, buffer(&grad).view(), expected.view_mut(), moments.0, moments.1).unwrap();
        let [means, squares] = [means, squares].map(|x| values(&x).iter().map(|&x| x as f32).collect::<Vec<_>>());

        let mut param = buffer(&start);
        step(&p, &grad, &mut param, &mut m, &mut v).unwrap();
        assert_eq!(values(&param), values(&expected));
        assert_eq!(m.bits(), Coded::quantized(DynamicMap::Signed, &means).bits());
        // None of these squares is nothing to the map.
        assert_eq!(v.bits(), Coded::quantized(DynamicMap::Unsigned, &squares).bits());
    }

    /// The row of an embedding whose token comes once, its gradients from 1 down to 10⁻⁶. The step after is without a
    /// gradient, and so is as long as AdamW's but for what is lost of the moments: |m̃| ≤ 2|m|, as 0 is not nearer to m,
    /// and ṽ ≥ v/2, as no value of the map is three times the one below, and none is below the least.
    #[test]
    fn a_row_touched_once_does_not_leap_by_its_small_gradients() {
        let map = DynamicMap::Unsigned.values();
        assert!(map[1..].windows(2).all(|pair| pair[1] < 3.0 * pair[0]));
        let p = AdamW { beta2: 0.999, weight_decay: 0.0, grad_scale: 1.0, ..P };
        let grad: Vec<f64> = (0..MOMENT_BLOCK).map(|i| 10f64.powf(-6.0 * i as f64 / 255.0)).collect();
        let n = grad.len();
        let (mut param, mut m, mut v) = (buffer(&vec![0.0; n]), Coded::zero(n), Coded::zero(n));
        let [mut exact, mut means, mut squares] = [(); 3].map(|()| buffer(&vec![0.0; n]));
        let mut steps = [[0.0; MOMENT_BLOCK]; 2];
        for (t, grad) in [(1, &grad), (2, &vec![0.0; n])] {
            let (p, before) = (AdamW { step: t, ..p }, [values(&param), values(&exact)]);
            step(&p, grad, &mut param, &mut m, &mut v).unwrap();
            let moments = (means.view_mut(), squares.view_mut());
            BACKEND.adamw(&p, buffer(grad).view(), exact.view_mut(), moments.0, moments.1).unwrap();
            let after = [values(&param), values(&exact)];
            steps = [0, 1].map(|way| std::array::from_fn(|i| (after[way][i] - before[way][i]).abs()));
        }
        for (i, (coded, exact)) in steps[0].iter().zip(steps[1]).enumerate() {
            // The roundings of decoding, 2⁻²³.
            let most = 8f64.sqrt() * exact * (1.0 + 1e-6);
            assert!(*coded <= most, "a gradient of {:e} steps by {coded:e}, AdamW's step is {exact:e}", grad[i]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// The bound above, at an ε that would not hold anything back: gradients of all sizes, sparse in elements and
        /// in steps.
        #[test]
        fn no_step_is_larger_than_the_bound_whatever_the_gradients(
            seed in any::<u64>(),
            size in prop::sample::select(vec![1e-3, 1.0, 1e6]),
            decades in 0.0..8.0,
            absent in 0.0..1.0,
            beta2 in prop::sample::select(vec![0.95, 0.999]),
        ) {
            let p = AdamW { beta2, eps: 1e-30, weight_decay: 0.0, grad_scale: 1.0, lr: 1.0, ..P };
            let first = (1.0 - p.beta1) / (1.0 - beta2).sqrt();
            let (ratio, least) = (p.beta1 / beta2.sqrt(), f64::from(DynamicMap::Unsigned.values()[1]));
            // Roundings to f32, 2⁻²⁴ of m and v a step and again in decoding, are carried like the rest.
            let bound = (ratio * first / (1.0 - ratio) / least.sqrt() + first) * (1.0 + 1e-4);
            let (mut param, mut m, mut v) = (buffer(&[0.0; N]), Coded::zero(N), Coded::zero(N));
            for t in 1..=40u64 {
                let [size_of, here, now] = [0, 1, 2].map(|k| numbers(seed ^ (3 * t + k), N));
                let is_absent = |x: f64| (x + 1.0) / 2.0 < absent;
                let gradient = |i: usize| {
                    let is_zero = is_absent(here[i].abs() * 2.0 - 1.0) || is_absent(now[i / MOMENT_BLOCK]);
                    let size = size * 10f64.powf(decades * (size_of[i] - 1.0) / 2.0);
                    if is_zero { 0.0 } else { here[i].signum() * size }
                };
                let grad: Vec<f64> = (0..N).map(gradient).collect();
                let before = values(&param);
                let [correction1, correction2] = [p.beta1, beta2].map(|beta| 1.0 - beta.powf(t as f64));
                let most = bound * correction2.sqrt() / correction1;
                step(&AdamW { step: t, ..p }, &grad, &mut param, &mut m, &mut v).unwrap();
                for (i, (now, before)) in values(&param).into_iter().zip(before).enumerate() {
                    prop_assert!((now - before).abs() <= most, "step {t} of element {i}: {before:e} to {now:e}");
                }
            }
        }
    }

    /// From zeros nothing has been lost yet.
    #[test]
    fn the_first_step_is_adamws() {
        let (grad, start) = (numbers(1, N), numbers(2, N));
        let (mut param, mut m, mut v) = (buffer(&start), Coded::zero(N), Coded::zero(N));
        step(&P, &grad, &mut param, &mut m, &mut v).unwrap();
        let [mut expected, mut means, mut squares] = [&start, &vec![0.0; N], &vec![0.0; N]].map(|x| buffer(x));
        let moments = (means.view_mut(), squares.view_mut());
        BACKEND.adamw(&P, buffer(&grad).view(), expected.view_mut(), moments.0, moments.1).unwrap();
        assert_eq!(values(&param), values(&expected));
    }

    #[test]
    fn a_block_of_zeros_stays_zero_and_only_decays() {
        let (mut param, mut m, mut v) = (buffer(&[2.0; N]), Coded::zero(N), Coded::zero(N));
        let mut grad = vec![0.0; N];
        // The other block's moments are none of its business.
        grad[MOMENT_BLOCK..].fill(1e10);
        step(&P, &grad, &mut param, &mut m, &mut v).unwrap();
        for (coded, map) in [(m, DynamicMap::Signed), (v, DynamicMap::Unsigned)] {
            let (codes, absmax) = coded.bits();
            assert_eq!(absmax[0], 0.0);
            assert!(codes[..MOMENT_BLOCK].iter().all(|&code| map.values()[usize::from(code)] == 0.0));
            assert!(absmax[1] > 0.0 && coded.decoded(map)[MOMENT_BLOCK..].iter().all(|&x| x > 0.0));
        }
        assert_eq!(values(&param)[..MOMENT_BLOCK], [2.0 * (1.0 - 0.1 * 0.1); MOMENT_BLOCK]);
    }

    /// Under a constant gradient g AdamW's steps are lr·sign(g), for m̂ = g and √v̂ = |g|. Here the largest of a block,
    /// γ > 0, is exact, since its code's value is 1; so absmax grows, and the errors carried into a step are
    /// |m̂ − g| ≤ β1·G·γ/(1 − β1), a part μ of g, and |v̂ − g²| ≤ β2·G'·γ²/(1 − β2), a part ν of g². With |g| ≥ γ/2,
    /// every step is between (1 − μ)/√(1 + ν) and (1 + μ)/√(1 − ν) of AdamW's, and so is all of the way.
    #[test]
    fn a_long_constant_gradient_moves_parameters_as_adamw_does() {
        let p = AdamW { weight_decay: 0.0, grad_scale: 1.0, lr: 1e-3, ..P };
        let mut grad: Vec<f64> = numbers(1, N).iter().map(|x| x.signum() * (0.5 + 0.5 * x.abs())).collect();
        grad.chunks_mut(MOMENT_BLOCK).for_each(|block| block[block.len() / 2] = 1.0);
        let carried = |map: DynamicMap, beta: f64| beta * f64::from(map.worst_error()) / (1.0 - beta);
        let mu = carried(DynamicMap::Signed, p.beta1) / 0.5;
        let nu = carried(DynamicMap::Unsigned, p.beta2) / 0.25;
        // The roundings of absmax and decoding, 2⁻²³ a step and so at most 2⁻²³/(1 − β) in all, and ε.
        let (least, most) = ((1.0 - mu) / (1.0 + nu).sqrt() - 1e-5, (1.0 + mu) / (1.0 - nu).sqrt() + 1e-5);
        assert!(0.75 < least && most < 1.35, "a bound that says something: {least} to {most}");

        let (mut param, mut m, mut v) = (buffer(&[0.0; N]), Coded::zero(N), Coded::zero(N));
        let mut before = vec![0.0; N];
        for t in 1..=500 {
            step(&AdamW { step: t, ..p }, &grad, &mut param, &mut m, &mut v).unwrap();
            let now = values(&param);
            for i in 0..N {
                let part = (before[i] - now[i]) / (p.lr * grad[i].signum());
                assert!((least..=most).contains(&part), "step {t} of element {i} is {part} of AdamW's");
            }
            before = now;
        }
    }

    #[test]
    fn a_wrong_length_is_named() {
        let (mut param, mut m, mut v) = (buffer(&[1.0; N]), Coded::zero(N), Coded::zero(MOMENT_BLOCK));
        v.codes = BACKEND.filled(DType::U8, N, 0.0).unwrap();
        let answer = step(&P, &[1.0; N], &mut param, &mut m, &mut v);
        let (kernel, tensor) = ("adamw_8bit", "v absmax");
        assert_eq!(answer, Err(Error::Length { kernel, tensor, expected: 2, found: 1 }));
        assert_eq!(values(&param), [1.0; N]);
    }
}
