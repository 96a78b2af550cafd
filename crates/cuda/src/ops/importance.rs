//! The kernels of `kernels/importance.cu`.

use super::columns::add_column_sums;
use crate::call::Grid;
use crate::{Argument, CudaBackend};
use rankfold_backend::params::{Importance, Triplets};
use rankfold_backend::{Result, View, ViewMut};

/// One step of both averages, in place, and the scores of what they then are.
pub(crate) fn importance(
    on: &CudaBackend,
    p: &Importance,
    weight: View,
    grad: View,
    mut mean: ViewMut,
    mut deviation: ViewMut,
    mut scores: ViewMut,
) -> Result<()> {
    p.check(&weight, &grad, &mean, &deviation, &scores)?;
    let (call, n) = (&on.call("importance"), weight.len());
    let (weight, grad) = (call.f32("weight", weight)?, call.f32("grad", grad)?);
    let (mean, deviation) = (call.f32_mut("mean", &mut mean)?, call.f32_mut("deviation", &mut deviation)?);
    let scores = call.f32_mut("scores", &mut scores)?;
    let constants = [p.grad_scale, p.beta1, 1.0 - p.beta1, p.beta2, 1.0 - p.beta2].map(|x| (x as f32).into());
    match p.triplets {
        Triplets::Rows => {
            let tensors = [weight, grad, mean, deviation, scores, (p.width as u64).into()];
            let grid = Grid::a_block_a_row(p.rows, p.width);
            call.launch("importance_of_rows_f32", grid, &[&tensors[..], &constants].concat())
        }
        Triplets::Columns => {
            let tensors = [weight, grad, mean, deviation, (n as u64).into()];
            call.launch("importance_f32", Grid::stride(n), &[&tensors[..], &constants].concat())?;
            let zeros = [0u32.into(), Argument::output_bits(4, scores.value()), (p.width as u64).into()];
            call.launch("fill_u32", Grid::stride(p.width), &zeros)?;
            let shape = [if p.width == 0 { 0 } else { p.rows }, p.width];
            add_column_sums(call, mean.value(), Some(deviation.value()), 1.0 / p.rows as f32, scores, shape)
        }
    }
}
