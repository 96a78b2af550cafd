//! A memory limit: kept, without a trace in the result or on the disk.
#![cfg(target_os = "linux")]

use crate::common::{Place, least, metrics, refuse, succeed};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Run to the end; the most memory that the system says the process ever had.
fn peak(args: &[&str]) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let code = loop {
        if let Some(code) = child.try_wait().unwrap() {
            break code;
        }
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        if let Some(line) = text.lines().find_map(|line| line.strip_prefix("VmHWM:")) {
            peak = line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(code.success(), "{args:?}");
    peak
}

/// Train without a limit and under one, then with options of paging: the same file, and no more memory than was allowed.
/// The limit.
fn same_under(place: &Place, product: &str, args: &[&str], paging: &[&str], limit: impl Fn(u64) -> u64) -> u64 {
    let run = |name: &str, more: &[&str]| {
        let out = place.text(name);
        let peak = peak(&[&["train", "--overwrite", "--out", &out], args, more].concat());
        (std::fs::read(place.path(name).join(product)).unwrap(), peak)
    };
    let (free, needed) = run("free", &[]);
    let limit = limit(needed);
    assert!(limit < needed * 9 / 10, "{limit} is no limit on {needed}");
    let (limited, peak) = run("limited", &[&["--memory-limit", &limit.to_string()], paging].concat());
    assert!(peak <= limit, "{args:?}: {peak} bytes under a limit of {limit}");
    assert!(free == limited, "{args:?}: other bits under a limit of {limit}");
    assert_told(place);
    limit
}

/// That the plan says of the run under a limit no more than the run pages. What is out of memory at the peak is a part of
/// what a step needs, all of it once at the least, and so comes back in every step; but the plan of the peak, and with it
/// the part that is beyond the limit, may be off by a tenth of the peak. (No equality: what is needed three times a step
/// may come three times.)
fn assert_planned(place: &Place, args: &[&str], limit: u64) {
    let file = place.text("plan.json");
    succeed(&[&["plan", "--memory-limit", &limit.to_string(), "--json", &file], args].concat());
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let sum = |of: &str| report["paging"][of]["sum"].as_u64().unwrap();
    let (resident, planned) = (sum("resident"), sum("paged"));
    let last = metrics(&place.path("limited")).into_iter().rfind(|line| line["loss"].is_number()).unwrap();
    let paged = last["paged_in"].as_u64().unwrap();
    assert!(planned > limit / 4 && planned <= paged + (resident + planned) / 10, "planned {planned}, paged {paged}");
}

/// That the steps' lines and the report say what was paged of the run under a limit, and nothing of the other.
fn assert_told(place: &Place) {
    for (name, is_limited) in [("free", false), ("limited", true)] {
        let lines = metrics(&place.path(name)).into_iter();
        let steps: Vec<Value> = lines.filter(|line| line["loss"].is_number()).collect();
        for field in ["paged_in", "paged_out", "stall_seconds"] {
            assert!(steps.iter().all(|step| step[field].is_number() == is_limited), "{name}: {field}");
        }
        let moved: u64 = steps.iter().filter_map(|step| step["paged_in"].as_u64()).sum();
        assert_eq!(moved > 0, is_limited, "{name}");
        let report = std::fs::read_to_string(place.path(name).join("report.html")).unwrap();
        assert_eq!(report.contains("Waiting for pages"), is_limited, "{name}");
    }
}

#[test]
fn qlora_under_the_least_limit_has_the_bits_of_one_without() {
    let place = Place::new();
    let args = ["--steps", "4", "--optimizer", "adamw8bit"];
    same_under(&place, "adapter_model.safetensors", &args, &[], |_| least(&args));
}

/// Weights, gradients and moments of 32 million parameters, at 60 % of what they take.
#[test]
fn full_finetuning_under_60_percent_has_the_bits_of_one_without() {
    let place = Place::new();
    let [model, tokens] = place.small();
    let args = ["--model", &model, "--tokens", &tokens, "--method", "full", "--steps", "3"];
    let limit = same_under(&place, "model.safetensors", &args, &[], |needed| needed * 6 / 10);
    assert_planned(&place, &args, limit);
    same_under(&place, "model.safetensors", &args, &["--page-io", "direct"], |_| least(&args));
}

/// Weights and moments come back from the files of a checkpoint, tensor by tensor.
#[test]
fn a_resumed_run_stays_within_the_least_limit() {
    let place = Place::new();
    let [model, tokens] = place.small();
    for (product, config, method) in [
        ("model.safetensors", "config.json", &["--method", "full"][..]),
        ("adapter_model.safetensors", "adapter_config.json", &["--quantize", "nf4", "--double-quant"]),
    ] {
        let args = [&["--model", &model, "--tokens", &tokens], method].concat();
        let (out, limit) = (place.text("run"), least(&args));
        let run = |args: &[&str]| {
            let peak = peak(&[&["train", "--out", &out], args].concat());
            assert!(peak <= limit, "{args:?}: {peak} bytes under a limit of {limit}");
            // Unfinished again: its last checkpoint is of the step before the last.
            std::fs::remove_file(place.path("run").join(config)).unwrap();
            std::fs::read(place.path("run").join(product)).unwrap()
        };
        let limited = ["--overwrite", "--steps", "3", "--checkpoint-every", "1", "--memory-limit", &limit.to_string()];
        let whole = run(&[&args[..], &limited].concat());
        assert!(whole == run(&["--resume"]), "{method:?}: other bits after --resume");
    }
}

#[test]
fn a_run_may_go_on_under_another_limit() {
    let place = Place::new();
    let (whole, other) = (place.text("whole"), place.text("other"));
    let args = |out| ["train", "--steps", "4", "--checkpoint-every", "2", "--memory-limit", "150MiB", "--out", out];
    succeed(&args(&whole));
    succeed(&args(&other));
    for product in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(place.path("other").join(product)).unwrap();
    }
    succeed(&["train", "--out", &other, "--resume", "--memory-limit", "110MiB"]);
    // The limit is the run's own from then on.
    let kept = std::fs::read_to_string(place.path("other/run.toml")).unwrap();
    assert!(kept.contains("memory-limit = \"110MiB\""), "{kept}");
    std::fs::remove_file(place.path("other/adapter_config.json")).unwrap();
    succeed(&["train", "--out", &other, "--resume"]);
    assert_eq!(std::fs::read_to_string(place.path("other/run.toml")).unwrap(), kept);
    let adapter = |name: &str| std::fs::read(place.path(name).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("whole") == adapter("other"));
}

#[test]
fn a_killed_run_leaves_no_pages_behind() {
    let place = Place::new();
    std::fs::create_dir(place.path("pages")).unwrap();
    let (out, pages) = (place.text("run"), place.text("pages"));
    let limited = ["--memory-limit", "110MiB", "--page-folder", &pages];
    let args = [&["train", "--checkpoint-every", "2", "--out", &out], &limited[..]].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_rankfold")).args(&args).stdout(Stdio::null()).spawn().unwrap();
    while !place.path("run/checkpoints/step-000002").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeed(&[&["train", "--steps", "1", "--out", &place.text("next")], &limited[..]].concat());
    assert_eq!(std::fs::read_dir(&pages).unwrap().count(), 0);
}

/// Killed, so that what was there for a moment would stay: of the embedded model, and of the pages.
#[test]
fn a_killed_run_leaves_nothing_in_the_systems_folder_for_temporary_files() {
    let place = Place::new();
    std::fs::create_dir(place.path("tmp")).unwrap();
    let out = place.text("run");
    let mut child = Command::new(env!("CARGO_BIN_EXE_rankfold"))
        .args(["train", "--optimizer", "paged-adamw", "--checkpoint-every", "1", "--keep", "1000", "--out", &out])
        .env("TMPDIR", place.path("tmp"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !place.path("run/checkpoints/step-000001").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(std::fs::read_dir(place.path("tmp")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_kept_is_refused_before_anything_is_written() {
    let place = Place::new();
    let out = place.text("run");
    let refused = |more: &[&str], words: &[&str]| {
        refuse(&[&["train", "--out", &out], more].concat(), words);
        assert!(!Path::new(&out).exists(), "{more:?} left a folder");
    };
    // A kernel that touches no weight is named by its layer.
    refused(&["--memory-limit", "40MiB"], &["memory limit of 40 MiB", "expected at least", "model.layers.3.mlp"]);
    refused(&["--memory-limit", "60MiB"], &["memory limit of 60 MiB", "expected at least"]);
    refused(&["--memory-limit", "1MiB"], &["memory", "expected at least"]);
    refused(&["--memory-limit", "0"], &["--memory-limit", "0"]);
    refused(&["--memory-limit", "1KiB", "--device", "cuda-host"], &["capacity of 1024 bytes", "a page, 65536"]);
    refused(&["--memory-limit", "1GiB", "--page-folder", "/no/such/folder"], &["/no/such/folder"]);
    let file = place.file("file", "");
    refused(&["--memory-limit", "1GiB", "--page-folder", &file], &[&file]);
    refused(&["--memory-limit", "1GiB", "--page-folder", "/proc"], &["/proc"]);
    refused(&["--memory-limit", "1GiB", "--device", "reference"], &["--memory-limit", "reference"]);
    refused(&["--page-folder", "/tmp"], &["--page-folder", "no --memory-limit"]);
    refused(&["--page-io", "direct"], &["--page-io", "no --memory-limit"]);
}
