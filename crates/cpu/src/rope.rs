//! Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), on halves as Llama lays them out.
//!
//! Pair (i, j = i + head_dim/2) of each head turns by the angle of its token's position:
//! y_i = x_i cos − x_j sin,   y_j = x_j cos + x_i sin.   Its gradient is the turn back: −sin in place of sin.

use crate::elementwise::CHUNK;
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Rope;
use rankfold_backend::{Error, Result};

/// The angles: which row of the tables each token has, and the tables.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub(crate) positions: &'a [u32],
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

/// x turned; an error for a position that the tables, of `known` rows, lack.
pub(crate) fn rope(
    threads: &Threads,
    isa: Isa,
    p: &Rope,
    known: usize,
    x: &[f32],
    angles: Angles,
    y: &mut [f32],
) -> Result<()> {
    if let Some(position) = angles.positions.iter().map(|p| *p as usize).find(|position| *position >= known) {
        return Err(Error::Position { position, positions: known });
    }
    let width = p.heads * p.head_dim;
    let y = Disjoint::new(y);
    threads.run_chunks(p.tokens, (CHUNK / width.max(1)).max(1), |tokens| {
        let elements = tokens.start * width..tokens.end * width;
        // SAFETY: the tokens of two tasks do not overlap.
        let y = unsafe { y.get(elements.clone()) };
        let angles = Angles { positions: &angles.positions[tokens], ..angles };
        isa.run(Turn { p, x: &x[elements], angles, y });
    });
    Ok(())
}

struct Turn<'a> {
    p: &'a Rope,
    x: &'a [f32],
    angles: Angles<'a>,
    y: &'a mut [f32],
}

impl Kernel for Turn<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (half, sign) = (self.p.head_dim / 2, if self.p.inverse { -1.0f32 } else { 1.0 });
        let heads = self.x.chunks_exact(2 * half).zip(self.y.chunks_exact_mut(2 * half));
        for (h, (x, y)) in heads.enumerate() {
            let row = self.angles.positions[h / self.p.heads] as usize * half;
            let (cos, sin) = (&self.angles.cos[row..row + half], &self.angles.sin[row..row + half]);
            let ((xi, xj), (yi, yj)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                let sin = sign * sin[i];
                yi[i] = xi[i] * cos[i] - xj[i] * sin;
                yj[i] = xj[i] * cos[i] + xi[i] * sin;
            }
        }
    }
}
