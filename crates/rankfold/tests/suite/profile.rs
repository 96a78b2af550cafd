//! `train --profile` as a user meets it: the run is the same to the bit, and what is said of it adds up.

use crate::common::{Place, both, figures, refuse, succeed};
use rankfold_profile::{MOST_EVENTS, TRACED_STEPS};
use serde_json::Value;
use std::path::Path;

/// A short run of the main job; what differs is appended.
fn run<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let common = ["train", "--steps", "7", "--batch", "2", "--seq", "32", "--dropout", "0.1", "--accumulate", "2"];
    [&common[..], &["--checkpoint-every", "3", "--out", out], more].concat()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_profiled_run_gives_the_bits_of_one_that_is_not_and_its_profile_adds_up() {
    let place = Place::new();
    let (plain, profiled) = (place.text("plain"), place.text("profiled"));
    let adapter = |run: &str| std::fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    for more in [&[][..], &["--checkpointing", "--method", "adalora"]] {
        succeed(&run(&plain, &[more, &["--overwrite"]].concat()));
        let [said, progress] = both(&run(&profiled, &[more, &["--overwrite", "--profile"]].concat()));
        assert!(adapter("plain") == adapter("profiled"), "{more:?}");
        for field in ["loss", "eval_loss", "grad_norm"] {
            assert_eq!(figures(&place.path("plain"), field), figures(&place.path("profiled"), field), "{field}");
        }
        assert!(!place.path("plain/profile.json").exists() && !place.path("plain/trace.json").exists());

        let profile = json(&place.path("profiled/profile.json"));
        let rows = profile["rows"].as_array().unwrap();
        let number = |row: &Value, field: &str| row[field].as_f64().unwrap();
        let sum = |field: &str| rows.iter().map(|row| number(row, field)).sum::<f64>();
        // Sums of as many numbers, each read back to the nearest.
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * rows.len() as f64 * a.abs().max(b.abs());
        assert_eq!(profile["steps"], 6, "the first is a warm-up");
        assert!(near(sum("seconds"), number(&profile, "in_kernels")));
        assert!(near(sum("share"), number(&profile, "in_kernels") / number(&profile, "seconds")));
        assert!(number(&profile, "in_kernels") <= number(&profile, "seconds"));
        for (kernel, layer) in [
            ("linear", "q_proj"),
            ("linear_grad_input", "down_proj"),
            ("linear_grad_weight", "gate_proj"),
            ("attention", "attention"),
            ("attention_grad", "attention"),
            ("silu_mul_grad", "mlp"),
            ("rms_norm", "norm"),
            ("rms_norm_grad", "norm"),
            ("embedding", "embedding"),
            ("cross_entropy_grad_in_place", "head"),
            ("adamw", "optimiser"),
        ] {
            let is = |row: &&Value| row["kernel"] == kernel && row["layer"] == layer;
            assert!(rows.iter().any(|row| is(&row) && number(row, "fraction") > 0.0), "{kernel} of {layer}: {rows:?}");
        }
        assert!(said.contains("bound by") && said.contains("in kernels"), "{said}");
        assert!(said.lines().last().unwrap().starts_with("the adapter is in "), "{said}");
        assert!(progress.contains("profile.json") && progress.contains("trace.json"), "{progress}");

        let trace = json(&place.path("profiled/trace.json"));
        let steps = trace.as_array().unwrap().iter().filter(|event| event["cat"] == "step");
        // Its gradients, and its update.
        assert_eq!(steps.count(), 2 * TRACED_STEPS);
    }
    succeed(&run(&profiled, &["--overwrite"]));
    assert!(!place.path("profiled/profile.json").exists(), "an overwritten run leaves its profile");
}

/// Kernels of a device run behind their calls' backs; a limit leaves little room to measure the machine in.
#[test]
fn a_profile_can_be_had_on_other_devices_and_under_a_limit() {
    let place = Place::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden");
    let [model, tokens] = ["tiny-llama", "tiny-llama-io.safetensors"].map(|name| golden.join(name));
    let trace = place.text("elsewhere.json");
    for (name, more) in [
        ("cuda", ["--device", "cuda-host"]),
        ("reference", ["--device", "reference"]),
        ("limit", ["--memory-limit", "96MiB"]),
    ] {
        let out = place.text(name);
        let what = ["train", "--model", model.to_str().unwrap(), "--tokens", tokens.to_str().unwrap(), "--steps", "2"];
        succeed(&[&what[..], &["--rank", "4", "--out", &out, "--profile", &trace], &more].concat());
        assert!(!place.path(name).join("trace.json").exists(), "the trace has a place of its own");
        assert_eq!(json(&place.path(name).join("profile.json"))["steps"], 1);
        assert!(!json(Path::new(&trace)).as_array().unwrap().is_empty());
        std::fs::remove_file(&trace).unwrap();
    }
}

#[test]
fn a_profile_that_cannot_be_written_is_refused_before_the_run_and_help_says_how_long_a_trace_is() {
    let place = Place::new();
    let (out, nowhere) = (place.text("out"), place.text("nowhere/trace.json"));
    refuse(&run(&out, &["--profile", &nowhere]), &["nowhere", "--profile", "no such folder"]);
    refuse(&run(&out, &["--profile", "a", "b"]), &["unexpected argument 'b'"]);
    refuse(&["eval", "--profile"], &["unexpected argument '--profile'"]);
    assert!(!place.path("out").exists());
    let help = succeed(&["train", "--help"]).split_whitespace().collect::<Vec<_>>().join(" ");
    let events = format!("{},{:03}", MOST_EVENTS / 1000, MOST_EVENTS % 1000);
    assert!(help.contains(&format!("the first {TRACED_STEPS} steps ({events} events at the most)")), "{help}");
}
