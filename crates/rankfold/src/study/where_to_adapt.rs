//! Which matrices, and which rank? (Hu et al. 2021, §7.1 and 7.2: at one budget of parameters, Wq and Wv together beat
//! any one matrix of attention with a larger rank; and a rank of 4 does about as well as one of 64.)
//!
//! Placements of one size: Wq and Wv at rank 12, each of Wq, Wk, Wv, Wo alone at the rank that trains exactly as many
//! parameters, and all four at rank 6; then Wq and Wv at ranks 4, 8, 16 and 64. Each at the best of the same rates.

use super::plot::{Plot, Series};
use super::spread::{Spread, Verdict};
use super::training::{Bench, lora, trained_parameters};
use super::tuning::{Tuned, judged};
use super::{MARGIN, Report, row};
use crate::error::Result;
use crate::show::count;
use rankfold_trainer::model::Precision;
use serde_json::json;

const RATES: [f64; 5] = [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2];

/// A name, modules, a rank: of one size, the claim's own first.
const PLACEMENTS: [(&str, &[&str], usize); 6] = [
    ("q+v", &["q_proj", "v_proj"], 12),
    ("q", &["q_proj"], 21),
    ("k", &["k_proj"], 28),
    ("v", &["v_proj"], 28),
    ("o", &["o_proj"], 21),
    ("qkvo", &["q_proj", "k_proj", "v_proj", "o_proj"], 6),
];

/// Of Wq and Wv, the last the one that the others are held against.
const RANKS: [usize; 4] = [4, 8, 16, 64];

struct Run {
    name: String,
    rank: usize,
    parameters: usize,
    tuned: Tuned,
}

impl Run {
    fn title(&self) -> String {
        format!("{} {}", self.name, self.rank)
    }
}

fn measure(bench: &Bench, name: String, modules: &[&str], rank: usize) -> Result<Run> {
    let config = lora(rank, modules);
    let model = |seed| bench.model(&bench.backend, Precision::AsStored, Some(&config), seed);
    let parameters = trained_parameters(&model(0)?);
    let tuned = bench.tune(&format!("{name}, rank {rank}"), &RATES, model)?;
    Ok(Run { name, rank, parameters, tuned })
}

/// Run it.
pub fn run(bench: &Bench) -> Result<Report> {
    let placed = |(name, modules, rank): &(&str, &[&str], usize)| measure(bench, (*name).into(), modules, *rank);
    let placements = PLACEMENTS.iter().map(placed).collect::<Result<Vec<_>>>()?;
    let ranked = |rank: &usize| measure(bench, "q+v".into(), PLACEMENTS[0].1, *rank);
    let ranks = RANKS.iter().map(ranked).collect::<Result<Vec<_>>>()?;

    let losses = |run: &Run| run.tuned.best().held_out.clone();
    let (pair, largest) = (&placements[0], &ranks[RANKS.len() - 1]);
    let beyond = |run: &Run, other: &Run| Spread::between(&losses(run), &losses(other));
    let mut table =
        vec![row(["adapted", "rank", "trained", "best rate", "loss over seeds, nat", "against", "nat more"])];
    let mut line = |run: &Run, other: &Run, against: &str| {
        let Run { name, rank, parameters, tuned } = run;
        let lr = format!("{:e}", tuned.best().lr);
        let loss = tuned.spread().text(4);
        let (rank, parameters, more) = (rank.to_string(), count(*parameters), beyond(run, other).text(4));
        table.push(row([name, &rank, &parameters, &lr, &loss, against, &more]));
    };
    placements.iter().for_each(|run| line(run, pair, "q+v, rank 12"));
    ranks.iter().for_each(|run| line(run, largest, "q+v, rank 64"));

    // The pair beats a single matrix where the difference pair − single is below 0.
    let singles = &placements[1..5];
    let beats = |single: &Run| Verdict::at_most(&beyond(pair, single), 0.0);
    let verdicts: Vec<Verdict> = singles.iter().map(beats).collect();
    let enough = |run: &Run| Verdict::at_most(&beyond(run, largest), MARGIN);
    let small = &ranks[..RANKS.len() - 1];
    let named = |runs: &[Run], which: &dyn Fn(&Run) -> bool| -> String {
        let names: Vec<String> = runs.iter().filter(|run| which(run)).map(Run::title).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    };
    let best_single = singles.iter().min_by(|a, b| a.tuned.spread().mean.total_cmp(&b.tuned.spread().mean));
    let best_single = best_single.unwrap_or(pair);
    let all = Verdict::all(verdicts.iter().copied().chain(small.iter().map(enough)));
    let names: Vec<String> = placements.iter().chain(&ranks).map(Run::title).collect();
    let tuned = names.iter().map(String::as_str).zip(placements.iter().chain(&ranks).map(|run| &run.tuned));
    let (verdict, remarks) = judged(all, &tuned.collect::<Vec<_>>());
    let because = format!(
        "with {} parameters each, Wq and Wv together end at {} nat a token, the best single matrix ({}, rank {}) at \
         {}; by 95 % intervals the pair beats {} and is worse than {}. Of ranks 4, 8 and 16 of Wq and Wv, those as \
         good as rank 64 within {MARGIN} nat: {}; those worse: {}. Each run is of {}.{remarks}",
        count(pair.parameters),
        pair.tuned.spread().text(4),
        best_single.name,
        best_single.rank,
        best_single.tuned.spread().text(4),
        named(singles, &|run| beats(run) == Verdict::Reproduces),
        named(singles, &|run| beats(run) == Verdict::DoesNotReproduce),
        named(small, &|run| enough(run) == Verdict::Reproduces),
        named(small, &|run| enough(run) == Verdict::DoesNotReproduce),
        bench.extent()?,
    );
    let result = |run: &Run, other: &Run| {
        json!({
            "adapted": run.name, "rank": run.rank, "parameters": run.parameters, "held_out": run.tuned.spread(),
            "more": beyond(run, other), "tuned": run.tuned,
        })
    };
    Ok(Report {
        claim: "At one budget Wq and Wv together beat any one matrix, and ranks of 4, 8 and 16 do as well as 64",
        table,
        results: json!({
            "placements": placements.iter().map(|run| result(run, pair)).collect::<Vec<_>>(),
            "ranks": ranks.iter().map(|run| result(run, largest)).collect::<Vec<_>>(),
            "pair_beats_each": Verdict::all(verdicts), "small_ranks_do": Verdict::all(small.iter().map(enough)),
        }),
        measured: Vec::new(),
        plots: plots(&placements, &ranks),
        verdict,
        because,
    })
}

fn plots(placements: &[Run], ranks: &[Run]) -> Vec<Plot> {
    let y_name = || "held-out loss, nat a token".to_owned();
    let places = || (0..).map(f64::from);
    let which = Plot {
        title: "Which matrices, at one budget".into(),
        x_name: "matrices adapted, and rank".into(),
        ticks: places().zip(placements).map(|(x, run)| (x, run.title())).collect(),
        y_name: y_name(),
        over: "seeds",
        series: vec![Series::points("LoRA", places().zip(placements).map(|(x, run)| (x, run.tuned.spread())))],
        level: None,
    };
    let of = |run: &Run| (run.rank as f64).log2();
    let rank = Plot {
        title: "Which rank, of Wq and Wv".into(),
        x_name: "rank (logarithmic)".into(),
        ticks: ranks.iter().map(|run| (of(run), run.rank.to_string())).collect(),
        y_name: y_name(),
        over: "seeds",
        series: vec![Series::line("LoRA on Wq and Wv", ranks.iter().map(|run| (of(run), run.tuned.spread())))],
        level: None,
    };
    vec![which, rank]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::training::Setting;

    #[test]
    fn all_placements_train_as_many_parameters() {
        let setting = Setting { seeds: 1, steps: 1, rows: 1, seq: 32, held_out: Some(1), rates: None };
        let bench = Bench::open(setting, None).unwrap();
        let sizes = PLACEMENTS.map(|(_, modules, rank)| {
            let config = lora(rank, modules);
            trained_parameters(&bench.model(&bench.backend, Precision::AsStored, Some(&config), 0).unwrap())
        });
        assert_eq!(sizes, [sizes[0]; PLACEMENTS.len()]);
    }
}
