//! The plan beside what is measured, and the command as a user meets it.

use crate::common::{Place, figures, refuse, succeed};
use serde_json::Value;
use std::path::Path;

/// How far the plan of a run's peak may be from what the system then measures: what the design promises.
const TOLERANCE: f64 = 0.1;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The largest phase's bytes.
fn peak(plan: &Value) -> f64 {
    let phases = plan["phases"].as_array().unwrap();
    phases.iter().map(|phase| phase["bytes"]["sum"].as_f64().unwrap()).fold(0.0, f64::max)
}

/// Run a few steps with these options and plan them: the measured peak is the planned one.
fn measure(place: &Place, options: &[&str]) {
    let (out, file) = (place.text("run"), place.text("plan.json"));
    let said = succeed(&[&["plan", "--json", &file], options].concat());
    assert!(said.lines().last().unwrap().contains(&file), "{said}");
    succeed(&[&["train", "--steps", "3", "--overwrite", "--out", &out], options].concat());
    let measured = figures(&place.path("run"), "peak_rss").into_iter().fold(0.0, f64::max);
    let planned = peak(&json(Path::new(&file))["plan"]);
    assert!((planned / measured - 1.0).abs() <= TOLERANCE, "{options:?}: planned {planned}, measured {measured}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_built_in_run_takes_what_was_planned() {
    let place = Place::new();
    let held_out = place.file("held-out.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(20));
    let none: &[&str] = &[];
    for options in [
        none,
        &["--checkpointing"],
        &["--quantize", "none"],
        &["--method", "full"],
        &["--method", "full", "--checkpointing"],
        &["--batch", "4", "--accumulate", "2", "--dropout", "0.1", "--rank", "32"],
    ] {
        measure(&place, &[&["--eval-data", &held_out], options].concat());
    }
}

/// The configuration of 32 million parameters that kernels are measured on, 4 rows of 256 tokens.
#[cfg(target_os = "linux")]
#[test]
fn the_small_configuration_takes_what_was_planned() {
    let place = Place::new();
    let [model, tokens] = place.small();
    for options in [
        &["--method", "full"][..],
        &["--method", "full", "--checkpointing"],
        &["--quantize", "nf4", "--double-quant"],
        &["--quantize", "nf4", "--double-quant", "--checkpointing"],
        &["--quantize", "nf4", "--double-quant", "--saved-activations", "bf16"],
    ] {
        measure(&place, &[&["--model", &model, "--tokens", &tokens], options].concat());
    }
}

/// Starts that decompose every matrix, in so small a batch that this is what takes most.
#[cfg(target_os = "linux")]
#[test]
fn a_decomposition_takes_what_was_planned() {
    let place = Place::new();
    let model = place.small()[0].clone();
    let tokens = place.tokens([1, 16]);
    for options in [
        &["--init", "pissa"][..],
        &["--init", "olora"],
        &["--init", "pissa", "--quantize", "nf4"],
        &["--init", "olora", "--quantize", "nf4"],
        &["--init", "loftq", "--quantize", "nf4"],
    ] {
        measure(&place, &[&["--model", &model, "--tokens", &tokens], options].concat());
    }
}

const LLAMA_65B: &str = r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "intermediate_size": 22016, "rms_norm_eps": 1e-5, "rope_theta": 10000,
    "torch_dtype": "float16"}"#;

#[test]
fn a_model_of_any_size_is_planned_from_its_config_alone() {
    let place = Place::new();
    let config = place.file("config.json", LLAMA_65B);
    let file = place.text("plan.json");
    let qlora = ["--quantize", "nf4", "--double-quant", "--rank", "64", "--batch", "1", "--seq", "512"];
    let said = succeed(&[&["plan", "--model", &config, "--checkpointing", "--json", &file], &qlora[..]].concat());
    for words in ["65,285,660,672 parameters", "799,539,200 trained", "783.43 GB: 12 bytes a parameter"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let report = json(Path::new(&file));
    assert_eq!(report["plan"], report["with_checkpointing"]);
    assert!(peak(&report["with_checkpointing"]) < peak(&report["without_checkpointing"]));
    // The folder, the file and a TOML file of the same options are the same run.
    let folder = place.text("");
    let toml = "quantize = 'nf4'\ndouble-quant = true\nrank = 64\nbatch = 1\nseq = 512\ncheckpointing = true\n";
    let toml = place.file("run.toml", toml);
    let again = succeed(&["plan", "--model", &folder, "--config", &toml]);
    // All but the first line and the last, which name files.
    let figures = |said: &str| said.lines().rev().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(figures(&again).split_last().unwrap().1, figures(&said).split_last().unwrap().1);
}

#[test]
fn a_limit_says_what_is_paged_and_one_too_low_which_layer_needs_more() {
    let place = Place::new();
    let config = place.file("config.json", LLAMA_65B);
    let qlora = ["plan", "--model", &config, "--quantize", "nf4", "--double-quant", "--rank", "64", "--batch", "1"];
    let file = place.text("plan.json");
    let args = |limit| [&qlora[..], &["--checkpointing", "--memory-limit", limit, "--json", &file]].concat();
    assert!(succeed(&args("40GiB")).contains("under 40.00 GiB"));
    let paging = &json(Path::new(&file))["paging"];
    // 8 MiB are kept free: a run lets that much more leave.
    let limit = 40u64 << 30;
    assert_eq!(paging["resident"]["sum"], limit - (8 << 20));
    let paged = |what: &str| paging["paged"][what].as_u64().unwrap();
    assert!(paged("optimizer") > 0 && paged("saved") == 0, "{paging}");
    refuse(&args("64MiB"), &["memory limit of 64 MiB", "expected at least", "lm_head.weight"]);
    refuse(&args("4GB"), &["--memory-limit", "4GB", "GiB"]);
}

#[test]
fn what_cannot_be_planned_is_refused_in_one_line() {
    let place = Place::new();
    refuse(&["plan", "--model", &place.text("nowhere")], &["nowhere"]);
    let dtype = place.file("config.json", LLAMA_65B.replace("float16", "int3"));
    refuse(&["plan", "--model", &dtype], &["config.json", "int3", "bfloat16"]);
    refuse(&["plan", "--json", &place.text("no/plan.json")], &["no such folder", "--json"]);
    refuse(&["plan", "--targets", "no_proj"], &["no_proj"]);
    refuse(&["plan", "--batch", "1048576", "--seq", "1048576"], &["batch × seq", "2^26"]);
    refuse(&["plan", "--method", "full", "--rank", "3"], &["--rank", "--method full"]);
}
