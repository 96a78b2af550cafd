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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, assert_close, buffer, dot, numbers, output, values};
    use rankfold_backend::rope::{Scaling, frequencies};

    const P: Rope = Rope { tokens: 3, heads: 2, head_dim: 4, inverse: false };

    /// f64 tables of 8 positions.
    fn tables() -> (Vec<f64>, Vec<f64>) {
        let thetas = frequencies(100.0, P.head_dim, Scaling::None);
        let angles: Vec<f64> = (0..8).flat_map(|t| thetas.iter().map(move |theta| f64::from(t) * theta)).collect();
        (angles.iter().map(|a| a.cos()).collect(), angles.iter().map(|a| a.sin()).collect())
    }

    fn turn(p: &Rope, x: &[f64], positions: &[u32]) -> Result<Vec<f64>> {
        let (cos, sin) = tables();
        let (x, cos, sin) = (buffer(x), buffer(&cos), buffer(&sin));
        let positions = BACKEND.upload(positions)?;
        let mut y = output(x.len());
        BACKEND.rope(p, x.view(), positions.view(), cos.view(), sin.view(), y.view_mut())?;
        Ok(values(&y))
    }

    #[test]
    fn pairs_lie_half_a_head_apart() {
        let p = Rope { tokens: 1, heads: 1, ..P };
        // θ is 1 and 1/10 for base 100 and head_dim 4.
        let y = turn(&p, &[1.0, 1.0, 0.0, 0.0], &[5]).unwrap();
        assert_close("y", &y, &[5f64.cos(), 0.5f64.cos(), 5f64.sin(), 0.5f64.sin()]);
    }

    #[test]
    fn position_0_is_the_identity_and_the_inverse_undoes() {
        let x = numbers(1, 24);
        assert_eq!(turn(&P, &x, &[0, 0, 0]).unwrap(), x);
        let y = turn(&P, &x, &[7, 1, 4]).unwrap();
        assert_close("back", &turn(&Rope { inverse: true, ..P }, &y, &[7, 1, 4]).unwrap(), &x);
        assert_close("length", &[dot(&y, &y)], &[dot(&x, &x)]);
    }

    /// y is linear in x, so ⟨rope(x), z⟩ = ⟨x, gradient of z⟩.
    #[test]
    fn the_inverse_is_the_gradient() {
        let (x, z, positions) = (numbers(1, 24), numbers(2, 24), [7, 1, 4]);
        let forward = dot(&turn(&P, &x, &positions).unwrap(), &z);
        let backward = dot(&x, &turn(&Rope { inverse: true, ..P }, &z, &positions).unwrap());
        assert_close("adjoint", &[forward], &[backward]);
    }

    #[test]
    fn a_score_depends_on_the_distance_alone() {
        let p = Rope { tokens: 1, heads: 1, ..P };
        let (q, k) = (numbers(1, 4), numbers(2, 4));
        let score = |i, j| dot(&turn(&p, &q, &[i]).unwrap(), &turn(&p, &k, &[j]).unwrap());
        assert_close("score", &[score(5, 3)], &[score(7, 5)]);
    }

    #[test]
    fn a_position_beyond_the_table_is_named() {
        let error = turn(&P, &numbers(1, 24), &[0, 8, 9]).unwrap_err();
        assert_eq!(error, Error::Position { position: 8, positions: 8 });
        assert!(turn(&Rope { heads: 8, head_dim: 1, ..P }, &numbers(1, 24), &[0, 0, 0]).is_err());
    }
}
