//! Products with a weight, whatever it is stored as, and a low-rank update beside it.
//!
//! Everything but (g − 1) is multilinear in x, W, A, B, e, g and the bias: |error| ≤ γ_n·Σ|terms|, n the most
//! roundings that a term passes ([`super::bound`]). [`case`] draws what a call is given, [`run`] makes the call on
//! either backend, and [`mass`] has the oracle add up |terms|.

mod bf16;
mod case;
mod mass;
mod run;

pub use bf16::{forward_bf16, grad_input_bf16, grad_weight_bf16, large_bf16};

use super::bound::gamma;
use super::harness::*;
use crate::{Backend, Compute};
use case::{Case, Data, cases, large_cases};
use run::{Held, Kernel};

/// Roundings of a term outside of its sums: one each for dequantising the weight, for e, for s, for dropout's factor,
/// for g, for (g − 1), for adding the base, the update and what was there before, and for the bias.
const OUTSIDE: usize = 10;

/// Gradients that `linear_grad_weight` returns, and the length of their longest chain of sums. A term of dA passes
/// the sum over outputs of dz B, then that over tokens; one of dB that over inputs; one of de both; one of dg those
/// of the forward.
fn chains(case: &Case) -> [(&'static str, usize); 6] {
    let Case { tokens, inputs, outputs, .. } = *case;
    let rank = case.rank();
    [
        ("dW", tokens),
        ("d bias", tokens),
        ("dA", tokens + outputs),
        ("dB", tokens + inputs),
        ("de", tokens + inputs + outputs),
        ("dg", tokens + inputs + rank),
    ]
}

fn law(candidate: &dyn Backend, oracle: &dyn Backend, kernel: Kernel, case: &Case) -> TestCaseResult {
    let data = Data::draw(case, oracle)?;
    let found = twice(|| run::call::<f32>(candidate, kernel, case, &data, &Held::stored))?;
    let exact = run::call::<f64>(oracle, kernel, case, &data, &Held::values)?;
    let mass = mass::mass(oracle, kernel, case, &data)?;
    let chains = chains(case);
    for (output, (found, exact)) in found.iter().zip(&exact).enumerate() {
        let (tensor, sums) = match kernel {
            Kernel::Forward => ("y", case.inputs + case.rank()),
            Kernel::GradInput => ("dx", case.outputs + case.rank()),
            Kernel::GradWeight => chains[output],
        };
        agree(tensor, found, exact, |i| gamma(sums + OUTSIDE) * mass[output][i])?;
    }
    if kernel == Kernel::GradWeight {
        let all = run::call::<f32>(candidate, kernel, &Case { all: true, ..*case }, &data, &Held::stored)?;
        same_where_asked(chains.map(|(tensor, _)| tensor), case.asked(), &found, &all)?;
    }
    Ok(())
}

fn judge(candidate: &dyn Backend, oracle: &dyn Backend, kernel: Kernel) -> Verdict {
    check(384, &cases(Compute::F32), |case| law(candidate, oracle, kernel, &case))
}

/// y, over every kind of weight, with and without each part of the update.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::Forward)
}

/// dx, written or added.
pub fn grad_input(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::GradInput)
}

/// The gradients that are asked for, added to what is there; the same bits whichever they are.
pub fn grad_weight(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::GradWeight)
}

/// All three on sizes beyond one block of any blocking.
pub fn large(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(24, &large_cases(Compute::F32), |case| {
        [Kernel::Forward, Kernel::GradInput, Kernel::GradWeight]
            .into_iter()
            .try_for_each(|kernel| law(candidate, oracle, kernel, &case))
    })
}
