//! Which 4-bit format loses least, and does finetuning make up for it? (Dettmers et al. 2023, QLoRA, §4: NF4 is better
//! than FP4 and Int4, double quantisation costs nothing, and QLoRA ends where LoRA on 16 bits does.)
//!
//! The base's linear layers in each format, in blocks of 64, against the bf16 that the file has: the held-out loss
//! before finetuning, and after LoRA of rank 16 on every layer, at one learning rate. What quantising does is the same
//! for every seed; its spread is taken over the rows of the held-out text, each a sample of what text does and weighed
//! by its tokens, so that means before and after are of the same. A loss on text that is not the base's own may go
//! either way, so beside it is judged how far predictions moved: the mean of D(bf16‖format), which a format can only
//! increase.

use super::plot::{Plot, Series};
use super::spread::{Spread, Verdict};
use super::training::{Bench, lora};
use super::{MARGIN, Report, row};
use crate::error::Result;
use rankfold_backend::Format;
use rankfold_trainer::model::{Precision, Quantization};
use serde_json::json;

const LR: f64 = 6e-3;
const BLOCK: usize = 64;

struct Run {
    name: &'static str,
    /// By row of the held-out text.
    before: Vec<f64>,
    /// The same: how far its predictions are from bf16's.
    away: Vec<f64>,
    /// By seed.
    after: Vec<f64>,
}

/// Run it.
pub fn run(bench: &Bench) -> Result<Report> {
    let kinds = [
        ("bf16", None),
        ("nf4 double", Some((Format::Nf4, true))),
        ("nf4", Some((Format::Nf4, false))),
        ("fp4", Some((Format::Fp4, false))),
        ("int4", Some((Format::Int4, false))),
    ];
    let config = lora(16, &[]);
    let stored = bench.model(&bench.backend, Precision::AsStored, None, 0)?;
    let mut runs = Vec::new();
    for (name, bits) in kinds {
        let precision = bits.map_or(Precision::AsStored, |(format, double)| {
            Precision::Quantized(Quantization { format, block: BLOCK, double })
        });
        let base = bench.model(&bench.backend, precision, None, 0)?;
        let (before, away) = (bench.held_out_rows(&base)?, bench.divergence_rows(&base, &stored)?);
        let mut after = Vec::new();
        for seed in 0..bench.setting.seeds {
            let model = bench.model(&bench.backend, precision, Some(&config), seed)?;
            let loss = bench.held_out(&bench.train(model, LR, seed)?.model)?;
            eprintln!("{name}, seed {seed}: {loss:.4}");
            after.push(loss);
        }
        runs.push(Run { name, before, away, after });
    }

    let dense = &runs[0];
    let lost = |run: &Run| (Spread::between(&run.before, &dense.before), Spread::between(&run.after, &dense.after));
    let mut table =
        vec![row(["", "before, nat", "lost, over rows", "moved, over rows", "after, over seeds", "lost, over seeds"])];
    for run in &runs {
        let (before, after) = lost(run);
        table.push(row([
            run.name,
            &format!("{:.4}", Spread::of(&run.before).mean),
            &before.text(4),
            &Spread::of(&run.away).text(4),
            &Spread::of(&run.after).text(4),
            &after.text(4),
        ]));
    }
    let four_bits = &runs[1..];
    // Plain NF4 against the other formats with plain scales.
    let nf4 = &runs[2];
    let others = &runs[3..];
    let below = |of: &dyn Fn(&Run) -> &[f64]| {
        Verdict::all(others.iter().map(|run| Verdict::at_most(&Spread::between(of(nf4), of(run)), 0.0)))
    };
    let (least, least_loss) = (below(&|run| &run.away), below(&|run| &run.before));
    let free = Verdict::at_most(&Spread::between(&runs[1].before, &nf4.before), MARGIN);
    let (gap, left) = lost(&runs[1]);
    let closes = closes(&gap, &left);
    let least_of = |of: &dyn Fn(&Run) -> &[f64]| {
        let mean = |run: &Run| Spread::of(of(run)).mean;
        four_bits.iter().min_by(|a, b| mean(a).total_cmp(&mean(b))).map_or("none", |run| run.name)
    };
    let words = |verdict: Verdict| match verdict {
        Verdict::Reproduces => "yes",
        Verdict::DoesNotReproduce => "no",
        Verdict::Undecided => "undecided",
    };
    let because = format!(
        "before finetuning {} moves predictions least of the 4-bit bases (nf4 {:.4} nat, fp4 {:.4}, int4 {:.4}; nf4 \
         below both, row by row: {}), and {} has the least loss (nf4 below both: {}); double quantisation costs at most \
         {MARGIN} nat: {}; nf4 with double quantisation is {} nat above bf16 before finetuning and {} after (closed to \
         within {MARGIN}: {}). Each run is of {}.",
        least_of(&|run| &run.away),
        Spread::of(&nf4.away).mean,
        Spread::of(&others[0].away).mean,
        Spread::of(&others[1].away).mean,
        words(least),
        least_of(&|run| &run.before),
        words(least_loss),
        words(free),
        gap.text(4),
        left.text(4),
        if is_gap(&gap) { words(closes) } else { "no gap to close" },
        bench.extent()?,
    );
    let result = |run: &Run| {
        json!({
            "base": run.name, "before": Spread::of(&run.before), "after": Spread::of(&run.after),
            "moved": Spread::of(&run.away), "lost_before": lost(run).0, "lost_after": lost(run).1,
            "after_by_seed": run.after,
        })
    };
    let place = |x: usize| x as f64;
    let of = |which: fn(&(Spread, Spread)) -> Spread| {
        four_bits.iter().enumerate().map(move |(x, run)| (place(x), which(&lost(run)))).collect::<Vec<_>>()
    };
    let x_name = || format!("format of the base, blocks of {BLOCK}");
    let ticks = || four_bits.iter().enumerate().map(|(x, run)| (place(x), run.name.to_owned())).collect();
    let losses = Plot {
        title: "What 4 bits lose against bf16".into(),
        x_name: x_name(),
        ticks: ticks(),
        y_name: "held-out loss above bf16's, nat".into(),
        series: vec![
            Series::points("before finetuning (over rows of text)", of(|lost| lost.0)),
            Series::points("after finetuning (over seeds)", of(|lost| lost.1)),
        ],
        over: "rows of text before finetuning, over seeds after it",
        level: Some((0.0, "LoRA on bf16".into())),
    };
    let moved = four_bits.iter().enumerate().map(|(x, run)| (place(x), Spread::of(&run.away)));
    let predictions = Plot {
        title: "How far 4 bits move predictions".into(),
        x_name: x_name(),
        ticks: ticks(),
        y_name: "D(bf16 ‖ format), nat a token".into(),
        series: vec![Series::points("before finetuning", moved)],
        over: "rows of text",
        level: None,
    };
    Ok(Report {
        claim: "NF4 has the least loss of the 4-bit formats and moves predictions least, double quantisation costs \
                nothing, and finetuning closes the gap",
        table,
        results: json!({
            "bases": runs.iter().map(result).collect::<Vec<_>>(), "nf4_least": least,
            "nf4_least_loss": least_loss, "double_free": free, "gap_closes": closes,
        }),
        measured: Vec::new(),
        plots: vec![losses, predictions],
        verdict: Verdict::all([least, least_loss, free, closes]),
        because,
    })
}

/// Whether there is something to close: a loss that is certain.
fn is_gap(before: &Spread) -> bool {
    before.interval().0 > 0.0
}

/// Whether finetuning closes what quantising lost: what is left is within [`MARGIN`], and less than there was.
fn closes(before: &Spread, after: &Spread) -> Verdict {
    match is_gap(before) {
        true => Verdict::at_most(after, MARGIN.min(before.mean)),
        false => Verdict::Undecided,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_closes_where_there_is_one_and_it_shrinks() {
        let about = |mean: f64| Spread::of(&[mean - 1e-4, mean, mean + 1e-4]);
        assert_eq!(closes(&about(0.03), &about(0.002)), Verdict::Reproduces);
        assert_eq!(closes(&about(0.03), &about(0.02)), Verdict::DoesNotReproduce);
        // It grows, and stays within the margin.
        assert_eq!(closes(&about(0.002), &about(0.006)), Verdict::DoesNotReproduce);
        // None at all: below 0, or not to be told from it.
        assert_eq!(closes(&about(-0.01), &about(-0.02)), Verdict::Undecided);
        assert_eq!(closes(&Spread::of(&[-0.01, 0.012]), &about(0.001)), Verdict::Undecided);
    }
}
