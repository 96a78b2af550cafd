//! A method at the best of its learning rates.
//!
//! Every rate is tried with the first seeds, all seeds run at the best one. A rate at which a loss or a gradient is no
//! number is out, and its place is marked. Where the best is the first or the last that was tried, a
//! better one may lie beyond: no claim is then decided ([`judged`]).

use super::spread::{Spread, Verdict};
use super::training::Setting;
use crate::error::{Error, Result};
use rankfold_trainer::Error::NotFinite;
use serde::Serialize;

/// Seeds that choose a rate, where runs are long.
pub const CHOOSING: u64 = 2;

/// What came of one learning rate, by seed.
#[derive(Clone, Debug, Serialize)]
pub struct AtRate {
    /// The rate.
    pub lr: f64,
    /// Whether a run came to no number: the others' figures are then those before it.
    pub diverged: bool,
    /// What chooses.
    pub tuning: Vec<f64>,
    /// What is reported.
    pub held_out: Vec<f64>,
}

/// What came of a method at each of its rates.
#[derive(Clone, Debug, Serialize)]
pub struct Tuned {
    /// By rate.
    pub rates: Vec<AtRate>,
    /// The place of the rate with the least mean of what chooses.
    pub best: usize,
    /// Whether that is the first or the last place.
    pub at_edge: bool,
}

impl Tuned {
    /// At its own best rate.
    pub fn best(&self) -> &AtRate {
        &self.rates[self.best]
    }

    /// At it, what is reported.
    pub fn spread(&self) -> Spread {
        Spread::of(&self.best().held_out)
    }
}

/// Measure (what chooses, what is reported) at the first rates that the setting allows, which the first `choosing` of
/// its seeds choose from.
///
/// Errors: one of a run, with what it was; a method that diverges at every rate.
pub fn tune(
    setting: Setting,
    choosing: u64,
    said: &str,
    rates: &[f64],
    mut measure: impl FnMut(f64, u64) -> Result<(f64, f64)>,
) -> Result<Tuned> {
    let mut go_on = |at: &mut AtRate, seeds: u64| -> Result<()> {
        for seed in at.tuning.len() as u64..seeds {
            let run = format!("{said}, rate {:e}, seed {seed}", at.lr);
            match measure(at.lr, seed) {
                Ok((tuning, held_out)) if tuning.is_finite() && held_out.is_finite() => {
                    eprintln!("{run}: {held_out:.4}");
                    at.tuning.push(tuning);
                    at.held_out.push(held_out);
                }
                Ok(_) | Err(Error::Trainer(NotFinite { .. })) => {
                    eprintln!("{run}: diverged");
                    at.diverged = true;
                    break;
                }
                Err(source) => return Err(Error::Run { run, source: Box::new(source) }),
            }
        }
        Ok(())
    };
    let choosing = setting.seeds.min(choosing);
    let new = |lr: &f64| AtRate { lr: *lr, diverged: false, tuning: Vec::new(), held_out: Vec::new() };
    let mut rates: Vec<AtRate> = rates.iter().take(setting.rates.unwrap_or(usize::MAX)).map(new).collect();
    for at in &mut rates {
        go_on(at, choosing)?;
    }
    loop {
        let mean = |place: &usize| Spread::of(&rates[*place].tuning[..choosing as usize]).mean;
        let usable = (0..rates.len()).filter(|place| !rates[*place].diverged);
        let Some(best) = usable.min_by(|a, b| mean(a).total_cmp(&mean(b))) else {
            return Err(Error::Usage(format!("{said}: it diverges at every rate that was tried")));
        };
        go_on(&mut rates[best], setting.seeds)?;
        if !rates[best].diverged {
            let at_edge = best == 0 || best + 1 == rates.len();
            return Ok(Tuned { rates, best, at_edge });
        }
    }
}

/// A verdict over these methods, and what is to be said of their rates: open where a best one is at the end of those
/// that were tried.
pub fn judged(verdict: Verdict, methods: &[(&str, &Tuned)]) -> (Verdict, String) {
    let at_edge: Vec<String> = methods
        .iter()
        .filter(|(_, tuned)| tuned.at_edge)
        .map(|(name, tuned)| format!("{name} ({:e})", tuned.best().lr))
        .collect();
    let diverged: Vec<String> = methods
        .iter()
        .flat_map(|(name, tuned)| tuned.rates.iter().filter(|at| at.diverged).map(move |at| (name, at.lr)))
        .map(|(name, lr)| format!("{name} at {lr:e}"))
        .collect();
    let mut said = String::new();
    if !at_edge.is_empty() {
        said += &format!(
            " At the end of the rates that were tried, so that a better one may lie beyond and nothing is decided: {}.",
            at_edge.join(", ")
        );
    }
    if !diverged.is_empty() {
        said += &format!(" Diverged: {}.", diverged.join(", "));
    }
    (if at_edge.is_empty() { verdict } else { Verdict::Undecided }, said)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTING: Setting = Setting { seeds: 3, steps: 1, rows: 1, seq: 2, held_out: None, rates: None };

    #[test]
    fn the_rate_is_chosen_by_one_part_of_the_text_and_reported_on_the_other() {
        // The mean of what chooses is least at 2, what is reported at 3.
        let measured = |lr: f64, seed: u64| Ok(((lr - 2.0).abs() + seed as f64, (lr - 3.0).abs()));
        let tuned = tune(SETTING, 2, "", &[1.0, 2.0, 3.0], measured).unwrap();
        assert_eq!((tuned.best().lr, tuned.spread().mean, tuned.rates.len()), (2.0, 1.0, 3));
        assert_eq!(tuned.rates.iter().map(|at| at.held_out.len()).collect::<Vec<_>>(), [2, 3, 2]);
        let limited = tune(Setting { rates: Some(1), ..SETTING }, 2, "", &[1.0, 2.0], measured).unwrap();
        assert_eq!((limited.best().lr, limited.rates.len()), (1.0, 1));
    }

    #[test]
    fn a_best_rate_at_the_end_of_the_grid_decides_nothing() {
        let tuned = |best: f64| tune(SETTING, 2, "", &[1.0, 2.0, 3.0], |lr, _| Ok(((lr - best).abs(), 0.0))).unwrap();
        let of = |best: f64| judged(Verdict::Reproduces, &[("left", &tuned(2.0)), ("right", &tuned(best))]);
        assert_eq!(of(2.0), (Verdict::Reproduces, String::new()));
        for end in [1.0, 3.0] {
            let (verdict, said) = of(end);
            assert_eq!(verdict, Verdict::Undecided);
            assert!(said.contains(&format!("right ({end:e})")) && !said.contains("left"), "{said}");
        }
    }

    #[test]
    fn a_run_that_diverges_costs_its_rate_and_no_more() {
        let diverged = || Err(Error::Trainer(NotFinite { step: 1, what: "loss", value: f64::NAN }));
        // 4 is out while rates are chosen, 3, the best, with the last seed; then 2 is the best, beside what diverged.
        let measured = |lr: f64, seed: u64| match (lr, seed) {
            (4.0, _) | (3.0, 2) => diverged(),
            _ => Ok((-lr, lr)),
        };
        let tuned = tune(SETTING, 2, "m", &[1.0, 2.0, 3.0, 4.0], measured).unwrap();
        assert_eq!((tuned.best().lr, tuned.best().held_out.len(), tuned.at_edge), (2.0, 3, false));
        assert_eq!(tuned.rates.iter().map(|at| at.diverged).collect::<Vec<_>>(), [false, false, true, true]);
        let (verdict, said) = judged(Verdict::Reproduces, &[("m", &tuned)]);
        assert_eq!((verdict, said.as_str()), (Verdict::Reproduces, " Diverged: m at 3e0, m at 4e0."));
        let error = tune(SETTING, 2, "m", &[1.0], |_, _| Ok((f64::NAN, 0.0))).unwrap_err().to_string();
        assert!(error.contains("m: it diverges at every rate"), "{error}");
    }

    #[test]
    fn any_other_error_names_the_run() {
        let error = tune(SETTING, 2, "m", &[0.5], |_, seed| match seed {
            1 => Err(Error::Usage("no disk".into())),
            _ => Ok((0.0, 0.0)),
        });
        assert_eq!(error.unwrap_err().to_string(), "m, rate 5e-1, seed 1: no disk");
    }
}
