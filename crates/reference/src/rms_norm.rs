//! Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4).
//!
//! y_i = gain_i · x_i / ρ,   ρ = √(mean(x²) + ε)
//!
//! x, y [rows, width]; gain [width]; saved for backward: x, and 1/ρ of every row.

use crate::operands::Kernel;
use rankfold_backend::params::{RmsNorm, expect};
use rankfold_backend::{Result, View, ViewMut};

/// y and 1/ρ.
pub(crate) fn rms_norm(p: &RmsNorm, x: View, gain: View, mut y: ViewMut, mut inv_rms: ViewMut) -> Result<()> {
    let kernel = Kernel("rms_norm");
    p.check(x.len(), &gain, y.len(), inv_rms.len())?;
    let (x, gain) = (kernel.floats("x", x)?, kernel.floats("gain", gain)?);
    let mut y = kernel.floats_mut("y", &mut y)?;
    let mut inv_rms = kernel.floats_mut("inv_rms", &mut inv_rms)?;

    let (mut normed, mut inverses) = (Vec::with_capacity(x.len()), Vec::with_capacity(p.rows));
    for row in 0..p.rows {
        let x = &x[row * p.width..][..p.width];
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / p.width as f64;
        let inverse = 1.0 / (mean_square + p.eps).sqrt();
        normed.extend(x.iter().zip(&gain).map(|(x, gain)| gain * x * inverse));
        inverses.push(inverse);
    }
    y.store(normed);
    inv_rms.store(inverses);
    Ok(())
}

/// dx_i = (gain_i dy_i − x_i c) / ρ,   c = Σ_j gain_j x_j dy_j / (width·ρ²);   dgain_i = Σ_rows dy_i x_i / ρ
///
/// From ∂y_j/∂x_i = gain_j (δ_ij / ρ − x_j/ρ² · ∂ρ/∂x_i) and ∂ρ/∂x_i = x_i / (width·ρ): every element pulls on ρ,
/// and through it on every output; summed over j that pull is x_i c / ρ.
#[expect(clippy::too_many_arguments, reason = "the contract's own list")]
pub(crate) fn rms_norm_grad(
    p: &RmsNorm,
    x: View,
    gain: View,
    inv_rms: View,
    dy: View,
    accumulate: bool,
    mut dx: ViewMut,
    mut dgain: Option<ViewMut>,
) -> Result<()> {
    let kernel = Kernel("rms_norm_grad");
    p.check(x.len(), &gain, dx.len(), inv_rms.len())?;
    expect(kernel.0, "dy", dy.len(), p.rows * p.width)?;
    if let Some(dgain) = &dgain {
        expect(kernel.0, "dgain", dgain.len(), p.width)?;
    }
    let (x, gain) = (kernel.floats("x", x)?, kernel.floats("gain", gain)?);
    let (inv_rms, dy) = (kernel.floats("inv_rms", inv_rms)?, kernel.floats("dy", dy)?);
    let mut dx = kernel.floats_mut("dx", &mut dx)?;
    let dgain = dgain.as_mut().map(|dgain| kernel.floats_mut("dgain", dgain)).transpose()?;

    let mut grad_x = Vec::with_capacity(x.len());
    let mut grad_gain = vec![0.0; p.width];
    for row in 0..p.rows {
        let (x, dy) = (&x[row * p.width..][..p.width], &dy[row * p.width..][..p.width]);
        let inverse = inv_rms[row];
        let pull = (0..p.width).map(|j| gain[j] * x[j] * dy[j]).sum::<f64>();
        let c = pull * inverse * inverse / p.width as f64;
        for i in 0..p.width {
            grad_x.push((gain[i] * dy[i] - x[i] * c) * inverse);
            grad_gain[i] += dy[i] * x[i] * inverse;
        }
    }
    if accumulate {
        dx.add(grad_x);
    } else {
        dx.store(grad_x);
    }
    if let Some(mut dgain) = dgain {
        dgain.add(grad_gain);
    }
    Ok(())
}
