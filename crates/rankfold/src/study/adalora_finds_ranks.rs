//! Does AdaLoRA give ranks to the layers that need them? (Zhang et al. 2023, §4: at one budget, better than LoRA, which
//! spreads it evenly.)
//!
//! On the [planted task](super::planted), 84 triplets for 28 layers whose true updates have ranks 0, 1, 2, 4 and 8:
//! AdaLoRA from rank 12 down to 84 triplets, with masked triplets kept to the end (PEFT's arithmetic) or cut on the
//! way, and LoRA of rank 3 everywhere, which is as many. Each at the best of the same learning rates.

use super::planted::{Learned, PLANTED, Task};
use super::plot::{Plot, Series};
use super::spread::{Spread, Verdict, median, rank_correlation};
use super::training::{Bench, lora, rates};
use super::tuning::{AtRate, Tuned, judged, tune};
use super::{Report, row};
use crate::error::Result;
use crate::show::bytes;
use rankfold_adapters::adalora::{AdaLora, Prune};
use rankfold_adapters::{AdapterConfig, Form, LoraSpec, Targets};
use rankfold_trainer::model::Precision;
use serde_json::{Value, json};

const RATES: [f64; 4] = [1e-2, 2e-2, 4e-2, 8e-2];

/// Triplets a layer that AdaLoRA begins with, and on average at the end: as many as are planted.
const FIRST: usize = 12;
const TARGET: usize = 3;

struct Method {
    name: &'static str,
    tuned: Tuned,
    /// At the best rate, by seed.
    learned: Vec<Learned>,
}

fn adalora(steps: usize) -> AdapterConfig {
    AdapterConfig {
        spec: LoraSpec { form: Form::AdaLora, ..LoraSpec::new(FIRST, FIRST as f64) },
        adalora: Some(AdaLora {
            target_rank: TARGET,
            tinit: steps / 10,
            tfinal: steps / 4,
            delta_t: (steps / 100).max(1),
            ..AdaLora::default()
        }),
        targets: Targets::AllLinear,
        ..AdapterConfig::default()
    }
}

/// Run it.
pub fn run(bench: &Bench) -> Result<Report> {
    let steps = bench.setting.steps;
    let base = bench.model(&bench.backend, Precision::AsStored, None, 0)?;
    let tasks = (0..bench.setting.seeds).map(|seed| Task::plant(&base, seed)).collect::<Result<Vec<_>>>()?;
    let kinds = [
        ("AdaLoRA, mask", adalora(steps), Prune::Mask),
        ("AdaLoRA, shrink", adalora(steps), Prune::Shrink),
        ("LoRA, rank 3", lora(TARGET, &[]), Prune::Mask),
    ];
    let mut methods = Vec::new();
    for (name, config, prune) in kinds {
        let mut learned = Vec::new();
        let tuned = tune(bench.setting, bench.setting.seeds, name, &RATES, |lr, seed| {
            let run = tasks[seed as usize].learn(&config, prune, rates(lr, steps))?;
            let [tuning, held_out] = run.missing;
            learned.push((lr, run));
            Ok((tuning, held_out))
        })?;
        let at_best = learned.into_iter().filter(|(lr, _)| *lr == tuned.best().lr).map(|(_, run)| run);
        methods.push(Method { name, learned: at_best.collect(), tuned });
    }

    let (mask, shrink, even) = (&methods[0], &methods[1], &methods[2]);
    let found = |method: &Method| -> Vec<f64> {
        method.learned.iter().zip(&tasks).map(|(learned, task)| share_found(&learned.ranks, &task.ranks)).collect()
    };
    let correlation = |method: &Method| -> Vec<f64> {
        let of = |(learned, task): (&Learned, &Task)| rank_correlation(&floats(&learned.ranks), &floats(&task.ranks));
        method.learned.iter().zip(&tasks).map(of).collect()
    };
    let missing = |method: &Method| method.tuned.best().held_out.clone();
    let heads = [
        "",
        "best rate",
        "found, over seeds",
        "rank correlation",
        "missing, share",
        "triplets",
        "state at first",
        "at last",
    ];
    let mut table = vec![row(heads)];
    let heads = ["", "step at first, ms", "at last, ms", "last/first"];
    let mut measured = vec![row(heads)];
    let mut results: Vec<Value> = Vec::new();
    for method in &methods {
        let one = &method.learned[0];
        let triplets =
            Spread::of(&method.learned.iter().map(|l| l.ranks.iter().sum::<usize>() as f64).collect::<Vec<_>>());
        let ends = |of: &dyn Fn(&Learned) -> f64| Spread::of(&method.learned.iter().map(of).collect::<Vec<_>>());
        let state = [ends(&|l| *l.bytes.first().unwrap_or(&0) as f64), ends(&|l| *l.bytes.last().unwrap_or(&0) as f64)];
        table.push(row([
            method.name,
            &format!("{:e}", method.tuned.best().lr),
            &Spread::of(&found(method)).text(3),
            &Spread::of(&correlation(method)).text(3),
            &method.tuned.spread().text(4),
            &format!("{:.0}", triplets.mean),
            &bytes(state[0].mean as u64),
            &bytes(state[1].mean as u64),
        ]));
        let tenth = (one.seconds.len() / 10).max(1);
        let of_some = |seconds: &[f64]| median(seconds).unwrap_or(0.0);
        let first = ends(&|l| of_some(&l.seconds[..tenth]));
        let last = ends(&|l| of_some(&l.seconds[l.seconds.len() - tenth..]));
        let ratio = format!("{:.2}", last.mean / first.mean);
        let ms = |seconds: f64| format!("{:.1}", 1e3 * seconds);
        measured.push(row([method.name, &ms(first.mean), &ms(last.mean), &ratio]));
        let ranks: Vec<&Vec<usize>> = method.learned.iter().map(|learned| &learned.ranks).collect();
        results.push(json!({
            "method": method.name, "found": Spread::of(&found(method)),
            "rank_correlation": Spread::of(&correlation(method)), "missing": method.tuned.spread(),
            "ranks": ranks, "triplets": triplets, "state_bytes": state, "tuned": method.tuned,
        }));
    }
    let better = Verdict::at_most(&Spread::between(&missing(mask), &missing(even)), 0.0);
    let finds = Verdict::at_most(&Spread::between(&found(even), &found(mask)), 0.0);
    let state = |method: &Method| method.learned.iter().map(|l| l.bytes.last().map_or(0.0, |b| *b as f64)).sum::<f64>();
    // Rate by rate: two rates differ by more than the two methods may.
    let both =
        mask.tuned.rates.iter().zip(&shrink.tuned.rates).filter(|(mask, shrink)| !mask.diverged && !shrink.diverged);
    let shrunk = |(mask, shrink): (&AtRate, &AtRate)| {
        format!("{} at {:e}", Spread::between(&shrink.held_out, &mask.held_out).text(4), mask.lr)
    };
    let shrunk: Vec<String> = both.map(shrunk).collect();
    let tuned: Vec<(&str, &Tuned)> = methods.iter().map(|method| (method.name, &method.tuned)).collect();
    let (verdict, remarks) = judged(Verdict::all([finds, better]), &tuned);
    let because = format!(
        "of 84 planted triplets AdaLoRA with masks finds {:.0} % and LoRA spread evenly {:.0} %; the rank correlation \
         of kept and planted ranks is {}; {} of the planted update stays missing with AdaLoRA, {} with LoRA of as many \
         triplets. Shrinking changes what is missing by {}, and ends with {:.0} % of the masked run's adapter state. \
         Each run is of {steps} steps.{remarks}",
        100.0 * Spread::of(&found(mask)).mean,
        100.0 * Spread::of(&found(even)).mean,
        Spread::of(&correlation(mask)).text(3),
        mask.tuned.spread().text(4),
        even.tuned.spread().text(4),
        shrunk.join(", "),
        100.0 * state(shrink) / state(mask),
    );
    let planted: Vec<&Vec<usize>> = tasks.iter().map(|task| &task.ranks).collect();
    Ok(Report {
        claim: "At one budget AdaLoRA gives triplets to the layers that need them, and ends better than LoRA",
        table,
        results: json!({"planted": planted, "methods": results, "finds": finds, "better": better}),
        measured,
        plots: vec![plot([mask, shrink], &tasks)],
        verdict,
        because,
    })
}

/// Of the planted triplets, the share that the kept ones of their layers can hold.
fn share_found(kept: &[usize], planted: &[usize]) -> f64 {
    let found: usize = kept.iter().zip(planted).map(|(kept, planted)| kept.min(planted)).sum();
    found as f64 / planted.iter().sum::<usize>() as f64
}

fn floats(ranks: &[usize]) -> Vec<f64> {
    ranks.iter().map(|rank| *rank as f64).collect()
}

fn plot(methods: [&Method; 2], tasks: &[Task]) -> Plot {
    let mut planted = PLANTED.to_vec();
    planted.dedup();
    let kept = |method: &Method, rank: usize| {
        let layers = method.learned.iter().zip(tasks).flat_map(|(learned, task)| learned.ranks.iter().zip(&task.ranks));
        let of_rank: Vec<f64> = layers.filter(|(_, planted)| **planted == rank).map(|(kept, _)| *kept as f64).collect();
        (rank as f64, Spread::of(&of_rank))
    };
    let mut series: Vec<Series> = methods
        .iter()
        .map(|method| Series::line(method.name, planted.iter().map(|rank| kept(method, *rank))))
        .collect();
    series.push(Series::line("as planted", planted.iter().map(|rank| (*rank as f64, Spread::of(&[*rank as f64])))));
    Plot {
        title: "Ranks kept where ranks were planted".into(),
        x_name: "planted rank of a layer".into(),
        ticks: planted.iter().map(|rank| (*rank as f64, rank.to_string())).collect(),
        y_name: "kept rank".into(),
        over: "layers and seeds",
        series,
        level: Some((TARGET as f64, "LoRA, rank 3".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_is_what_the_kept_ranks_can_hold_of_the_planted_ones() {
        // 0 of 0, 2 of 2 with one to spare, 1 of 4, 2 of 2.
        assert_eq!(share_found(&[1, 3, 1, 2], &[0, 2, 4, 2]), 5.0 / 8.0);
        assert_eq!(share_found(&PLANTED, &PLANTED), 1.0);
        // Three everywhere: all of the ones and twos, three of every four and eight.
        assert_eq!(share_found(&[TARGET; 28], &PLANTED), (4.0 + 12.0 + 36.0) / 84.0);
    }
}
