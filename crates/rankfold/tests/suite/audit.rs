//! `rankfold audit` as a user meets it.

use crate::common::{Place, refuse, succeed};
use serde_json::Value;
use std::path::Path;

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn the_built_in_model_is_audited_alike_on_any_number_of_threads() {
    let place = Place::new();
    let (one, two) = (place.path("one"), place.path("two"));
    let run = |out: &Path, threads: &str| {
        succeed(&["audit", "--out", out.to_str().unwrap(), "--blocks", "64,4096", "--threads", threads])
    };
    let text = run(&one, "1");
    run(&two, "2");
    for name in ["audit.json", "audit.html"] {
        assert!(read(&one, name) == read(&two, name), "{name}");
    }
    assert!(
        text.lines().last().unwrap().ends_with(&format!("audit.json and audit.html in {}", one.display())),
        "{text}"
    );
    assert_eq!(text.lines().filter(|line| line.contains(" single ") || line.contains(" double ")).count(), 3 * 2 * 2);

    let json: Value = serde_json::from_str(&read(&one, "audit.json")).unwrap();
    assert_eq!(json["model"], "builtin");
    for figures in json["totals"]["results"].as_array().unwrap() {
        assert!(figures["certified"] == true && figures["bound_used"].as_f64().unwrap() <= 1.0, "{figures}");
        assert!(figures["worst"]["margin"].as_f64().unwrap() >= 0.0, "{figures}");
    }

    // What is audited is what `quantize` quantises.
    let quantised = succeed(&["quantize", "--out", &place.text("q")]);
    let tensors = json["tensors"].as_array().unwrap().len();
    assert!(quantised.starts_with(&format!("{tensors} linear layers")), "{tensors}: {quantised}");
}

#[test]
fn a_single_file_is_audited_without_its_model() {
    let place = Place::new();
    place.base();
    let (file, out) = (place.text("base/model.safetensors"), place.path("out"));
    let args = ["audit", "--model", &file, "--out", &place.text("out")];
    succeed(&[&args[..], &["--formats", "int4", "--blocks", "128"]].concat());
    let json: Value = serde_json::from_str(&read(&out, "audit.json")).unwrap();
    assert_eq!(json["totals"]["results"].as_array().unwrap().len(), 2);
    assert_eq!(json["left_out"], serde_json::json!(["model.embed_tokens.weight"]));
    assert_eq!(json["shown_block"], 128);
}

#[test]
fn what_cannot_be_audited_is_refused_in_one_line() {
    let place = Place::new();
    let at = |name: &str| place.text(name);
    succeed(&["quantize", "--out", &at("q")]);
    let out = at("out");
    refuse(&["audit", "--model", &at("q"), "--out", &out], &["is in 4 bits already", "expected the unquantised model"]);
    refuse(&["audit", "--model", &at("none"), "--out", &out], &["none"]);
    let rubbish = place.file("rubbish.safetensors", [0xff; 64]);
    refuse(&["audit", "--model", &rubbish, "--out", &out], &["rubbish.safetensors"]);
    refuse(&["audit", "--out", &out, "--blocks", "48"], &["block 48", "32 to 4096"]);
    refuse(&["audit", "--out", &out, "--formats", "nf5"], &["nf5", "expected nf4, fp4 or int4"]);
    refuse(&["audit", "--out", &out, "--threads", "0"], &["--threads 0"]);
    assert!(!Path::new(&out).exists(), "a refused audit writes nothing");
    refuse(&["audit", "--out", &at("q"), "--blocks", "64"], &["q", "expected a new or empty folder"]);
}
