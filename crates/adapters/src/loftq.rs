//! LoftQ: a base in 4 bits and an update that makes up for what the 4 bits lost (Li et al. 2023, alg. 1).
//!
//! ```text
//! A, B = 0;  K times:  Q = quant(W − s·B A);  s·B A = the best approximation of rank r of W − Q
//! ```
//!
//! The two steps take turns at ‖W − Q − s·B A‖_F. The second never raises it; the first may, so that the Q, A and B of
//! the turn that left least are what is kept. Already the first turn, whose Q is the plain one, leaves no more than
//! plain quantisation does. (The paper's s is 1; PEFT leaves it out, the same where α = r, and keeps the last turn.)
//!
//! Nothing in this asks what quant is: it is NF4 with plain scales in the paper and in PEFT, and any format, blocks and
//! kind of scales here. The base becomes Q, which is not quant(W): an adapter that began so belongs to that base alone
//! ([`remade`](crate::remade)).

use crate::decompose::product;
use crate::remade::requantised;
use crate::start::balanced;
use crate::{Error, LoraSpec, Result};
use rankfold_backend::{Backend, DType, Quantized};

/// Q with A [rank, inputs] and B [outputs, rank].
#[derive(Debug)]
pub struct Found {
    /// The base.
    pub q: Quantized,
    /// A.
    pub a: Vec<f32>,
    /// B.
    pub b: Vec<f32>,
    /// ‖W − Q − s·B A‖_F
    pub left: f64,
}

/// The best of `iterations` turns for w, row-major and of the shape of `like`, which says how it is quantised.
///
/// `module` is for the message. Errors: a rank that the matrix does not have; values that cannot be quantised.
pub fn loftq(
    backend: &dyn Backend,
    module: &str,
    w: &[f32],
    like: &Quantized,
    spec: LoraSpec,
    iterations: usize,
) -> Result<Found> {
    let (dims, rank, scale) = (like.shape, spec.rank, f64::from(spec.scale()));
    let mut best: Option<Found> = None;
    let mut update = vec![0.0; w.len()];
    for _ in 0..iterations {
        let rest: Vec<f32> = w.iter().zip(&update).map(|(w, u)| (f64::from(*w) - u) as f32).collect();
        let q = requantised(backend, backend.upload(&rest)?.view(), like)?;
        let mut values = backend.alloc(DType::F32, w.len())?;
        backend.dequantize_4bit(&q, values.view_mut())?;
        let values: Vec<f32> = backend.download(values.view())?;
        let lost: Vec<f64> = w.iter().zip(&values).map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
        let [a, b] = balanced(module, &lost, dims, spec)?;
        let wide = |x: &[f32], by: f64| x.iter().map(|x| by * f64::from(*x)).collect::<Vec<f64>>();
        update = product(&wide(&b, scale), &wide(&a, 1.0), [dims[0], rank, dims[1]]);
        let left = lost.iter().zip(&update).map(|(lost, u)| (lost - u).powi(2)).sum::<f64>().sqrt();
        if best.as_ref().is_none_or(|best| left < best.left) {
            best = Some(Found { q, a, b, left });
        }
    }
    best.ok_or_else(|| Error::field("loftq_iter", iterations, "1 or more"))
}
