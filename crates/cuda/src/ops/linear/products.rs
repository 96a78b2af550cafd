//! The contract's three kernels: the weight as a matrix (decoded where it is in 4 bits), dense products one after
//! another, and small kernels around them; or, where one of the fused kernels serves the case, its launch.

use super::super::columns::{add_bias, add_column_sums, scale_columns, scaled};
use super::super::dropout;
use super::super::matmul::{Matrix, Product};
use super::few;
use super::parts::{Stored, Update, product};
use super::tensor::{self, Beside, Way};
use crate::call::{Call, Grid};
use crate::{Argument, CudaBackend};
use rankfold_backend::params::{Layout, Linear, LinearGrads, LowRank, Weight};
use rankfold_backend::{DType, Result, View, ViewMut};

/// y = g ∘ (x Wᵀ + s·u Bᵀ) + bias with u = x̃ (e∘A)ᵀ; with g and dropout, y = x Wᵀ + (g − 1) ∘ x̃ Wᵀ + g ∘ s·u Bᵀ + bias.
pub(crate) fn linear(
    on: &CudaBackend,
    p: &Linear,
    x: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    bias: Option<View>,
    mut y: ViewMut,
) -> Result<()> {
    let call = &on.call("linear");
    p.check(&x, w, low_rank, bias.as_ref(), &y)?;
    let (x, w) = (call.f32("x", x)?.value(), Stored::new(call, w)?);
    let update = low_rank.map(|l| Update::new(call, l)).transpose()?;
    let bias = bias.map(|bias| call.f32("bias", bias)).transpose()?;
    let y_out = call.f32_mut("y", &mut y)?;
    let y = y_out.value();

    let shape = [p.tokens, p.outputs];
    if let Some(q) = w.quantized() {
        if few::serves(call, p, update.as_ref()) {
            return few::linear(call, p, Argument::input(DType::F32, x), q, update.as_ref(), bias, y_out);
        }
        if tensor::serves(call, p, Way::Forward) && update.as_ref().is_none_or(|l| l.g.is_none() || l.dropout.is_none())
        {
            let mut beside = Beside::nothing(false);
            beside.bias = bias.unwrap_or(beside.bias);
            let Some(l) = update else { return tensor::product(call, p, Way::Forward, x, q, beside, y_out) };
            beside.factors = l.g.unwrap_or(beside.factors);
            let dropped_x = l.dropped(call, x, p.tokens * p.inputs)?;
            let u = l.inner(call, p, dropped_x.matrix)?;
            return tensor::product(call, p, Way::Forward, x, q, beside.update(&l, Way::Forward, u.input()), y_out);
        }
    }
    let w = w.matrix(call, p.compute)?;
    let base = product(p, Layout::Nt, [p.tokens, p.outputs, p.inputs]);
    base.run(call, Matrix::f32(x), w.matrix, y)?;
    if let Some(l) = update {
        let dropped_x = l.dropped(call, x, p.tokens * p.inputs)?;
        let u = l.inner(call, p, dropped_x.matrix)?;
        let delta = Product { alpha: l.scale, ..product(p, Layout::Nt, [p.tokens, p.outputs, l.rank]) };
        let add = Product { accumulate: true, ..delta };
        match (l.g, l.dropout) {
            (None, _) => add.run(call, Matrix::scratch(&u), l.b_matrix(), y)?,
            (Some(g), None) => {
                add.run(call, Matrix::scratch(&u), l.b_matrix(), y)?;
                scale_columns(call, y, g, 0.0, y, shape)?;
            }
            (Some(g), Some(_)) => {
                let part = call.scratch(DType::F32, p.tokens * p.outputs)?;
                base.run(call, dropped_x.matrix, w.matrix, part.at(0))?;
                scale_columns(call, part.at(0), g, -1.0, part.at(0), shape)?;
                add_to(call, part.input(), y_out, p.tokens * p.outputs)?;
                delta.run(call, Matrix::scratch(&u), l.b_matrix(), part.at(0))?;
                scale_columns(call, part.at(0), g, 0.0, part.at(0), shape)?;
                add_to(call, part.input(), y_out, p.tokens * p.outputs)?;
            }
        }
    }
    bias.map_or(Ok(()), |bias| add_bias(call, bias, y_out, shape))
}

/// out += x
fn add_to(call: &Call, x: Argument, out: Argument, n: usize) -> Result<()> {
    call.launch("add_in_place_f32", Grid::stride(n), &[x, out, (n as u64).into()])
}

/// dx = dz W + dropout(s·((dz B) ∘ e) A); with g and dropout, dx = dy W + dropout(((g − 1)∘dy) W + s·…).
pub(crate) fn linear_grad_input(
    on: &CudaBackend,
    p: &Linear,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    accumulate: bool,
    mut dx: ViewMut,
) -> Result<()> {
    let call = &on.call("linear_grad_input");
    p.check_grad_input(&dy, w, low_rank, &dx)?;
    let (dy, w) = (call.f32("dy", dy)?.value(), Stored::new(call, w)?);
    let update = low_rank.map(|l| Update::new(call, l)).transpose()?;
    let dx_out = call.f32_mut("dx", &mut dx)?;
    let dx = dx_out.value();

    if let Some(q) = w.quantized().filter(|_| tensor::serves(call, p, Way::Backward)) {
        let beside = Beside::nothing(accumulate);
        match &update {
            None => return tensor::product(call, p, Way::Backward, dy, q, beside, dx_out),
            Some(l) if l.dropout.is_none() => {
                let dz = l.grad_z(call, p, dy)?;
                let dz_b = l.grad_inner(call, p, dz.matrix)?;
                let v = l.times_e(call, p, dz_b)?;
                let beside = beside.update(l, Way::Backward, v.input());
                return tensor::product(call, p, Way::Backward, dz.matrix.address, q, beside, dx_out);
            }
            Some(_) => {}
        }
    }
    let w = w.matrix(call, p.compute)?;
    let through_base = product(p, Layout::Nn, [p.tokens, p.inputs, p.outputs]);
    let direct = Product { accumulate, ..through_base };
    let Some(l) = update else { return direct.run(call, Matrix::f32(dy), w.matrix, dx) };
    let dz = l.grad_z(call, p, dy)?;
    let split = l.g.filter(|_| l.dropout.is_some());
    direct.run(call, if split.is_some() { Matrix::f32(dy) } else { dz.matrix }, w.matrix, dx)?;

    let dz_b = l.grad_inner(call, p, dz.matrix)?;
    let dz_b_e = l.times_e(call, p, dz_b)?;
    let through_a = Product { alpha: l.scale, ..product(p, Layout::Nn, [p.tokens, p.inputs, l.rank]) };
    let Some(mask) = &l.dropout else {
        return Product { accumulate: true, ..through_a }.run(call, Matrix::scratch(&dz_b_e), l.a_matrix(), dx);
    };
    let elements = p.tokens * p.inputs;
    let dropped_grad = call.scratch(DType::F32, elements)?;
    through_a.run(call, Matrix::scratch(&dz_b_e), l.a_matrix(), dropped_grad.at(0))?;
    if let Some(g) = split {
        let masked = scaled(call, dy, g, -1.0, [p.tokens, p.outputs])?;
        let more = Product { accumulate: true, ..through_base };
        more.run(call, Matrix::scratch(&masked), w.matrix, dropped_grad.at(0))?;
    }
    let kept = call.scratch(DType::F32, elements)?;
    dropout::dropped(call, mask, dropped_grad.input(), kept.output(), elements)?;
    add_to(call, kept.input(), dx_out, elements)
}

/// The gradients that are asked for, each added to what is there.
pub(crate) fn linear_grad_weight(
    on: &CudaBackend,
    p: &Linear,
    x: View,
    dy: View,
    w: &Weight,
    low_rank: Option<&LowRank>,
    mut grads: LinearGrads,
) -> Result<()> {
    let call = &on.call("linear_grad_weight");
    p.check_grad_weight(&x, &dy, w, low_rank, &grads)?;
    let (x, dy, w) = (call.f32("x", x)?.value(), call.f32("dy", dy)?.value(), Stored::new(call, w)?);
    let update = low_rank.map(|l| Update::new(call, l)).transpose()?;
    let asked = |tensor, view: &mut Option<ViewMut>| view.as_mut().map(|view| call.f32_mut(tensor, view)).transpose();
    let grad_w = asked("d weight", &mut grads.weight)?;
    let grad_bias = asked("d bias", &mut grads.bias)?;
    let grad_a = asked("d a", &mut grads.a)?;
    let grad_b = asked("d b", &mut grads.b)?;
    let grad_e = asked("d per_rank", &mut grads.per_rank)?;
    let grad_g = asked("d row_scale", &mut grads.row_scale)?;

    let outputs = [p.tokens, p.outputs];
    let sum = |alpha, m, n| Product { alpha, accumulate: true, ..product(p, Layout::Tn, [m, n, p.tokens]) };
    if let Some(out) = grad_w {
        sum(1.0, p.outputs, p.inputs).run(call, Matrix::f32(dy), Matrix::f32(x), out.value())?;
    }
    if let Some(out) = grad_bias {
        add_column_sums(call, dy, None, 1.0, out, outputs)?;
    }
    let Some(l) = update else { return Ok(()) };
    let dropped_x = l.dropped(call, x, p.tokens * p.inputs)?;
    let dz = l.grad_z(call, p, dy)?;
    if let Some(out) = grad_a {
        let dz_b = l.grad_inner(call, p, dz.matrix)?;
        let dz_b_e = l.times_e(call, p, dz_b)?;
        sum(l.scale, l.rank, p.inputs).run(call, Matrix::scratch(&dz_b_e), dropped_x.matrix, out.value())?;
    }
    if let Some(out) = grad_b {
        let u = l.inner(call, p, dropped_x.matrix)?;
        sum(l.scale, p.outputs, l.rank).run(call, dz.matrix, Matrix::scratch(&u), out.value())?;
    }
    if let Some(out) = grad_e {
        let xa = call.scratch(DType::F32, p.tokens * l.rank)?;
        product(p, Layout::Nt, [p.tokens, l.rank, p.inputs]).run(call, dropped_x.matrix, l.a_matrix(), xa.at(0))?;
        let dz_b = l.grad_inner(call, p, dz.matrix)?;
        add_column_sums(call, dz_b.at(0), Some(xa.at(0)), l.scale, out, [p.tokens, l.rank])?;
    }
    if let Some(out) = grad_g {
        // Without dropout x̃ = x, so that this is z in both cases.
        let z = call.scratch(DType::F32, p.tokens * p.outputs)?;
        let w = w.matrix(call, p.compute)?;
        product(p, Layout::Nt, [p.tokens, p.outputs, p.inputs]).run(call, dropped_x.matrix, w.matrix, z.at(0))?;
        let u = l.inner(call, p, dropped_x.matrix)?;
        let delta =
            Product { alpha: l.scale, accumulate: true, ..product(p, Layout::Nt, [p.tokens, p.outputs, l.rank]) };
        delta.run(call, Matrix::scratch(&u), l.b_matrix(), z.at(0))?;
        add_column_sums(call, dy, Some(z.at(0)), 1.0, out, outputs)?;
    }
    Ok(())
}
