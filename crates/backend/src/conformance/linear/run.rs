//! One call of a linear kernel, on the candidate in f32 or on the oracle in f64.

use super::case::{Case, Data, Stored, StoredScales};
use crate::conformance::harness::*;
use crate::params::Linear;
use crate::{Backend, LinearGrads, LowRank, Quantized, Result, Scales, Weight};

/// Which of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    Forward,
    GradInput,
    GradWeight,
}

/// A weight on a backend.
pub enum Held {
    Dense(Placed),
    Quantized(Quantized),
}

impl Held {
    /// As it is stored: what the candidate gets.
    pub fn stored(desk: &Desk, case: &Case, data: &Data) -> Result<Self> {
        Ok(match &data.stored {
            Stored::F32(w) => Self::Dense(desk.put(w)?),
            Stored::Bf16(w) => Self::Dense(desk.put(w)?),
            Stored::F16(w) => Self::Dense(desk.put(w)?),
            Stored::Quantized { format, block, codes, scales } => Self::Quantized(Quantized {
                codes: desk.backend.upload(codes)?,
                scales: match scales {
                    StoredScales::Plain(absmax) => Scales::Plain(desk.backend.upload(absmax)?),
                    StoredScales::Nested { codes, absmax, offset } => Scales::Nested {
                        codes: desk.backend.upload(codes)?,
                        absmax: desk.backend.upload(absmax)?,
                        offset: *offset,
                    },
                },
                format: *format,
                block: *block,
                shape: [case.outputs, case.inputs],
            }),
        })
    }

    /// The numbers that it stands for, in f64: what the oracle gets.
    pub fn values(desk: &Desk, _: &Case, data: &Data) -> Result<Self> {
        Ok(Self::Dense(desk.real::<f64>(&data.w)?))
    }

    fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(w) => Weight::Dense(w.view()),
            Self::Quantized(q) => Weight::Quantized(q),
        }
    }
}

/// The kernel's outputs: y, dx, or the six gradients, of which those not asked for keep what they held.
pub fn call<T: Real>(
    backend: &dyn Backend,
    kernel: Kernel,
    case: &Case,
    data: &Data,
    hold: &dyn Fn(&Desk, &Case, &Data) -> Result<Held>,
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let p = Linear { tokens: case.tokens, inputs: case.inputs, outputs: case.outputs, compute: case.compute };
    let (x, dy, held) = (desk.real::<T>(&data.x)?, desk.real::<T>(&data.dy)?, hold(&desk, case, data)?);
    let (a, b) = (desk.real::<T>(&data.a)?, desk.real::<T>(&data.b)?);
    let (e, g, bias) = (desk.real::<T>(&data.e)?, desk.real::<T>(&data.g)?, desk.real::<T>(&data.bias)?);
    let low_rank = case.update.map(|update| LowRank {
        rank: update.rank,
        a: a.view(),
        b: b.view(),
        scale: data.s,
        per_rank: update.per_rank.then(|| e.view()),
        row_scale: update.row_scale.then(|| g.view()),
        dropout: case.dropout(),
    });
    let (w, low_rank) = (held.weight(), low_rank.as_ref());
    match kernel {
        Kernel::Forward => {
            let mut y = desk.blank(T::DTYPE, data.dy.len())?;
            let bias = case.bias.then(|| bias.view());
            backend.linear(&p, x.view(), &w, low_rank, bias, y.view_mut())?;
            Ok(vec![desk.take(&y)?])
        }
        Kernel::GradInput => {
            let mut dx = desk.output::<T>(case.accumulate, &data.dx)?;
            backend.linear_grad_input(&p, dy.view(), &w, low_rank, case.accumulate, dx.view_mut())?;
            Ok(vec![desk.take(&dx)?])
        }
        Kernel::GradWeight => {
            let mut placed = Vec::new();
            for initial in &data.grads {
                placed.push(desk.real::<T>(initial)?);
            }
            let [dw, dbias, da, db, de, dg] = &mut placed[..] else { unreachable!("six gradients") };
            let asked = case.asked();
            let grads = LinearGrads {
                weight: asked[0].then(|| dw.view_mut()),
                bias: asked[1].then(|| dbias.view_mut()),
                a: asked[2].then(|| da.view_mut()),
                b: asked[3].then(|| db.view_mut()),
                per_rank: asked[4].then(|| de.view_mut()),
                row_scale: asked[5].then(|| dg.view_mut()),
            };
            backend.linear_grad_weight(&p, x.view(), dy.view(), &w, low_rank, grads)?;
            placed.iter().map(|grad| desk.take(grad)).collect()
        }
    }
}
