//! `--method dora` and `--method adalora`, as a user runs them.

mod common;

use common::{Place, both, metrics, refuse, succeed};
use serde_json::Value;
use std::path::Path;

/// A run of a second on the embedded model and text.
fn train(out: &str, more: &[&str]) {
    let small = ["train", "--batch", "2", "--seq", "32", "--rank", "4", "--threads", "2", "--out", out];
    succeed(&[&small, more].concat());
}

fn steps(run: &Path) -> Vec<Value> {
    metrics(run).into_iter().filter(|line| line["loss"].is_number()).collect()
}

fn ranks(step: &Value) -> usize {
    step["ranks"].as_object().unwrap().values().map(|rank| rank.as_u64().unwrap() as usize).sum()
}

fn loss(args: &[&str]) -> f64 {
    common::loss(&[&["eval", "--seq", "32"], args].concat())
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
        // No two scores are equal, so that no budget is left over.
        assert_eq!(ranks(last), modules, "{prune}");
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
    refuse(&with(&["--steps", "1"]), &["total_step", "is 1", "tfinal + 2 or more"]);
    refuse(&with(&["--adalora-delta", "0"]), &["deltaT"]);
    refuse(&with(&["--adalora-beta1", "1"]), &["beta1"]);
    refuse(&with(&["--rslora"]), &["use_rslora"]);
    refuse(&["train", "--adalora-target", "2", "--out", &out], &["--adalora-target", "--method adalora"]);
    assert!(!place.path("run").exists());
}

/// With a tenth and a quarter of so few steps being none.
#[test]
fn the_shortest_run_by_default_keeps_its_target() {
    let place = Place::new();
    let out = place.text("run");
    train(&out, &["--method", "adalora", "--steps", "2"]);
    let lines = steps(&place.path("run"));
    let modules = lines[0]["ranks"].as_object().unwrap().len();
    assert_eq!((lines.len(), ranks(&lines[1])), (2, 2 * modules));
}

#[test]
fn a_run_that_ends_before_the_last_choice_of_its_folder_is_warned_of_and_squared_norms_are_the_folders() {
    let place = Place::new();
    let out = place.text("run");
    let adalora = ["--method", "adalora", "--steps", "12", "--adalora-tfinal", "4", "--adalora-squared"];
    train(&out, &[&adalora[..], &["--checkpoint-every", "2", "--keep", "9"]].concat());
    let begun = place.text("run/checkpoints/step-000002");
    let go_on = |steps: &str| {
        let out = place.text(steps);
        let from = ["train", "--init-adapter", &begun, "--batch", "2", "--seq", "32", "--out", &out, "--steps", steps];
        both(&from)[1].clone()
    };
    let warning = "the last choice of ranks is due at step 8 and the run ends at step 3: over budget";
    let (short, whole) = (go_on("3"), go_on("8"));
    assert!(short.contains(warning), "{short}");
    assert!(!whole.contains("over budget"), "{whole}");
    let config = |run: &str| std::fs::read_to_string(place.path(run).join("adapter_config.json")).unwrap();
    for run in ["run", "3", "8"] {
        assert!(config(run).contains("\"orth_reg_squared\": true"), "{run}");
    }
    let first = |run: &str| steps(&place.path(run))[0]["loss"].as_f64().unwrap();
    let folder = place.path("run/checkpoints/step-000002/adapter_config.json");
    std::fs::write(&folder, config("run/checkpoints/step-000002").replace("\"orth_reg_squared\": true,", "")).unwrap();
    go_on("9");
    assert_ne!(first("8"), first("9"), "norms and their squares");
}
