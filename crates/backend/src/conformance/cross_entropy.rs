//! Softmax cross-entropy.
//!
//! Let m be the largest logit, S = Σ exp(l_j − m), p_j = exp(l_j − m)/S. Rounding l_j − m is an error of u·|l_j − m|
//! in the exponent, hence the same relative error of its exp; exp itself adds [`EXP`], and the sum vocab roundings (a
//! sum in pieces, each rescaled to a new maximum, takes fewer roundings of terms and one exp a piece: m only grows,
//! so the exponents add up to the same l_j − m). So
//!
//! relative error of S: ε_S = EXP + vocab·u + u·Σ_j p_j |l_j − m|
//!
//! The loss is m + log S − l_label in either order: log adds its own error and rounds (EXP·|log S|), and there are
//! two sums, of numbers no larger than |log S| + |m − l_label|, or than |m + log S| and the loss.
//!
//! The gradient's p_j is exp(l_j − lse), or exp(l_j − m)/S: the exponent's error is that of lse and of a difference,
//! or ε_S and one division. Then come −1 and the product with the scale, which may itself be rounded, and whose
//! result may be denormal.

use super::bound::{DENORMAL, EXP, FLUSHED, UNIT, second_order};
use super::draw::{Draw, size, size_or_zero};
use super::harness::*;
use crate::Backend;
use crate::params::{CrossEntropy, IGNORED};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Copy, Debug)]
struct Case {
    p: CrossEntropy,
    ignore_all: bool,
    scale: f64,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let scales = select(vec![1.0, 1.0 / 37.0, -3.0, 1e-3]);
    (size_or_zero(33), size(1025), proptest::bool::weighted(0.1), scales, any::<u64>()).prop_map(
        |(rows, vocab, ignore_all, scale, seed)| Case { p: CrossEntropy { rows, vocab }, ignore_all, scale, seed },
    )
}

/// Rows of logits, flat ones and steep ones, some far from zero; and labels, a quarter ignored.
fn draw(case: &Case) -> (Vec<f32>, Vec<i64>) {
    let (CrossEntropy { rows, vocab }, mut draw) = (case.p, Draw::new(case.seed));
    let mut logits = Vec::new();
    for _ in 0..rows {
        let sigma = [1.0, 5.0, 40.0, 0.0][draw.below(4)];
        let shift = [0.0, 0.0, 1000.0, -1000.0][draw.below(4)];
        logits.extend(draw.normal(vocab, sigma).iter().map(|logit| logit + shift));
    }
    let label = |_| if case.ignore_all || draw.once_in(4) { IGNORED } else { draw.below(vocab) as i64 };
    (logits, (0..rows).map(label).collect())
}

/// What the bounds of a row need.
struct Row {
    max: f64,
    log_sum: f64,
    relative: f64,
}

impl Row {
    fn new(logits: &[f32]) -> Self {
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(logit.into()));
        let below = |logit: &f32| f64::from(*logit) - max;
        let sum: f64 = logits.iter().map(|logit| below(logit).exp()).sum();
        let weighted: f64 = logits.iter().map(|logit| below(logit).exp() / sum * -below(logit)).sum();
        Self { max, log_sum: sum.ln(), relative: EXP + (logits.len() as f64 + weighted) * UNIT }
    }

    /// The absolute error of log S.
    fn log_error(&self) -> f64 {
        second_order(self.relative, self.relative) + EXP * self.log_sum.abs()
    }

    fn loss_error(&self, logit: f64) -> f64 {
        let (lse, away) = (self.max + self.log_sum, self.max - logit);
        let loss = self.log_sum + away;
        self.log_error() + UNIT * (loss + away.max(lse.abs()))
    }

    /// The error of softmax − onehot where the logit is `logit`.
    fn grad_error(&self, logit: f64, onehot: f64) -> f64 {
        let (lse, below) = (self.max + self.log_sum, (self.max - logit).abs());
        let probability = (logit - lse).exp();
        let exponent = self.log_error() + UNIT * (lse.abs() + below + self.log_sum);
        let relative = exponent + EXP + UNIT;
        let flushed = if probability < 2.0 * FLUSHED { FLUSHED } else { 0.0 };
        second_order(probability * relative, relative) + flushed + 3.0 * UNIT * (probability - onehot).abs()
    }
}

fn rows<'a>(case: &Case, logits: &'a [f32]) -> (Vec<Row>, impl Fn(usize, usize) -> f64 + 'a) {
    let vocab = case.p.vocab;
    (logits.chunks(vocab).map(Row::new).collect(), move |row, column| logits[row * vocab + column].into())
}

fn forward_call<T: Real>(
    backend: &dyn Backend,
    case: &Case,
    logits: &[f32],
    labels: &[i64],
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (logits, labels) = (desk.real::<T>(logits)?, desk.put(labels)?);
    let mut losses = desk.blank(T::DTYPE, case.p.rows)?;
    backend.cross_entropy(&case.p, logits.view(), labels.view(), losses.view_mut())?;
    Ok(vec![desk.take(&losses)?])
}

fn backward_call<T: Real>(
    backend: &dyn Backend,
    case: &Case,
    logits: &[f32],
    labels: &[i64],
) -> TestCaseResult<Outputs<T>> {
    let desk = Desk::new(backend, case.seed);
    let (mut logits, labels) = (desk.real::<T>(logits)?, desk.put(labels)?);
    let mut losses = desk.blank(T::DTYPE, case.p.rows)?;
    let (labels, losses_out) = (labels.view(), losses.view_mut());
    backend.cross_entropy_grad_in_place(&case.p, case.scale, logits.view_mut(), labels, losses_out)?;
    Ok(vec![desk.take(&losses)?, desk.take(&logits)?])
}

fn agree_losses(case: &Case, logits: &[f32], labels: &[i64], found: &[f32], exact: &[f64]) -> TestCaseResult {
    let (rows, logit) = rows(case, logits);
    agree("losses", found, exact, |row| match labels[row] {
        IGNORED => 0.0,
        label => rows[row].loss_error(logit(row, label as usize)),
    })
}

/// The losses.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(192, &cases(), |case| {
        let (logits, labels) = draw(&case);
        let found = twice(|| forward_call::<f32>(candidate, &case, &logits, &labels))?;
        let exact = forward_call::<f64>(oracle, &case, &logits, &labels)?;
        agree_losses(&case, &logits, &labels, &found[0], &exact[0])
    })
}

/// The losses again, and the gradients in place of the logits.
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(192, &cases(), |case| {
        let (logits, labels) = draw(&case);
        let found = twice(|| backward_call::<f32>(candidate, &case, &logits, &labels))?;
        let exact = backward_call::<f64>(oracle, &case, &logits, &labels)?;
        agree_losses(&case, &logits, &labels, &found[0], &exact[0])?;
        let (rows, logit) = rows(&case, &logits);
        agree("dlogits", &found[1], &exact[1], |i| {
            let (row, column) = (i / case.p.vocab, i % case.p.vocab);
            let onehot = if labels[row] == column as i64 { 1.0 } else { 0.0 };
            let error = case.scale.abs() * rows[row].grad_error(logit(row, column), onehot) + DENORMAL;
            if labels[row] == IGNORED { 0.0 } else { error }
        })
    })
}

/// A NaN among a row's logits makes its loss NaN, and that of no other row: a run that diverges is seen.
pub fn nan(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    check(64, &cases(), |case| {
        let (mut logits, labels) = draw(&case);
        if logits.is_empty() {
            return Ok(());
        }
        let at = Draw::new(!case.seed).below(logits.len());
        let finite = logits.clone();
        logits[at] = f32::NAN;
        let exact = forward_call::<f64>(oracle, &case, &logits, &labels)?;
        let row = at / case.p.vocab;
        prop_assert!(labels[row] == IGNORED || exact[0][row].is_nan(), "the oracle's loss of a NaN row is a number");
        for found in [
            forward_call::<f32>(candidate, &case, &logits, &labels)?,
            backward_call::<f32>(candidate, &case, &logits, &labels)?,
        ] {
            agree_losses(&case, &finite, &labels, &found[0], &exact[0])?;
        }
        Ok(())
    })
}
