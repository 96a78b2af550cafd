//! Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), pairs half a head apart as Llama stores them.
//!
//! For pair (i, j = i + head_dim/2) of every head of a token at position p, with cos, sin of row p of the tables:
//! y_i = x_i cos − x_j sin,   y_j = x_j cos + x_i sin
//!
//! x, y [tokens, heads, head_dim]; positions u32 [tokens]; cos, sin [positions, head_dim/2]. A rotation is
//! orthogonal: its gradient is its inverse, the same turn with −sin.

use crate::operands::Kernel;
use rankfold_backend::params::Rope;
use rankfold_backend::{Error, Result, View, ViewMut};

/// y = x turned by its positions, or back.
pub(crate) fn rope(p: &Rope, x: View, positions: View, cos: View, sin: View, mut y: ViewMut) -> Result<()> {
    let kernel = Kernel("rope");
    let known = p.check(&x, &positions, &cos, &sin, &y)?;
    let positions = kernel.elements::<u32>("positions", positions)?;
    let (cos, sin) = (kernel.floats("cos", cos)?, kernel.floats("sin", sin)?);
    let x = kernel.floats("x", x)?;
    let mut y = kernel.floats_mut("y", &mut y)?;
    if let Some(&position) = positions.iter().find(|&&position| position as usize >= known) {
        return Err(Error::Position { position: position as usize, positions: known });
    }

    let half = p.head_dim / 2;
    let mut turned = vec![0.0; x.len()];
    for (t, &position) in positions.iter().enumerate() {
        for head in 0..p.heads {
            let start = (t * p.heads + head) * p.head_dim;
            for pair in 0..half {
                let (i, j) = (start + pair, start + pair + half);
                let cos = cos[position as usize * half + pair];
                let sin = sin[position as usize * half + pair] * if p.inverse { -1.0 } else { 1.0 };
                turned[i] = x[i] * cos - x[j] * sin;
                turned[j] = x[j] * cos + x[i] * sin;
            }
        }
    }
    y.store(turned);
    Ok(())
}
