//! `--method dora` and `--method adalora`, as a user runs them.

use crate::common::{self, Place, both, kill_at, metrics, refuse, succeed};
use serde_json::Value;
use std::path::Path;

/// A run of a second on the embedded model and text; what it says of its progress.
fn train(out: &str, more: &[&str]) -> String {
    let small = ["train", "--batch", "2", "--seq", "32", "--rank", "4", "--threads", "2", "--out", out];
    both(&[&small, more].concat())[1].clone()
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
    // bf16 weights: each off by at most 2⁻⁸ of itself, and the loss with them by far less than what was learned.
    assert!((of(&["--model", &merged]) - adapted).abs() < 0.2 * (plain - adapted));
    assert!(succeed(&["inspect", &out]).contains("DoRA"));
}

#[test]
fn adalora_spends_its_budget_and_says_where() {
    let place = Place::new();
    for prune in ["mask", "shrink"] {
        let out = place.text(prune);
        let schedule = ["--adalora-target", "1", "--adalora-tinit", "2", "--adalora-tfinal", "4"];
        let said =
            train(&out, &[&["--method", "adalora", "--adalora-prune", prune, "--steps", "12"][..], &schedule].concat());
        let lines = steps(&place.path(prune));
        let modules = lines[0]["ranks"].as_object().unwrap().len();
        assert_eq!((lines.len(), ranks(&lines[0])), (12, 4 * modules));
        let last = &lines[11];
        assert_eq!(last["budget"].as_u64(), Some(modules as u64));
        // No two scores are equal, so that no budget is left over.
        assert_eq!(ranks(last), modules, "{prune}");
        // The map: a line of names, and one a layer.
        let map: Vec<&str> = said.lines().skip_while(|line| *line != format!("{modules} triplets kept:")).collect();
        assert!(map[1].trim_start().starts_with("layer  q_proj"), "{said}");
        let of_layer = |line: &str| line.split_whitespace().skip(1).map(|rank| rank.parse::<usize>().unwrap()).sum();
        let layers = last["ranks"].as_object().unwrap().keys().filter(|path| path.ends_with("q_proj")).count();
        assert_eq!(map[2..2 + layers].iter().map(|line| -> usize { of_layer(line) }).sum::<usize>(), modules, "{said}");
        let report = std::fs::read_to_string(place.path(prune).join("report.html")).unwrap();
        assert!(report.contains("The triplets that each module has left") && report.contains("<th>q_proj</th>"));
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

/// Masks at every step and shrinking: triplets go before the last choice, and a checkpoint from between has ranks that a
/// new run takes for chosen.
#[test]
fn ranks_that_an_unfinished_schedule_left_are_warned_of() {
    let place = Place::new();
    let schedule = ["--adalora-target", "1", "--adalora-tinit", "0", "--adalora-tfinal", "2", "--adalora-delta", "1"];
    let shrink = ["--method", "adalora", "--adalora-prune", "shrink", "--steps", "40", "--checkpoint-every", "25"];
    train(&place.text("run"), &[&shrink[..], &schedule, &["--keep", "9"]].concat());
    let go_on = |from: &str, out: &str| {
        let (from, out) = (place.text(from), place.text(out));
        let args = ["train", "--batch", "2", "--seq", "32", "--steps", "1", "--init-adapter", &from, "--out", &out];
        both(&args)[1].clone()
    };
    let said = go_on("run/checkpoints/step-000025", "early");
    assert!(said.contains("an earlier run's choice of them stands") && said.contains("over the budget of "), "{said}");
    assert!(!go_on("run", "whole").contains("over the budget"));
}

#[test]
fn what_is_another_methods_is_refused_beside_a_folder() {
    let place = Place::new();
    let (lora, out) = (place.text("lora"), place.text("out"));
    train(&lora, &["--steps", "1"]);
    let with = |more: &[&'static str]| [&["train", "--init-adapter", &lora, "--out", &out][..], more].concat();
    refuse(&with(&["--adalora-prune", "shrink"]), &[&lora, "no triplets of AdaLoRA", "--adalora-prune"]);
    refuse(&with(&["--diff-gate-lr", "3"]), &[&lora, "no gates of diff pruning", "--diff-gate-lr"]);
    assert!(!place.path("out").exists());
}

/// What a run wrote, and what it said of every step but its speed.
fn product(run: &Path) -> (Vec<u8>, String, Vec<[Value; 3]>) {
    let line = |line: &Value| ["loss", "budget", "ranks"].map(|field| line[field].clone());
    let adapter = std::fs::read(run.join("adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(run.join("adapter_config.json")).unwrap();
    (adapter, config, steps(run).iter().map(line).collect())
}

/// Held-out data that takes no time.
fn held(place: &Place) -> String {
    place.file("held.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(6))
}

/// Of 20 steps with masks at every second one from the second to the fourteenth.
const SCHEDULE: [&str; 6] = ["--steps", "20", "--adalora-tfinal", "6", "--adalora-delta", "2"];

/// Killed amid AdaLoRA's schedule, with triplets gone already where they go.
#[test]
fn a_killed_and_resumed_dora_or_adalora_gives_the_bits_of_one_that_never_stopped() {
    let place = Place::new();
    let cases: [(&str, &[&str]); 3] = [
        ("dora", &["--method", "dora", "--steps", "20"]),
        ("mask", &["--method", "adalora", "--adalora-prune", "mask"]),
        ("shrink", &["--method", "adalora", "--adalora-prune", "shrink"]),
    ];
    let held = held(&place);
    for (name, flags) in cases {
        let schedule: &[&str] = if name == "dora" { &[] } else { &SCHEDULE };
        let flags = [flags, schedule, &["--eval-data", &held, "--checkpoint-every", "5", "--keep", "20"]].concat();
        let (whole, killed) = (place.text(name), place.text(&format!("{name}-killed")));
        train(&whole, &flags);
        let small = ["train", "--batch", "2", "--seq", "32", "--rank", "4", "--out", &killed];
        kill_at(&[&small, &flags[..]].concat(), &place.path(&format!("{name}-killed/checkpoints/step-000010")));
        assert!(!place.path(&format!("{name}-killed/adapter_model.safetensors")).exists());
        succeed(&["train", "--out", &killed, "--resume", "--threads", "1"]);
        let [whole, killed] = [&whole, &killed].map(|run| product(Path::new(run)));
        assert_eq!((whole.1, whole.2), (killed.1, killed.2), "{name}");
        assert!(whole.0 == killed.0, "{name}: other bits");
    }
}

#[test]
fn triplets_out_of_budget_go_in_a_new_run_and_are_masked_in_one_that_goes_on_from_a_folder_unless_said() {
    let place = Place::new();
    let held = held(&place);
    let run = |name: &str, start: &[&str], prune: &[&str]| {
        let out = place.text(name);
        let small = ["train", "--batch", "2", "--seq", "32", "--eval-data", &held, "--out", &out];
        succeed(&[&small, start, prune].concat());
        product(Path::new(&out))
    };
    let new =
        [&["--method", "adalora", "--rank", "4", "--checkpoint-every", "4", "--keep", "9"], &SCHEDULE[..]].concat();
    let [unsaid, mask, shrink] = [("new", None), ("mask", Some("mask")), ("shrink", Some("shrink"))]
        .map(|(name, prune)| run(name, &new, &prune.map_or(Vec::new(), |prune| vec!["--adalora-prune", prune])));
    assert!(unsaid == shrink && unsaid != mask);
    let begun = place.text("new/checkpoints/step-000004");
    let on = ["--init-adapter", &begun, "--steps", "20"];
    let [unsaid, mask, shrink] = [("on", None), ("on-mask", Some("mask")), ("on-shrink", Some("shrink"))]
        .map(|(name, prune)| run(name, &on, &prune.map_or(Vec::new(), |prune| vec!["--adalora-prune", prune])));
    assert!(unsaid == mask && unsaid != shrink);
}
