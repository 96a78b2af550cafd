//! `--method dora` and `--method adalora`, as a user runs them.

mod common;

use common::{Place, refuse, succeed};
use serde_json::Value;
use std::path::Path;

/// A run of a second on the embedded model and text.
fn train(out: &str, more: &[&str]) {
    let small = ["train", "--batch", "2", "--seq", "32", "--rank", "4", "--threads", "2", "--out", out];
    succeed(&[&small, more].concat());
}

fn steps(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["loss"].is_number()).collect()
}

fn ranks(step: &Value) -> usize {
    step["ranks"].as_object().unwrap().values().map(|rank| rank.as_u64().unwrap() as usize).sum()
}

fn loss(args: &[&str]) -> f64 {
    let text = succeed(&[&["eval", "--seq", "32"], args].concat());
    text.strip_prefix("loss ").unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_dora_is_trained_used_and_merged() {
    let place = Place::new();
    let (out, base) = (place.text("run"), place.base());
    train(
        &out,
        &["--model", &base, "--method", "dora", "--steps", "10", "--lr", "3e-3", "--targets", "q_proj,down_proj"],
    );
    let held = place.file("held.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(20));
    let of = |more: &[&str]| loss(&[&["--data", &held], more].concat());
    let (plain, adapted) = (of(&["--model", &base]), of(&["--model", &base, "--adapter", &out]));
    assert!(adapted < plain, "{adapted} is not below {plain}");
    let merged = place.text("merged");
    succeed(&["merge", "--model", &base, "--adapter", &out, "--out", &merged]);
    // bf16 weights: each off by at most 2⁻⁹ of itself, and the loss with them by far less than what was learned.
    assert!((of(&["--model", &merged]) - adapted).abs() < 0.2 * (plain - adapted));
    assert!(succeed(&["inspect", &out]).contains("DoRA"));
}

#[test]
fn adalora_spends_its_budget_and_says_where() {
    let place = Place::new();
    for prune in ["mask", "shrink"] {
        let out = place.text(prune);
        let schedule = ["--adalora-target", "1", "--adalora-tinit", "2", "--adalora-tfinal", "4"];
        train(&out, &[&["--method", "adalora", "--adalora-prune", prune, "--steps", "12"][..], &schedule].concat());
        let lines = steps(&place.path(prune));
        let modules = lines[0]["ranks"].as_object().unwrap().len();
        assert_eq!((lines.len(), ranks(&lines[0])), (12, 4 * modules));
        let last = &lines[11];
        assert_eq!(last["budget"].as_u64(), Some(modules as u64));
        assert!(ranks(last) <= modules, "{prune}: {} of {modules}", ranks(last));
        let shown = succeed(&["inspect", &out]);
        assert!(shown.contains("AdaLoRA"), "{shown}");
        loss(&["--adapter", &out, "--data", &place.file("held.txt", "The LORD is my light.\n".repeat(9))]);

        // What is left is trained on.
        let again = place.text(&format!("{prune}-again"));
        let start = ["train", "--init-adapter", &out, "--batch", "2", "--seq", "32", "--steps", "2", "--out", &again];
        succeed(&start);
        let lines = steps(&place.path(&format!("{prune}-again")));
        assert!(lines.iter().all(|line| line["ranks"] == last["ranks"]));
    }
}

#[test]
fn impossible_budgets_are_refused_before_anything_is_written() {
    let place = Place::new();
    let out = place.text("run");
    let adalora = ["train", "--method", "adalora", "--rank", "4", "--steps", "10", "--out", &out];
    let with = |more: &[&'static str]| [&adalora[..], more].concat();
    refuse(&with(&["--adalora-target", "5"]), &["target_r", "5"]);
    refuse(&with(&["--adalora-tinit", "5", "--adalora-tfinal", "5"]), &["total_step", "tinit 5"]);
    refuse(&with(&["--adalora-delta", "0"]), &["deltaT"]);
    refuse(&with(&["--adalora-beta1", "1"]), &["beta1"]);
    refuse(&with(&["--rslora"]), &["use_rslora"]);
    refuse(&["train", "--adalora-target", "2", "--out", &out], &["--adalora-target", "--method adalora"]);
    assert!(!place.path("run").exists());
}
