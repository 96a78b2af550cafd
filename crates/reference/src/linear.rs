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
            let du: Vec<f64> = scale_columns(&l.grad_inner(p, &dz), &l.e);
            let through_a = product(p.compute, Layout::Nn, [p.tokens, p.inputs, l.rank], &du, &l.a);
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
    let (x, dy) = (kernel.floats("x", x)?, kernel.floats("dy", dy)?);
    let update = low_rank.map(|l| Update::read(kernel, l)).transpose()?;
    let mut out = |tensor, grad: &'static str| (tensor, grad);
    let _ = &mut out;
    todo_grads(p, kernel, &x, &dy, w, update, &mut grads)
}
