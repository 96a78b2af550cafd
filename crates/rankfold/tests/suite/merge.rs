//! `rankfold merge`: several adapters, and merging into 4 bits.

use crate::common::{self, Place, both, refuse, succeed};

fn adapter(place: &Place, base: &str, name: &str, seed: &str) -> String {
    let out = place.text(name);
    let small =
        ["train", "--model", base, "--batch", "2", "--seq", "32", "--rank", "4", "--steps", "6", "--lr", "3e-3"];
    succeed(&[&small[..], &["--seed", seed, "--targets", "q_proj,down_proj", "--out", &out]].concat());
    out
}

fn loss(args: &[&str]) -> f64 {
    common::loss(&[&["eval", "--seq", "32"], args].concat())
}

#[test]
fn a_sum_of_adapters_is_what_is_run_and_what_is_merged() {
    let place = Place::new();
    let base = place.base();
    let held = place.file("held.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(20));
    let [one, two] = [("one", "1"), ("two", "2")].map(|(name, seed)| adapter(&place, &base, name, seed));
    let model = ["--model", &base, "--data", &held];
    let with = |more: &[&str]| loss(&[&model[..], more].concat());
    let (plain, first) = (with(&[]), with(&["--adapter", &one]));
    assert!(first < plain);
    // A weight of 0 leaves nothing of an adapter, and two halves of one are that one; up to the rounding of B.
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-4, "{a} {b}");
    near(with(&["--adapter", &one, "--adapter", &two, "--weight", "1", "--weight", "0"]), first);
    near(with(&["--adapter", &one, "--adapter", &one, "--weight", "0.5", "--weight", "0.5"]), first);
    near(with(&["--adapter", &one, "--adapter", &one, "--weight", "1", "--weight=-1"]), plain);

    let both = ["--adapter", &one, "--adapter", &two, "--weight", "0.7", "--weight", "0.6"];
    let merged = place.text("merged");
    succeed(&[&["merge", "--model", &base, "--out", &merged], &both[..]].concat());
    let (run, stored) = (with(&both), loss(&["--model", &merged, "--data", &held]));
    // bf16 weights: each off by at most 2⁻⁸ of itself, and the loss with them by far less than what was learned.
    assert!((run - stored).abs() < 0.2 * (plain - run), "{run} {stored} {plain}");

    // The sum as one adapter: whole, and of a smaller rank, which is near it and no better.
    let (whole, smaller) = (place.text("whole"), place.text("smaller"));
    succeed(&[&["merge", "--model", &base, "--as-adapter", "--out", &whole], &both[..]].concat());
    near(with(&["--adapter", &whole]), run);
    succeed(&[&["merge", "--model", &base, "--as-adapter", "--rank", "3", "--out", &smaller], &both[..]].concat());
    let of_three = with(&["--adapter", &smaller]);
    assert!(of_three < plain && (of_three - run).abs() < 0.5 * (plain - run), "{of_three} {run} {plain}");

    refuse(
        &[&["merge", "--model", &base, "--out", &place.text("no")], &both[..6]].concat(),
        &["1 times --weight", "2"],
    );
    let grads = ["grads", "--model", &base, "--tokens", &held, "--out", &place.text("g")];
    refuse(&[&grads[..], &both].concat(), &["expected one adapter"]);
    assert!(!place.path("no").exists());
}

#[test]
fn a_merge_into_4_bits_keeps_what_no_adapter_touched_and_says_its_error() {
    let place = Place::new();
    let base = place.base();
    let (four, out, again) = (place.text("four"), place.text("merged"), place.text("again"));
    succeed(&["quantize", "--model", &base, "--out", &four, "--double-quant"]);
    let one = adapter(&place, &four, "one", "1");
    let [_, said] = both(&["merge", "--model", &four, "--adapter", &one, "--requantize", "--out", &out]);
    assert!(said.contains("quantising again moves a merged weight by "), "{said}");
    let held = place.file("held.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(20));
    let of = |model: &str, more: &[&str]| loss(&[&["--model", model, "--data", &held], more].concat());
    let (plain, adapted, merged) = (of(&four, &[]), of(&four, &["--adapter", &one]), of(&out, &[]));
    // 4 bits again cost a part of what was learned; of the little that 6 steps learn, most.
    assert!(adapted < merged && merged < plain, "{plain} {adapted} {merged}");
    // The layers that the adapter left alone are as they were, to the byte.
    let tensors = |folder: &str| rankfold_files::Checkpoint::open(std::path::Path::new(folder)).unwrap();
    let (before, after) = (tensors(&four), tensors(&out));
    let bytes = |file: &rankfold_files::Checkpoint, name: &str| {
        let mut bytes = vec![0; file.info(name).unwrap().bytes];
        file.read_into(name, &mut bytes).unwrap();
        bytes
    };
    let names: Vec<&str> = before.names().collect();
    assert_eq!(names, after.names().collect::<Vec<_>>());
    for name in names {
        let adapted = name.contains("q_proj") || name.contains("down_proj");
        assert!(adapted || bytes(&before, name) == bytes(&after, name), "{name}");
    }
    refuse(&["merge", "--model", &base, "--adapter", &one, "--requantize", "--out", &again], &["not in 4 bits"]);
}
