//! The linear kernels with the inputs of every product rounded to bf16.
//!
//! A product of two bf16 is exact in f32, so on inputs of the call the bound is that of the sum, rounded or cut. Two inputs are made on
//! the way: u = x̃ (e∘A)ᵀ and du = (g∘dy) B ∘ e. The candidate's lie within γ·Σ|terms| of the oracle's before they
//! are rounded, and rounding may then part them by a step of bf16 ([`rounded_spread`]): what that makes of the
//! outputs is added to the bound, element by element.

use super::case::{Case, Data, Storage, cases, large_cases};
use super::mass::{absolute, mass};
use super::run::{Held, Kernel, call};
use super::{OUTSIDE, chains};
use crate::conformance::bound::{gamma_of, rounded_spread, to_bf16};
use crate::conformance::harness::*;
use crate::params::Linear;
use crate::{Backend, Compute, Weight, philox};

/// y, with bf16 products.
pub fn forward_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::Forward)
}

/// dx, with bf16 products.
pub fn grad_input_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::GradInput)
}

/// The gradients of the weight, the bias and the update, with bf16 products.
pub fn grad_weight_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    judge(candidate, oracle, Kernel::GradWeight)
}

/// All three on sizes beyond one block of any blocking.
pub fn large_bf16(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    unserved(candidate).unwrap_or_else(|| {
        check(24, &large_cases(Compute::Bf16), |case| {
            [Kernel::Forward, Kernel::GradInput, Kernel::GradWeight]
                .into_iter()
                .try_for_each(|kernel| law(candidate, oracle, kernel, &case))
        })
    })
}

fn judge(candidate: &dyn Backend, oracle: &dyn Backend, kernel: Kernel) -> Verdict {
    unserved(candidate)
        .unwrap_or_else(|| check(256, &cases(Compute::Bf16), |case| law(candidate, oracle, kernel, &case)))
}

/// Why nothing is judged, where the candidate has no bf16 products.
fn unserved(candidate: &dyn Backend) -> Option<Verdict> {
    let trial = || {
        let p = Linear { tokens: 1, inputs: 1, outputs: 1, compute: Compute::Bf16 };
        let [x, w, mut y] = [candidate.upload(&[1f32])?, candidate.upload(&[1f32])?, candidate.upload(&[1f32])?];
        candidate.linear(&p, x.view(), &Weight::Dense(w.view()), None, None, y.view_mut())
    };
    unsupported(trial())
}

fn law(candidate: &dyn Backend, oracle: &dyn Backend, kernel: Kernel, case: &Case) -> TestCaseResult {
    let data = Data::draw(case, oracle)?;
    let found = twice(|| call::<f32>(candidate, kernel, case, &data, &Held::stored))?;
    let exact = call::<f64>(oracle, kernel, case, &data, &Held::values)?;
    let mass = mass(oracle, kernel, case, &data)?;
    let parted = parted(oracle, kernel, case, &data)?;
    let chains = chains(case);
    for (output, (found, exact)) in found.iter().zip(&exact).enumerate() {
        let (tensor, sums) = match kernel {
            Kernel::Forward => ("y", case.inputs + case.rank()),
            Kernel::GradInput => ("dx", case.outputs + case.rank()),
            Kernel::GradWeight => chains[output],
        };
        // The oracle rounds |u|, |du| and |g| + 2 to bf16 as it adds up absolute values: they may each have lost
        // 2⁻⁹ of themselves, two of them in one term.
        let widened = gamma_of(Compute::Bf16, sums + OUTSIDE) * (1.0 + 1.0 / 128.0);
        agree(tensor, found, exact, |i| widened * mass[output][i] + parted[output].get(i).unwrap_or(&0.0))?;
    }
    Ok(())
}

/// How far the steps of bf16 between the two u and the two du may move each output; empty where not at all.
fn parted(oracle: &dyn Backend, kernel: Kernel, case: &Case, data: &Data) -> TestCaseResult<Outputs<f64>> {
    let Case { tokens, inputs, outputs, .. } = *case;
    let rank = case.rank();
    let abs_bf16 = |values: &[f32]| values.iter().map(|&value| to_bf16(value.into()).abs()).collect::<Vec<f64>>();
    let columns = |values: &[f32], factors: &[f32]| -> Vec<f32> {
        values
            .iter()
            .enumerate()
            .map(|(i, v)| if factors.is_empty() { *v } else { v * factors[i % factors.len()] })
            .collect()
    };
    let s = f64::from(data.s.abs());
    let dropped = dropped(case, &data.x);
    let dz = columns(&data.dy, &data.g);
    let ea: Vec<f32> =
        data.a.iter().enumerate().map(|(i, a)| if data.e.is_empty() { *a } else { a * data.e[i / inputs] }).collect();
    let be = columns(&data.b, &data.e);
    let be_transposed: Vec<f32> = (0..rank * outputs).map(|i| be[i % outputs * rank + i / outputs]).collect();
    let u = || spreads(oracle, case, inputs, &dropped, &ea);
    let du = || spreads(oracle, case, outputs, &dz, &be_transposed);
    let (a, b) = (abs_bf16(&data.a), abs_bf16(&data.b));
    // Σ_r left_tr · right(r) at every (t, column).
    let through = |left: &[f64], width: usize, right: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        let at = |t: usize, column: usize| (0..rank).map(|r| left[t * rank + r] * right(r, column)).sum::<f64>();
        (0..tokens * width).map(|i| s * at(i / width, i % width)).collect()
    };
    Ok(match kernel {
        Kernel::Forward => {
            let g = |o: usize| data.g.get(o).map_or(1.0, |g| f64::from(g.abs()));
            vec![through(&u()?, outputs, &|r, o| g(o) * b[o * rank + r])]
        }
        Kernel::GradInput => {
            let keep = case.dropout().map_or(1.0, |dropout| f64::from(dropout.keep_scale()));
            vec![through(&du()?, inputs, &|r, i| keep * a[r * inputs + i])]
        }
        Kernel::GradWeight => {
            let (u, du) = (u()?, du()?);
            let (x, dz, dy) = (abs_bf16(&dropped), abs_bf16(&dz), absolute(data).dy);
            let over_tokens = |term: &dyn Fn(usize) -> f64| (0..tokens).map(term).sum::<f64>();
            let grad_a = |i: usize| {
                let (r, column) = (i / inputs, i % inputs);
                s * over_tokens(&|t| du[t * rank + r] * x[t * inputs + column])
            };
            let grad_b = |i: usize| {
                let (o, r) = (i / rank, i % rank);
                s * over_tokens(&|t| dz[t * outputs + o] * u[t * rank + r])
            };
            let z = through(&u, outputs, &|r, o| b[o * rank + r]);
            let grad_g = |o: usize| over_tokens(&|t| f64::from(dy[t * outputs + o]) * z[t * outputs + o]);
            vec![
                Vec::new(),
                Vec::new(),
                (0..rank * inputs).map(grad_a).collect(),
                (0..outputs * rank).map(grad_b).collect(),
                Vec::new(),
                (0..outputs).map(grad_g).collect(),
            ]
        }
    })
}

/// x̃. Its factor is a power of two here, so the product is exact.
fn dropped(case: &Case, x: &[f32]) -> Vec<f32> {
    let Some(dropout) = case.dropout() else { return x.to_vec() };
    let kept = |i: usize| philox::word(dropout.seed, dropout.stream, i as u64) >= dropout.threshold();
    x.iter().enumerate().map(|(i, x)| if kept(i) { x * dropout.keep_scale() } else { 0.0 }).collect()
}

/// For x [tokens, width] and w [rank, width]: how far two roundings to bf16 of x wᵀ may lie apart.
fn spreads(oracle: &dyn Backend, case: &Case, width: usize, x: &[f32], w: &[f32]) -> TestCaseResult<Vec<f64>> {
    let rank = case.rank();
    let inner = Case { inputs: width, outputs: rank, storage: Storage::F32, update: None, bias: false, ..*case };
    let none = || Vec::new();
    let data = Data {
        x: x.to_vec(),
        dy: vec![0.0; case.tokens * rank],
        stored: super::case::Stored::F32(none()),
        w: w.to_vec(),
        a: none(),
        b: none(),
        s: 1.0,
        e: none(),
        g: none(),
        bias: none(),
        dx: none(),
        grads: std::array::from_fn(|_| none()),
    };
    let product = call::<f64>(oracle, Kernel::Forward, &inner, &data, &Held::values)?;
    let mass = call::<f64>(oracle, Kernel::Forward, &inner, &absolute(&data), &Held::values)?;
    Ok(product[0]
        .iter()
        .zip(&mass[0])
        .map(|(&x, mass)| rounded_spread(x, gamma_of(Compute::Bf16, width) * mass))
        .collect())
}
