//! How far matrices are from having orthonormal triplets (Zhang et al. 2023, eq. 4), on average:
//!
//! R = 1/n · Σ_i ‖G_i − I‖_F,   G = P Pᵀ where the triplets are P's rows, Pᵀ P where they are its columns
//!
//! or, as the paper has it, the squares of the norms. P: [triplets, width] or [height, triplets]; R: one element.

use crate::{Error, Gradients, Op, Result, Tape, Tensor};
use rankfold_backend::params::{Layout, MatMul, Triplets};
use rankfold_backend::{Backend, Buffer, Compute, DType};
use std::sync::Arc;

/// A matrix with G − I and its norm.
struct Factor {
    matrix: Tensor,
    triplets: Triplets,
    gap: Buffer,
    norm: f64,
}

struct Orthogonality {
    factors: Vec<Factor>,
    squared: bool,
}

impl Tape {
    /// R of `matrices`, with its value; a matrix without triplets has a norm of 0 and counts.
    pub fn orthogonality(&self, matrices: &[(Tensor, Triplets)], squared: bool) -> Result<(Tensor, f64)> {
        let backend = self.backend().as_ref();
        let factor = |(matrix, triplets): &(Tensor, Triplets)| -> Result<Factor> {
            let gap = gap(backend, matrix, *triplets)?;
            let norm = backend.sum_squares(gap.view())?.sqrt();
            Ok(Factor { matrix: matrix.clone(), triplets: *triplets, gap, norm })
        };
        let factors = matrices.iter().map(factor).collect::<Result<Vec<_>>>()?;
        let term = |factor: &Factor| if squared { factor.norm * factor.norm } else { factor.norm };
        let value = factors.iter().map(term).sum::<f64>() / factors.len().max(1) as f64;
        let dtype = matrices.first().map_or(DType::F32, |(matrix, _)| matrix.dtype());
        let inputs: Vec<_> = matrices.iter().map(|(matrix, _)| matrix.variable()).collect();
        let output = backend.filled(dtype, 1, value)?;
        Ok((self.record(output, [1], &inputs, |_| Ok(Orthogonality { factors, squared }))?, value))
    }
}

/// G − I [triplets, triplets].
fn gap(backend: &dyn Backend, matrix: &Tensor, triplets: Triplets) -> Result<Buffer> {
    let [rows, width] = dims(matrix)?;
    let (n, k, layout) = match triplets {
        Triplets::Rows => (rows, width, Layout::Nt),
        Triplets::Columns => (width, rows, Layout::Tn),
    };
    let minus_identity = |i: usize| if i.is_multiple_of(n + 1) { -1.0 } else { 0.0 };
    let mut gap = match matrix.dtype() {
        DType::F64 => backend.upload(&(0..n * n).map(minus_identity).collect::<Vec<f64>>())?,
        _ => backend.upload(&(0..n * n).map(|i| minus_identity(i) as f32).collect::<Vec<f32>>())?,
    };
    let p = MatMul { m: n, n, k, layout, accumulate: true, compute: Compute::F32 };
    backend.matmul(&p, matrix.view(), matrix.view(), gap.view_mut())?;
    Ok(gap)
}

fn dims(matrix: &Tensor) -> Result<[usize; 2]> {
    matrix.shape().dims().try_into().map_err(|_| Error::Shape {
        op: "orthogonality",
        tensor: "matrix",
        expected: "[rows, width]".into(),
        found: matrix.shape().clone(),
    })
}

/// With M = G − I, which is symmetric: d‖M‖² = 2 ⟨M, dG⟩ and dG = dP Pᵀ + P dPᵀ, so that ∂‖M‖²/∂P = 4 M P
/// (4 P M where the triplets are columns), and ∂‖M‖/∂P is that over 2‖M‖; 0 where M is, its least.
impl Op for Orthogonality {
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()> {
        let Self { factors, squared } = *self;
        let share = scalar(backend, &grad)? / factors.len() as f64;
        for Factor { matrix, triplets, mut gap, norm } in factors {
            let Some(variable) = matrix.variable() else { continue };
            let factor = match squared {
                true => 4.0,
                false if norm == 0.0 => 0.0,
                false => 2.0 / norm,
            };
            backend.scale_in_place(factor * share, gap.view_mut())?;
            let [m, n] = dims(&matrix)?;
            let (k, left, right) = match triplets {
                Triplets::Rows => (m, gap.view(), matrix.view()),
                Triplets::Columns => (n, matrix.view(), gap.view()),
            };
            let mut into = gradients.take(variable, matrix.dtype(), m * n)?;
            let p = MatMul { m, n, k, layout: Layout::Nn, accumulate: into.accumulate, compute: Compute::F32 };
            backend.matmul(&p, left, right, into.buffer.view_mut())?;
            gradients.put(variable, into.buffer);
        }
        Ok(())
    }
}

fn scalar(backend: &dyn Backend, buffer: &Buffer) -> Result<f64> {
    Ok(match buffer.dtype() {
        DType::F64 => backend.download::<f64>(buffer.view())?[0],
        _ => f64::from(backend.download::<f32>(buffer.view())?[0]),
    })
}
