//! How many triplets there may be when.
//!
//! With b₀ the triplets at first, b* the target's, T the steps of the schedule (Zhang et al. 2023, eq. 12):
//!
//! ```text
//! b(t) = b₀                                                          t ≤ t_init
//!        ⌊b* + (b₀ − b*)·(1 − (t − t_init)/(T − t_init − t_final))³⌋    between
//!        b*                                                          t > T − t_final
//! ```
//!
//! and masks fall where t is a multiple of ΔT between the two, at T − t_final always.

use super::fields::LAMBDA;
use crate::{Error, Result};

/// What becomes of triplets that are masked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prune {
    /// They stay until the end, and may come back.
    Mask,
    /// They go, when the choice is final or has long been the same.
    #[default]
    Shrink,
}

/// AdaLoRA's own hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaLora {
    /// Triplets a layer on average at the end.
    pub target_rank: usize,
    /// Steps before the first mask.
    pub tinit: usize,
    /// Steps with the final choice.
    pub tfinal: usize,
    /// ΔT: steps from mask to mask.
    pub delta_t: usize,
    /// β1, of the sensitivity.
    pub beta1: f64,
    /// β2, of its deviation.
    pub beta2: f64,
    /// The weight of the orthogonality term in the loss.
    pub orthogonality: f64,
    /// Whether the term is made of squared norms, as in the paper; PEFT's are not.
    pub squared: bool,
    /// T, where the configuration says.
    pub total_step: Option<usize>,
    /// The triplets that are left, by layer; empty where none was cut.
    pub pattern: Vec<(String, Vec<bool>)>,
}

/// PEFT's defaults, but for a final phase and an interval: without these, nothing is ever chosen.
impl Default for AdaLora {
    fn default() -> Self {
        Self {
            target_rank: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orthogonality: 0.5,
            squared: false,
            total_step: None,
            pattern: Vec::new(),
        }
    }
}

/// A step's budget, and whether a mask falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// b(t).
    pub triplets: usize,
    /// Whether triplets are masked after the step.
    pub masks: bool,
}

impl AdaLora {
    /// Hyper-parameters in range for updates that begin with `rank` triplets each.
    pub fn check(&self, rank: usize) -> Result<()> {
        if self.target_rank == 0 || self.target_rank > rank {
            return Err(Error::field("target_r", self.target_rank, "1 or more, and no more than init_r"));
        }
        if self.delta_t == 0 {
            return Err(Error::field("deltaT", self.delta_t, "1 or more"));
        }
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            // At 0 an uncertainty is 0, and every score with it.
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::field(name, beta, "above 0 and below 1"));
            }
        }
        if !(self.orthogonality >= 0.0 && self.orthogonality.is_finite()) {
            return Err(Error::field("orth_reg_weight", self.orthogonality, "a finite number, 0 or more"));
        }
        self.total_step.map_or(Ok(()), |total| self.check_total(total))
    }

    /// Which of the `first` triplets that the layer at `path` had are left: all where the pattern is empty.
    ///
    /// Errors: a pattern that does not name the layer, or has not an entry a triplet.
    pub fn kept(&self, path: &str, first: usize) -> Result<Vec<bool>> {
        if self.pattern.is_empty() {
            return Ok(vec![true; first]);
        }
        let field = || format!("rank_pattern: {path}{LAMBDA}");
        match self.pattern.iter().find(|(of, _)| of == path) {
            Some((_, kept)) if kept.len() == first => Ok(kept.clone()),
            Some((_, kept)) => {
                Err(Error::field(field(), format!("of {} entries beside an init_r of {first}", kept.len()), "as many"))
            }
            None => Err(Error::field(field(), "missing", "an entry for every layer that is targeted")),
        }
    }

    /// The pattern's keys that mean none of `paths`, as the file has them: for a warning.
    pub(crate) fn unmatched(&self, paths: &[&str]) -> Vec<String> {
        let strangers = self.pattern.iter().filter(|(path, _)| !paths.contains(&path.as_str()));
        strangers.map(|(path, _)| format!("{path}{LAMBDA}")).collect()
    }

    /// That a schedule of `total` steps has any between its two phases, and one whose scores the last choice ranks.
    pub fn check_total(&self, total: usize) -> Result<()> {
        let Self { tinit, tfinal, .. } = *self;
        match total.checked_sub(tfinal) {
            Some(last) if last > tinit && last > 1 => Ok(()),
            _ => {
                let found = format!("{total} with tinit {tinit} and tfinal {tfinal}");
                Err(Error::field("total_step", found, "more than tinit + tfinal, and tfinal + 2 or more"))
            }
        }
    }

    /// b(t) of a schedule of `total` steps, from `first` triplets to `target`; steps count from 1.
    pub fn budget(&self, t: usize, total: usize, [first, target]: [usize; 2]) -> Budget {
        let last = total.saturating_sub(self.tfinal);
        if t <= self.tinit {
            Budget { triplets: first, masks: false }
        } else if t > last {
            Budget { triplets: target, masks: false }
        } else {
            let left = 1.0 - (t - self.tinit) as f64 / (last - self.tinit) as f64;
            let triplets = (target as f64 + (first - target) as f64 * left.powf(3.0)) as usize;
            Budget { triplets, masks: t.is_multiple_of(self.delta_t) || t == last }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_budget_falls_from_the_first_to_the_target_and_stays(
            tinit in 0..20usize, tfinal in 0..20usize, between in 1..50usize, delta_t in 1..7usize,
            first in 1..500usize, share in 0.0..=1.0f64,
        ) {
            let target = ((first as f64 * share) as usize).max(1);
            let schedule = AdaLora { tinit, tfinal, delta_t, ..AdaLora::default() };
            let total = tinit + between + tfinal;
            let at = |t| schedule.budget(t, total, [first, target]);
            for t in 1..=total + 5 {
                let Budget { triplets, masks } = at(t);
                prop_assert!((target..=first).contains(&triplets));
                prop_assert!(t == 1 || triplets <= at(t - 1).triplets);
                prop_assert!(!masks || (t > tinit && t <= total - tfinal));
                prop_assert!(t > tinit || triplets == first);
            }
            prop_assert_eq!(at(total - tfinal), Budget { triplets: target, masks: true });
        }
    }

    #[test]
    fn a_schedule_needs_a_step_between_its_phases() {
        let schedule = AdaLora { tinit: 5, tfinal: 10, ..AdaLora::default() };
        assert!(schedule.check_total(16).is_ok());
        let why = schedule.check_total(15).unwrap_err().to_string();
        let expected = "expected more than tinit + tfinal, and tfinal + 2 or more";
        assert_eq!(why, format!("'total_step' is 15 with tinit 5 and tfinal 10, {expected}"));
        assert!(AdaLora { tinit: usize::MAX, tfinal: 2, ..schedule }.check_total(15).is_err());
    }

    /// At T − t_final the scores of the step before rank: the first step has none before it.
    #[test]
    fn the_last_choice_has_a_step_before_it() {
        for tfinal in [0, 3] {
            let schedule = AdaLora { tfinal, ..AdaLora::default() };
            assert!(schedule.check_total(tfinal + 1).is_err());
            assert!(schedule.check_total(tfinal + 2).is_ok());
        }
    }
}
