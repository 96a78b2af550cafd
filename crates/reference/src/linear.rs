//! The product with a weight, dense or quantised, and a low-rank update beside it: LoRA (Hu et al. 2021, eq. 3),
//! AdaLoRA (Zhang et al. 2023, eq. 3), DoRA (Liu et al. 2024, eq. 5).
//!
//! y = g ∘ z + bias,   z = x Wᵀ + δ,   δ = s·u Bᵀ,   u = x̃ (e∘A)ᵀ,   x̃ = dropout(x)
//!
//! x [tokens, inputs], W [outputs, inputs], A [rank, inputs], B [outputs, rank], e [rank] (AdaLoRA's E) scales A's
//! rows, g [outputs] (DoRA's m/‖W + s·BA‖) scales the outputs; each is 1 where absent. With g and dropout both,
//! PEFT drops from the base's product too: z = x̃ Wᵀ + δ and y = x Wᵀ − x̃ Wᵀ + g ∘ z + bias.
//!
//! `compute` rounds the two inputs of each matrix product, intermediate ones (u, dz B ∘ e) too; s, g, bias and the
//! sums over tokens of de and dg are not products' inputs.

use crate::dropout::dropped;
use crate::matmul::product;
use crate::operands::Kernel;
use crate::quantize4;
use rankfold_backend::params::{Dropout, Layout, Linear, LinearGrads, LowRank, Weight};
use rankfold_backend::{Result, View, ViewMut};

/// W as numbers.
fn weight(kernel: Kernel, w: &Weight) -> Result<Vec<f64>> {
    match w {
        Weight::Dense(w) => kernel.floats("weight", *w),
        Weight::Quantized(q) => Ok(quantize4::decode(kernel, q)?.into_iter().map(f64::from).collect()),
    }
}

/// The low-rank part as numbers.
struct Update {
    rank: usize,
    a: Vec<f64>,
    b: Vec<f64>,
    s: f64,
    e: Vec<f64>,
    g: Option<Vec<f64>>,
    dropout: Option<Dropout>,
}

impl Update {
    fn read(kernel: Kernel, l: &LowRank) -> Result<Self> {
        Ok(Self {
            rank: l.rank,
            a: kernel.floats("a", l.a)?,
            b: kernel.floats("b", l.b)?,
            s: f64::from(l.scale),
            e: l.per_rank.map_or(Ok(vec![1.0; l.rank]), |e| kernel.floats("per_rank", e))?,
            g: l.row_scale.map(|g| kernel.floats("row_scale", g)).transpose()?,
            dropout: l.dropout,
        })
    }

    /// x̃, or the gradient through it: the same mask and factor.
    fn dropped(&self, x: &[f64]) -> Vec<f64> {
        self.dropout.as_ref().map_or_else(|| x.to_vec(), |dropout| dropped(dropout, x))
    }

    /// u = x̃ (e∘A)ᵀ [tokens, rank].
    fn inner(&self, p: &Linear, dropped_x: &[f64]) -> Vec<f64> {
        let ea: Vec<f64> = (0..self.a.len()).map(|i| self.e[i / p.inputs] * self.a[i]).collect();
        product(p.compute, Layout::Nt, [p.tokens, self.rank, p.inputs], dropped_x, &ea)
    }

    /// δ = s·u Bᵀ [tokens, outputs].
    fn delta(&self, p: &Linear, u: &[f64]) -> Vec<f64> {
        let delta = product(p.compute, Layout::Nt, [p.tokens, p.outputs, self.rank], u, &self.b);
        delta.into_iter().map(|delta| self.s * delta).collect()
    }

    /// dz = g∘dy [tokens, outputs].
    fn grad_z(&self, dy: &[f64]) -> Vec<f64> {
        self.g.as_ref().map_or_else(|| dy.to_vec(), |g| scale_columns(dy, g))
    }

    /// dz B [tokens, rank].
    fn grad_inner(&self, p: &Linear, dz: &[f64]) -> Vec<f64> {
        product(p.compute, Layout::Nn, [p.tokens, self.rank, p.outputs], dz, &self.b)
    }
}

/// x_tj · factors_j
fn scale_columns(x: &[f64], factors: &[f64]) -> Vec<f64> {
    x.iter().zip(factors.iter().cycle()).map(|(x, factor)| x * factor).collect()
}

/// Σ_t x_tj y_tj for each of `columns` columns j.
fn column_sums(columns: usize, x: &[f64], y: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; columns];
    for (i, (x, y)) in x.iter().zip(y).enumerate() {
        sums[i % columns] += x * y;
    }
    sums
}

fn add(x: Vec<f64>, y: Vec<f64>) -> Vec<f64> {
    x.into_iter().zip(y).map(|(x, y)| x + y).collect()
}

/// x Wᵀ [tokens, outputs].
fn base(p: &Linear, x: &[f64], w: &[f64]) -> Vec<f64> {
    product(p.compute, Layout::Nt, [p.tokens, p.outputs, p.inputs], x, w)
}

/// y.
pub(crate) fn linear(
    p: &Linear,
    x: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    bias: Option<View>,
    mut y: ViewMut,
) -> Result<()> {
    let kernel = Kernel("linear");
    p.check(&x, w, low_rank, bias.as_ref(), &y)?;
    let (x, w) = (kernel.floats("x", x)?, weight(kernel, w)?);
    let update = low_rank.map(|l| Update::read(kernel, l)).transpose()?;
    let bias = bias.map(|bias| kernel.floats("bias", bias)).transpose()?;
    let mut y = kernel.floats_mut("y", &mut y)?;

    let mut result = base(p, &x, &w);
    if let Some(l) = update {
        let dropped_x = l.dropped(&x);
        let delta = l.delta(p, &l.inner(p, &dropped_x));
        result = match (&l.g, l.dropout) {
            (None, _) => add(result, delta),
            (Some(g), None) => scale_columns(&add(result, delta), g),
            (Some(g), Some(_)) => {
                // x Wᵀ + (g − 1) ∘ x̃ Wᵀ + g ∘ δ
                let less_one: Vec<f64> = g.iter().map(|g| g - 1.0).collect();
                let masked = scale_columns(&base(p, &dropped_x, &w), &less_one);
                add(add(result, masked), scale_columns(&delta, g))
            }
        };
    }
    if let Some(bias) = bias {
        result.iter_mut().zip(bias.iter().cycle()).for_each(|(y, bias)| *y += bias);
    }
    y.store(result);
    Ok(())
}

/// dx = dz W + dropout(s·(dz B ∘ e) A)
///
/// x reaches y through the base, ∂/∂x (x Wᵀ) = W, and through x̃: du = s·dz B, dx̃ = du (e∘A), and dropout's
/// gradient is dropout. With g and dropout both, the base has two ways: dy W, and through x̃ ((g − 1)∘dy) W.
pub(crate) fn linear_grad_input(
    p: &Linear,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    accumulate: bool,
    mut dx: ViewMut,
) -> Result<()> {
    let kernel = Kernel("linear_grad_input");
    p.check_grad_input(&dy, w, low_rank, &dx)?;
    let (dy, w) = (kernel.floats("dy", dy)?, weight(kernel, w)?);
    let update = low_rank.map(|l| Update::read(kernel, l)).transpose()?;
    let mut dx = kernel.floats_mut("dx", &mut dx)?;

    let through_base = |dy: &[f64]| product(p.compute, Layout::Nn, [p.tokens, p.inputs, p.outputs], dy, &w);
    let grad = match update {
        None => through_base(&dy),
        Some(l) => {
            let dz = l.grad_z(&dy);
            let dz_b_e = scale_columns(&l.grad_inner(p, &dz), &l.e);
            let through_a = product(p.compute, Layout::Nn, [p.tokens, p.inputs, l.rank], &dz_b_e, &l.a);
            let mut dropped_grad: Vec<f64> = through_a.into_iter().map(|grad| l.s * grad).collect();
            let direct = match (&l.g, l.dropout) {
                (Some(g), Some(_)) => {
                    let less_one: Vec<f64> = g.iter().map(|g| g - 1.0).collect();
                    dropped_grad = add(dropped_grad, through_base(&scale_columns(&dy, &less_one)));
                    through_base(&dy)
                }
                _ => through_base(&dz),
            };
            add(direct, l.dropped(&dropped_grad))
        }
    };
    if accumulate {
        dx.add(grad);
    } else {
        dx.store(grad);
    }
    Ok(())
}

/// dW = dyᵀ x,   dbias = Σ_t dy_t, and with dz = g∘dy:
/// dB = s·dzᵀ u            from δ = s·u Bᵀ
/// dA = s·(dz B ∘ e)ᵀ x̃    from u = x̃ (e∘A)ᵀ, du = s·dz B
/// de_r = s·Σ_t (dz B)_tr (x̃ Aᵀ)_tr   from u_tr = e_r (x̃ Aᵀ)_tr
/// dg_o = Σ_t dy_to z_to
///
/// Each is added to what is there: gradients accumulate over micro-batches.
pub(crate) fn linear_grad_weight(
    p: &Linear,
    x: View,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    mut grads: LinearGrads,
) -> Result<()> {
    let kernel = Kernel("linear_grad_weight");
    p.check_grad_weight(&x, &dy, w, low_rank, &grads)?;
    let (x, dy, w) = (kernel.floats("x", x)?, kernel.floats("dy", dy)?, weight(kernel, w)?);
    let update = low_rank.map(|l| Update::read(kernel, l)).transpose()?;
    let grad_w = kernel.some_mut("d weight", &mut grads.weight)?;
    let grad_bias = kernel.some_mut("d bias", &mut grads.bias)?;
    let grad_a = kernel.some_mut("d a", &mut grads.a)?;
    let grad_b = kernel.some_mut("d b", &mut grads.b)?;
    let grad_e = kernel.some_mut("d per_rank", &mut grads.per_rank)?;
    let grad_g = kernel.some_mut("d row_scale", &mut grads.row_scale)?;

    if let Some(mut out) = grad_w {
        out.add(product(p.compute, Layout::Tn, [p.outputs, p.inputs, p.tokens], &dy, &x));
    }
    if let Some(mut out) = grad_bias {
        out.add(column_sums(p.outputs, &dy, &vec![1.0; dy.len()]));
    }
    let Some(l) = update else { return Ok(()) };
    let dropped_x = l.dropped(&x);
    let dz = l.grad_z(&dy);
    if let Some(mut out) = grad_a {
        let dz_b_e = scale_columns(&l.grad_inner(p, &dz), &l.e);
        let sums = product(p.compute, Layout::Tn, [l.rank, p.inputs, p.tokens], &dz_b_e, &dropped_x);
        out.add(sums.into_iter().map(|sum| l.s * sum));
    }
    if let Some(mut out) = grad_b {
        let u = l.inner(p, &dropped_x);
        let sums = product(p.compute, Layout::Tn, [p.outputs, l.rank, p.tokens], &dz, &u);
        out.add(sums.into_iter().map(|sum| l.s * sum));
    }
    if let Some(mut out) = grad_e {
        let xa = product(p.compute, Layout::Nt, [p.tokens, l.rank, p.inputs], &dropped_x, &l.a);
        let sums = column_sums(l.rank, &l.grad_inner(p, &dz), &xa);
        out.add(sums.into_iter().map(|sum| l.s * sum));
    }
    if let Some(mut out) = grad_g {
        // Without dropout x̃ = x, so that this is z in both cases.
        let z = add(base(p, &dropped_x, &w), l.delta(p, &l.inner(p, &dropped_x)));
        out.add(column_sums(p.outputs, &dy, &z));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};
    use rankfold_backend::params::Compute;
    use rankfold_backend::{DType, Format, Quantized};

    const P: Linear = Linear { tokens: 4, inputs: 5, outputs: 3, compute: Compute::F32 };
    const RANK: usize = 2;

    /// Everything that y depends on, by its letter.
    #[derive(Clone)]
    struct Parts {
        x: Vec<f64>,
        w: Vec<f64>,
        bias: Vec<f64>,
        a: Vec<f64>,
        b: Vec<f64>,
        e: Option<Vec<f64>>,
        g: Option<Vec<f64>>,
        dropout: Option<Dropout>,
    }

    impl Parts {
        fn new(with_e: bool, with_g: bool, with_dropout: bool) -> Self {
            Self {
                x: numbers(1, P.tokens * P.inputs),
                w: numbers(2, P.outputs * P.inputs),
                bias: numbers(3, P.outputs),
                a: numbers(4, RANK * P.inputs),
                b: numbers(5, P.outputs * RANK),
                e: with_e.then(|| numbers(6, RANK)),
                g: with_g.then(|| numbers(7, P.outputs)),
                dropout: with_dropout.then_some(Dropout { probability: 0.4, seed: 1, stream: 2 }),
            }
        }

        /// `call` with the low-rank part on buffers.
        fn with_low_rank<T>(&self, call: impl FnOnce(&LowRank) -> T) -> T {
            let (a, b) = (buffer(&self.a), buffer(&self.b));
            let (e, g) = (self.e.as_deref().map(buffer), self.g.as_deref().map(buffer));
            call(&LowRank {
                rank: RANK,
                a: a.view(),
                b: b.view(),
                scale: 0.1,
                per_rank: e.as_ref().map(|e| e.view()),
                row_scale: g.as_ref().map(|g| g.view()),
                dropout: self.dropout,
            })
        }

        fn y(&self) -> Vec<f64> {
            let (x, w, bias, mut y) = (buffer(&self.x), buffer(&self.w), buffer(&self.bias), output(12));
            let (weight, bias) = (Weight::Dense(w.view()), Some(bias.view()));
            self.with_low_rank(|l| BACKEND.linear(&P, x.view(), &weight, Some(l), bias, y.view_mut())).unwrap();
            values(&y)
        }

        fn dx(&self, dy: &[f64]) -> Vec<f64> {
            let (dy, w, mut dx) = (buffer(dy), buffer(&self.w), output(self.x.len()));
            let weight = Weight::Dense(w.view());
            self.with_low_rank(|l| BACKEND.linear_grad_input(&P, dy.view(), &weight, Some(l), false, dx.view_mut()))
                .unwrap();
            values(&dx)
        }

        /// Gradients of w, bias, a, b, e and g, those that exist; each starts at 0.
        fn grads(&self, dy: &[f64]) -> [Option<Vec<f64>>; 6] {
            let (x, dy, w) = (buffer(&self.x), buffer(dy), buffer(&self.w));
            let weight = Weight::Dense(w.view());
            let len = |exists: bool, len: usize| exists.then(|| buffer(&vec![0.0; len]));
            let mut out = [
                len(self.g.is_none(), self.w.len()),
                len(true, self.bias.len()),
                len(true, self.a.len()),
                len(true, self.b.len()),
                len(self.e.is_some(), RANK),
                len(self.g.is_some(), P.outputs),
            ];
            let [grad_w, bias, a, b, per_rank, row_scale] =
                out.each_mut().map(|grad| grad.as_mut().map(|grad| grad.view_mut()));
            let grads = LinearGrads { weight: grad_w, bias, a, b, per_rank, row_scale };
            self.with_low_rank(|l| BACKEND.linear_grad_weight(&P, x.view(), dy.view(), &weight, Some(l), grads))
                .unwrap();
            out.map(|grad| grad.map(|grad| values(&grad)))
        }
    }

    /// x Wᵀ written out, so that the cases below are checked by another hand.
    fn times_transposed(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
        x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| dot(x, w))).collect()
    }

    #[test]
    fn y_is_the_papers_formula() {
        let s = f64::from(0.1f32);
        for (with_e, with_g, with_dropout) in [(false, false, false), (true, false, true), (true, true, true)] {
            let parts = Parts::new(with_e, with_g, with_dropout);
            let e = parts.e.clone().unwrap_or(vec![1.0; RANK]);
            let g = parts.g.clone().unwrap_or(vec![1.0; P.outputs]);
            let dropped_x = parts.dropout.map_or(parts.x.clone(), |dropout| dropped(&dropout, &parts.x));
            let ea: Vec<f64> = (0..parts.a.len()).map(|i| e[i / P.inputs] * parts.a[i]).collect();
            let delta = times_transposed(&times_transposed(&dropped_x, &ea, P.inputs), &parts.b, RANK);
            let (base, masked) =
                (times_transposed(&parts.x, &parts.w, P.inputs), times_transposed(&dropped_x, &parts.w, P.inputs));
            let expected: Vec<f64> = (0..12)
                .map(|i| {
                    let g = g[i % P.outputs];
                    base[i] + (g - 1.0) * masked[i] + g * s * delta[i] + parts.bias[i % P.outputs]
                })
                .collect();
            assert_close("y", &parts.y(), &expected);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let dy = numbers(9, 12);
        for case in 0..8 {
            let parts = Parts::new(case & 1 > 0, case & 2 > 0, case & 4 > 0);
            let check = |name: &str, grad: &[f64], part: fn(&mut Parts) -> &mut Vec<f64>| {
                let at = part(&mut parts.clone()).clone();
                assert_gradient(&format!("{name}, case {case}"), &at, grad, |moved| {
                    let mut parts = parts.clone();
                    *part(&mut parts) = moved.to_vec();
                    dot(&parts.y(), &dy)
                });
            };
            check("x", &parts.dx(&dy), |parts| &mut parts.x);
            let names = ["w", "bias", "a", "b", "e", "g"];
            let part: [fn(&mut Parts) -> &mut Vec<f64>; 6] = [
                |parts| &mut parts.w,
                |parts| &mut parts.bias,
                |parts| &mut parts.a,
                |parts| &mut parts.b,
                |parts| parts.e.as_mut().unwrap(),
                |parts| parts.g.as_mut().unwrap(),
            ];
            for ((name, part), grad) in names.into_iter().zip(part).zip(parts.grads(&dy)) {
                if let Some(grad) = grad {
                    check(name, &grad, part);
                }
            }
        }
    }

    #[test]
    fn a_quantised_weight_multiplies_as_the_dense_weight_it_decodes_to() {
        let p = Linear { tokens: 2, inputs: 33, outputs: 3, compute: Compute::F32 };
        let w: Vec<f32> = numbers(1, 99).into_iter().map(|w| w as f32).collect();
        let w = BACKEND.upload(&w).unwrap();
        for (format, double) in [(Format::Nf4, false), (Format::Fp4, true), (Format::Int4, true)] {
            let q = Quantized::quantize(BACKEND, w.view(), [3, 33], format, 32, double).unwrap();
            let mut dense = BACKEND.alloc(DType::F32, 99).unwrap();
            BACKEND.dequantize_4bit(&q, dense.view_mut()).unwrap();
            let [x, dy] = [numbers(2, 66), numbers(3, 6)].map(|x| buffer(&x));
            let both = [Weight::Quantized(&q), Weight::Dense(dense.view())].map(|weight| {
                let (mut y, mut dx) = (output(6), output(66));
                BACKEND.linear(&p, x.view(), &weight, None, None, y.view_mut()).unwrap();
                BACKEND.linear_grad_input(&p, dy.view(), &weight, None, false, dx.view_mut()).unwrap();
                (values(&y), values(&dx))
            });
            assert_eq!(both[0], both[1]);
        }
    }

    #[test]
    fn rank_0_is_the_base_alone() {
        let (x, w, none) = (buffer(&numbers(1, 20)), buffer(&numbers(2, 15)), buffer(&[]));
        let low_rank = LowRank {
            rank: 0,
            a: none.view(),
            b: none.view(),
            scale: 1.0,
            per_rank: None,
            row_scale: None,
            dropout: None,
        };
        let both = [Some(&low_rank), None].map(|l| {
            let mut y = output(12);
            BACKEND.linear(&P, x.view(), &Weight::Dense(w.view()), l, None, y.view_mut()).unwrap();
            values(&y)
        });
        assert_eq!(both[0], both[1]);
    }

    /// One token, one input, one output: each product's inputs are rounded, the scale and the sums are not.
    #[test]
    fn bf16_rounds_the_inputs_of_each_product() {
        let p = Linear { tokens: 1, inputs: 1, outputs: 1, compute: Compute::Bf16 };
        let one = |value: f64| buffer(&[value]);
        // bf16 has 8 bits: 1 + 2⁻⁷ is kept, its square 1 + 2⁻⁶ + 2⁻¹⁴ is not.
        let kept = 1.0 + 2f64.powi(-7);
        let (x, w, a, b, mut y) = (one(kept), one(kept + 2f64.powi(-20)), one(kept), one(kept), output(1));
        let low_rank =
            LowRank { rank: 1, a: a.view(), b: b.view(), scale: 0.1, per_rank: None, row_scale: None, dropout: None };
        BACKEND.linear(&p, x.view(), &Weight::Dense(w.view()), Some(&low_rank), None, y.view_mut()).unwrap();
        let inner = 1.0 + 2f64.powi(-6);
        assert_eq!(values(&y), [kept * kept + f64::from(0.1f32) * (inner * kept)]);
    }

    #[test]
    fn gradients_add_to_what_is_there() {
        let (dy, w) = (buffer(&numbers(1, 12)), buffer(&numbers(2, 15)));
        let weight = Weight::Dense(w.view());
        let [mut dx, mut twice] = [output(20), buffer(&[0.0; 20])];
        BACKEND.linear_grad_input(&P, dy.view(), &weight, None, false, dx.view_mut()).unwrap();
        for _ in 0..2 {
            BACKEND.linear_grad_input(&P, dy.view(), &weight, None, true, twice.view_mut()).unwrap();
        }
        let doubled: Vec<f64> = values(&dx).into_iter().map(|dx| 2.0 * dx).collect();
        assert_eq!(values(&twice), doubled);
    }

    #[test]
    fn a_wrong_element_type_leaves_every_gradient_alone() {
        let (x, dy, w) = (buffer(&numbers(1, 20)), buffer(&numbers(2, 12)), buffer(&numbers(3, 15)));
        let (mut grad, mut bias) = (buffer(&[0.5; 15]), BACKEND.upload(&[0u32; 3]).unwrap());
        let grads =
            LinearGrads { weight: Some(grad.view_mut()), bias: Some(bias.view_mut()), ..LinearGrads::default() };
        let weight = Weight::Dense(w.view());
        assert!(BACKEND.linear_grad_weight(&P, x.view(), dy.view(), &weight, None, grads).is_err());
        assert_eq!(values(&grad), [0.5; 15]);
    }
}
