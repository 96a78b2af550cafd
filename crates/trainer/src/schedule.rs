//! The learning rate of every step: a linear warm-up, then constant, linear or cosine.

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// The full rate to the end.
    #[default]
    Constant,
    /// In a straight line to zero.
    Linear,
    /// Half a cosine to zero (Loshchilov & Hutter 2017, SGDR, eq. 5 without restarts).
    Cosine,
}

/// Learning rate as a function of the step.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The rate at the warm-up's end.
    pub lr: f64,
    /// What follows the warm-up.
    pub decay: Decay,
    /// Steps of the warm-up: step t of them has t/warmup of the rate, so that the first step is not wasted at 0.
    pub warmup: usize,
    /// All steps of the run.
    pub steps: usize,
}

impl Schedule {
    /// The rate of step `step`, counted from 1.
    pub fn at(&self, step: usize) -> f64 {
        if step <= self.warmup {
            return self.lr * step as f64 / self.warmup as f64;
        }
        // 0 at the first step after the warm-up; it would be 1 one step after the last.
        let progress = (step - 1 - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64;
        self.lr
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => (1.0 - progress).max(0.0),
                Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_to_the_full_rate_and_decays_towards_zero() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let schedule = Schedule { lr: 2.0, decay, warmup: 4, steps: 20 };
            assert_eq!([1, 2, 4, 5].map(|t| schedule.at(t)), [0.5, 1.0, 2.0, 2.0]);
            let rates: Vec<f64> = (5..=20).map(|t| schedule.at(t)).collect();
            assert!(rates.windows(2).all(|pair| pair[1] <= pair[0]));
            let last = rates[15] / 2.0;
            assert!(if decay == Decay::Constant { last == 1.0 } else { last > 0.0 && last < 0.07 });
        }
    }

    #[test]
    fn a_run_of_nothing_but_warm_up_has_its_rates() {
        let schedule = Schedule { lr: 1.0, decay: Decay::Linear, warmup: 2, steps: 2 };
        assert_eq!([schedule.at(1), schedule.at(2)], [0.5, 1.0]);
    }
}
