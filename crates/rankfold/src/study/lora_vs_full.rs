//! Does LoRA reach full finetuning? (Hu et al. 2021, §5: "on par or better", with a small part of the parameters.)
//!
//! LoRA on every linear layer of the bf16 base, of the largest rank that trains under 2 % of the base's parameters, and
//! of rank 16 for comparison, against training all parameters in f32, each at the best of its own learning rates.
//! LoRA reaches it if its held-out loss is not above by more than [`MARGIN`].

use super::plot::{Plot, Series};
use super::spread::{Spread, Verdict};
use super::training::{Bench, lora, trained_parameters};
use super::tuning::{Tuned, judged};
use super::{MARGIN, Report, row};
use crate::error::Result;
use crate::show::count;
use rankfold_trainer::model::Precision;
use serde_json::json;

/// Of the base's parameters, what LoRA may train.
const SHARE: f64 = 0.02;

const LORA_RATES: [f64; 5] = [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2];
const FULL_RATES: [f64; 4] = [1.25e-4, 2.5e-4, 5e-4, 1e-3];

struct Method {
    name: String,
    parameters: usize,
    tuned: Tuned,
}

/// Run it.
pub fn run(bench: &Bench) -> Result<Report> {
    let all = bench.base_parameters();
    let size = |rank: usize| -> Result<usize> {
        Ok(trained_parameters(&bench.model(&bench.backend, Precision::AsStored, Some(&lora(rank, &[])), 0)?))
    };
    let one = size(1)?;
    let small = ((SHARE * all as f64 / one as f64) as usize).max(1);
    let mut methods = Vec::new();
    for rank in [small, 16] {
        let config = lora(rank, &[]);
        let name = format!("LoRA, rank {rank}");
        let model = |seed| bench.model(&bench.backend, Precision::AsStored, Some(&config), seed);
        let tuned = bench.tune(&name, &LORA_RATES, model)?;
        methods.push(Method { name, parameters: size(rank)?, tuned });
    }
    let name = "full finetuning".to_owned();
    let tuned = bench.tune(&name, &FULL_RATES, |seed| bench.model(&bench.backend, Precision::Trained, None, seed))?;
    methods.push(Method { name, parameters: all, tuned });
    let before = bench.held_out(&bench.model(&bench.backend, Precision::AsStored, None, 0)?)?;

    let full = &methods[2];
    let gap = |method: &Method| Spread::between(&method.tuned.best().held_out, &full.tuned.best().held_out);
    let share = |method: &Method| 100.0 * method.parameters as f64 / all as f64;
    let mut table = vec![row(["", "trained", "share", "best rate", "loss over seeds, nat", "gap to full, nat"])];
    table.push(row(["the base", "0", "0.00 %", "", &format!("{before:.4}"), ""]));
    for method in &methods {
        table.push(row([
            &method.name,
            &count(method.parameters),
            &format!("{:.2} %", share(method)),
            &format!("{:e}", method.tuned.best().lr),
            &method.tuned.spread().text(4),
            &gap(method).text(4),
        ]));
    }
    let (lora, mean_full) = (&methods[0], full.tuned.spread().mean);
    let of_the_gain = 100.0 * (before - lora.tuned.spread().mean) / (before - mean_full);
    let tuned: Vec<(&str, &Tuned)> = methods.iter().map(|method| (&*method.name, &method.tuned)).collect();
    let (verdict, remarks) = judged(Verdict::at_most(&gap(lora), MARGIN), &tuned);
    let because = format!(
        "{}, training {:.2} % of the parameters, ends at a held-out loss of {} nat a token, full finetuning at {}; the \
         gap is {} nat ({MARGIN} would be as good), and LoRA gains {of_the_gain:.0} % of what full finetuning gains \
         over the base's {before:.4}. {} ({:.2} %) is {} nat from it. Each run is of {}.{remarks}",
        lora.name,
        share(lora),
        lora.tuned.spread().text(4),
        full.tuned.spread().text(4),
        gap(lora).text(4),
        methods[1].name,
        share(&methods[1]),
        gap(&methods[1]).text(4),
        bench.extent()?,
    );
    let result = |method: &Method| {
        json!({
            "method": method.name, "parameters": method.parameters, "share": share(method) / 100.0,
            "held_out": method.tuned.spread(), "gap": gap(method), "tuned": method.tuned,
        })
    };
    Ok(Report {
        claim: "LoRA with under 2 % of the parameters reaches the held-out loss of full finetuning",
        table,
        results: json!({"before": before, "methods": methods.iter().map(result).collect::<Vec<_>>()}),
        measured: Vec::new(),
        plots: vec![plot(&methods, before)],
        verdict,
        because,
    })
}

fn plot(methods: &[Method], before: f64) -> Plot {
    // A rate at which training made it worse, or may have, would press all others together.
    let drawn = |method: &Method| -> Vec<(f64, Spread)> {
        let points = method.tuned.rates.iter().filter(|at| !at.diverged);
        let points = points.map(|at| (at.lr, Spread::of(&at.held_out)));
        let most = |loss: &Spread| loss.mean + loss.half_width().unwrap_or(0.0);
        points.filter(|(_, loss)| most(loss) <= before.max(most(&method.tuned.spread()))).collect()
    };
    let series = methods
        .iter()
        .map(|method| Series::line(&method.name, drawn(method).into_iter().map(|(lr, loss)| (lr.log10(), loss))));
    // Every second rate: all would touch.
    let mut rates: Vec<f64> = methods.iter().flat_map(drawn).map(|(lr, _)| lr).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let ticks = rates.iter().step_by(2).map(|lr| (lr.log10(), format!("{lr:e}"))).collect();
    Plot {
        title: format!("LoRA and full finetuning (base: {before:.3})"),
        x_name: "learning rate (logarithmic), where it helps".into(),
        ticks,
        y_name: "held-out loss, nat a token".into(),
        over: "seeds",
        series: series.collect(),
        level: None,
    }
}
