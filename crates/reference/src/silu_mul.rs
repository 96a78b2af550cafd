//! The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6): out = silu(gate) · up, silu(g) = g·σ(g).
//!
//! gate, up, out: any one length. σ(g) = 1/(1 + e^−g).

use crate::operands::Kernel;
use rankfold_backend::params::{expect, expect_some};
use rankfold_backend::{Result, View, ViewMut};

/// σ(x)
pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// out = gate · σ(gate) · up
pub(crate) fn silu_mul(gate: View, up: View, mut out: ViewMut) -> Result<()> {
    let kernel = Kernel("silu_mul");
    expect(kernel.0, "up", up.len(), gate.len())?;
    expect(kernel.0, "out", out.len(), gate.len())?;
    let (gate, up) = (kernel.floats("gate", gate)?, kernel.floats("up", up)?);
    kernel.floats_mut("out", &mut out)?.store(gate.iter().zip(up).map(|(&gate, up)| gate * sigmoid(gate) * up));
    Ok(())
}

/// dgate = dout · up · σ(1 + gate(1 − σ)), from silu' = σ + gate·σ' and σ' = σ(1 − σ); dup = dout · gate · σ.
pub(crate) fn silu_mul_grad(
    gate: View,
    up: View,
    dout: View,
    mut dgate: Option<ViewMut>,
    mut dup: Option<ViewMut>,
) -> Result<()> {
    let kernel = Kernel("silu_mul_grad");
    let len = gate.len();
    expect(kernel.0, "up", up.len(), len)?;
    expect(kernel.0, "dout", dout.len(), len)?;
    expect_some(kernel.0, "dgate", dgate.as_ref().map(ViewMut::len), len)?;
    expect_some(kernel.0, "dup", dup.as_ref().map(ViewMut::len), len)?;
    let (gate, up) = (kernel.floats("gate", gate)?, kernel.floats("up", up)?);
    let dout = kernel.floats("dout", dout)?;
    let dgate = kernel.some_mut("dgate", &mut dgate)?;
    let dup = kernel.some_mut("dup", &mut dup)?;
    if let Some(mut dgate) = dgate {
        dgate.store((0..len).map(|i| {
            let sigma = sigmoid(gate[i]);
            dout[i] * up[i] * sigma * (1.0 + gate[i] * (1.0 - sigma))
        }));
    }
    if let Some(mut dup) = dup {
        dup.store((0..len).map(|i| dout[i] * gate[i] * sigmoid(gate[i])));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::testing::{BACKEND, assert_close, assert_gradient, buffer, dot, numbers, output, values};

    fn forward(gate: &[f64], up: &[f64]) -> Vec<f64> {
        let mut out = output(gate.len());
        BACKEND.silu_mul(buffer(gate).view(), buffer(up).view(), out.view_mut()).unwrap();
        values(&out)
    }

    #[test]
    fn silu_is_0_at_0_x_far_above_and_0_far_below() {
        assert_eq!(forward(&[0.0, 800.0, -800.0], &[3.0, 2.0, 2.0]), [0.0, 1600.0, 0.0]);
        // σ(ln 3) = 3/4.
        assert_close("ln 3", &forward(&[3f64.ln()], &[2.0]), &[1.5 * 3f64.ln()]);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (gate, up, dout) = (numbers(1, 8), numbers(2, 8), numbers(3, 8));
        let (mut dgate, mut dup) = (output(8), output(8));
        let (g, u, d) = (buffer(&gate), buffer(&up), buffer(&dout));
        let (out_gate, out_up) = (Some(dgate.view_mut()), Some(dup.view_mut()));
        BACKEND.silu_mul_grad(g.view(), u.view(), d.view(), out_gate, out_up).unwrap();
        assert_gradient("gate", &gate, &values(&dgate), |gate| dot(&forward(gate, &up), &dout));
        assert_gradient("up", &up, &values(&dup), |up| dot(&forward(&gate, up), &dout));
    }
}
