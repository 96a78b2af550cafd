//! Are the bits of a run under a memory limit those of one without? (Dettmers et al. 2023, QLoRA, §3: a paged
//! optimiser's states leave and come back, so that memory is bounded; here weights, gradients and activations may leave
//! as well.)
//!
//! LoRA of rank 64, whose larger tensors fill pages, and full finetuning, where moments and weights are most of it all:
//! each without a pager, then with its buffers on one that lets less and less of them be in memory at once. The limit
//! is the pager's own, so that one process can have one after the other.

use super::plot::{Plot, Series};
use super::spread::{Spread, Verdict};
use super::training::{Bench, lora, trained_bytes};
use super::{Report, row};
use crate::error::Result;
use crate::show::bytes;
use rankfold_backend::Backend;
use rankfold_cpu::CpuBackend;
use rankfold_pager::{FileOptions, Limit, Options, Pager, Stats};
use rankfold_trainer::model::Precision;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Of what a run has in memory at once when it may, in percent.
const LIMITS: [usize; 3] = [75, 50, 35];

/// The least page.
const PAGE: usize = 64 << 10;

/// More than any of these runs takes.
const UNLIMITED: usize = usize::MAX;

/// What a run gives: the bits of all losses and all that was trained.
type Bits = (Vec<u64>, Vec<u8>);

/// One method under one limit, over the seeds.
#[derive(Default)]
struct Cell {
    limit: usize,
    same_losses: usize,
    same_weights: usize,
    limits: Vec<usize>,
    stats: Vec<Stats>,
    seconds: Vec<f64>,
}

/// A pager that lets `limit` bytes be in memory at once.
fn pager(limit: usize) -> Result<Pager> {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
    Ok(Pager::new(Options { page: PAGE, ..Options::new(Limit::Pages(limit), Some(file)) })?)
}

/// Run it.
pub fn run(bench: &Bench) -> Result<Report> {
    let methods = [("LoRA, rank 64", true), ("full finetuning", false)];
    let mut cells: Vec<(&str, Vec<Cell>)> = Vec::new();
    for (name, is_lora) in methods {
        let once = |backend: &Arc<dyn Backend>, seed: u64| -> Result<Bits> {
            let (adapter, precision, lr) = match is_lora {
                true => (Some(lora(64, &[])), Precision::AsStored, 6e-3),
                false => (None, Precision::Trained, 1e-3),
            };
            let model = bench.model(backend, precision, adapter.as_ref(), seed)?;
            let trained = bench.train(model, lr, seed)?;
            Ok((trained.losses.iter().map(|loss| loss.to_bits()).collect(), trained_bytes(&trained.model)?))
        };
        let mut of_method: Vec<Cell> = LIMITS.into_iter().map(|limit| Cell { limit, ..Cell::default() }).collect();
        for seed in 0..bench.setting.seeds {
            let free = once(&bench.backend, seed)?;
            let unlimited = pager(UNLIMITED)?;
            let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(bench.threads).on_pager(unlimited.clone()));
            once(&backend, seed)?;
            let all = unlimited.stats().high_water;
            for cell in &mut of_method {
                let limit = all / 100 * cell.limit;
                let limited = pager(limit)?;
                let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(bench.threads).on_pager(limited.clone()));
                let begun = Instant::now();
                let (losses, weights) = once(&backend, seed)?;
                cell.seconds.push(begun.elapsed().as_secs_f64());
                cell.same_losses += usize::from(losses == free.0);
                cell.same_weights += usize::from(weights == free.1);
                cell.limits.push(limit);
                cell.stats.push(limited.stats());
                eprintln!(
                    "{name}, {} % of its memory, seed {seed}: {} read",
                    cell.limit,
                    bytes(limited.stats().loaded)
                );
            }
        }
        cells.push((name, of_method));
    }

    let seeds = bench.setting.seeds as usize;
    let mut table = vec![row(["", "memory allowed", "runs", "same losses", "same trained bits"])];
    let heads = ["", "memory allowed", "limit", "most there was", "written", "read", "pages waited for", "waited"];
    let mut measured = vec![row(heads)];
    let mean = |of: &dyn Fn(&Stats) -> f64, cell: &Cell| Spread::of(&cell.stats.iter().map(of).collect::<Vec<_>>());
    for (name, of_method) in &cells {
        for cell in of_method {
            let percent = format!("{} %", cell.limit);
            let same = |n: usize| n.to_string();
            table.push(row([name, &percent, &same(seeds), &same(cell.same_losses), &same(cell.same_weights)]));
            let mean_bytes = |of: &dyn Fn(&Stats) -> f64| bytes(mean(of, cell).mean as u64);
            let faults = mean(&|s| 100.0 * s.faults as f64 / (s.hits + s.faults).max(1) as f64, cell);
            let waited = 100.0 * mean(&|s| s.stall.as_secs_f64(), cell).mean / Spread::of(&cell.seconds).mean;
            measured.push(row([
                name,
                &percent,
                &bytes((cell.limits.iter().sum::<usize>() / seeds.max(1)) as u64),
                &mean_bytes(&|s| s.high_water as f64),
                &mean_bytes(&|s| s.stored as f64),
                &mean_bytes(&|s| s.loaded as f64),
                &format!("{:.2} %", faults.mean),
                &format!("{waited:.0} % of the run"),
            ]));
        }
    }
    let all = || cells.iter().flat_map(|(_, of_method)| of_method);
    let (runs, same) =
        (all().count() * seeds, all().map(|cell| cell.same_losses.min(cell.same_weights)).sum::<usize>());
    let kept = all().all(|cell| cell.stats.iter().zip(&cell.limits).all(|(stats, limit)| stats.high_water <= *limit));
    let moved = all().all(|cell| cell.stats.iter().all(|stats| stats.stored > 0 && stats.loaded > 0));
    let because = format!(
        "{same} of {runs} limited runs of {} steps gave every loss and every trained value of the unlimited run to the \
         bit; pages left and came back in {}, and the limit was {}.",
        bench.setting.steps,
        if moved { "every one of them" } else { "not all of them" },
        if kept { "kept in all" } else { "not kept in all" },
    );
    let result = |(name, of_method): &(&str, Vec<Cell>)| -> Vec<Value> {
        let cell = |cell: &Cell| {
            json!({
                "method": name, "allowed_percent": cell.limit, "runs": seeds, "same_losses": cell.same_losses,
                "same_weights": cell.same_weights,
            })
        };
        of_method.iter().map(cell).collect()
    };
    let steps = bench.setting.steps.max(1) as f64;
    let series = cells.iter().map(|(name, of_method)| {
        let points = of_method.iter().map(|cell| {
            (cell.limit as f64, mean(&|s| (s.stored + s.loaded) as f64 / steps / (1u64 << 20) as f64, cell))
        });
        Series::line(name, points)
    });
    let plot = Plot {
        title: "What a memory limit moves".into(),
        x_name: "memory allowed, % of what the run takes".into(),
        ticks: LIMITS.iter().rev().map(|limit| (*limit as f64, format!("{limit} %"))).collect(),
        y_name: "written and read, MiB a step".into(),
        over: "seeds",
        series: series.collect(),
        level: None,
    };
    Ok(Report {
        claim: "Paging changes no bit of what is trained",
        table,
        results: json!({"cells": cells.iter().flat_map(result).collect::<Vec<_>>(), "limit_kept": kept}),
        measured,
        plots: vec![plot],
        verdict: Verdict::of(same == runs && kept && moved),
        because,
    })
}
