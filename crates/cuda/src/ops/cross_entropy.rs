//! The kernels of `kernels/cross_entropy.cu`.

use crate::CudaBackend;
use crate::call::{Call, Grid};
use rankfold_backend::params::CrossEntropy;
use rankfold_backend::{DType, Result, View, ViewMut};

const THREADS: u32 = 256;

/// That every label is a column or ignored.
fn check_labels(call: &Call, p: &CrossEntropy, labels: View) -> Result<()> {
    let labels = call.on_the_host::<i64>("labels", labels)?;
    labels.into_iter().enumerate().try_for_each(|(row, label)| p.column(row, label).map(|_| ()))
}

/// The losses.
pub(crate) fn cross_entropy(
    on: &CudaBackend,
    p: &CrossEntropy,
    logits: View,
    labels: View,
    mut losses: ViewMut,
) -> Result<()> {
    let call = &on.call("cross_entropy");
    p.check(call.kernel, logits.len(), &labels, &losses)?;
    let arguments = [
        call.f32("logits", logits)?,
        call.input("labels", DType::I64, labels)?,
        call.f32_mut("losses", &mut losses)?,
        (p.vocab as u64).into(),
    ];
    check_labels(call, p, labels)?;
    call.launch("cross_entropy_f32", Grid::blocks(p.rows, THREADS), &arguments)
}

/// The losses, and scale · ∂loss/∂logits in place of the logits.
pub(crate) fn cross_entropy_grad_in_place(
    on: &CudaBackend,
    p: &CrossEntropy,
    scale: f64,
    mut logits: ViewMut,
    labels: View,
    mut losses: ViewMut,
) -> Result<()> {
    let call = &on.call("cross_entropy_grad_in_place");
    p.check(call.kernel, logits.len(), &labels, &losses)?;
    let arguments = [
        call.f32_mut("logits", &mut logits)?,
        call.input("labels", DType::I64, labels)?,
        call.f32_mut("losses", &mut losses)?,
        (p.vocab as u64).into(),
        (scale as f32).into(),
    ];
    check_labels(call, p, labels)?;
    call.launch("cross_entropy_grad_f32", Grid::blocks(p.rows, THREADS), &arguments)
}

#[cfg(all(test, host_kernels))]
mod tests {
    use super::*;
    use rankfold_backend::Backend;

    fn loss(logits: &[f32], label: i64) -> f32 {
        let on = CudaBackend::on_host(None).unwrap();
        let on: &dyn Backend = &on;
        let (logits, labels) = (on.upload(logits).unwrap(), on.upload(&[label]).unwrap());
        let mut losses = on.alloc(DType::F32, 1).unwrap();
        let p = CrossEntropy { rows: 1, vocab: logits.len() };
        on.cross_entropy(&p, logits.view(), labels.view(), losses.view_mut()).unwrap();
        on.download::<f32>(losses.view()).unwrap()[0]
    }

    /// The maximum grows from one of a thread's turns to the next: what was summed before is e⁻¹⁰⁰ of what follows.
    #[test]
    fn a_sum_is_rescaled_where_its_maximum_grows() {
        let logits: Vec<f32> = (0..8192).map(|i| 100.0 * (i / 1024) as f32).collect();
        assert!((loss(&logits, 8191) - 1024f32.ln()).abs() < 1e-5);
        assert!((loss(&logits, 0) - 1024f32.ln() - 700.0).abs() < 1e-3);
    }

    /// A logit of −∞ has probability 0, be it a thread's first; a row of nothing else has no probabilities.
    #[test]
    fn masked_logits_count_for_nothing() {
        let mut logits = vec![f32::NEG_INFINITY; 3000];
        assert!(loss(&logits, 0).is_nan());
        (logits[1500], logits[2999]) = (-5.0, -5.0);
        assert!((loss(&logits, 2999) - 2f32.ln()).abs() < 1e-6);
        assert_eq!(loss(&logits, 0), f32::INFINITY);
        logits[7] = f32::INFINITY;
        assert!(loss(&logits, 2999).is_nan());
    }
}
