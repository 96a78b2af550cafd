//! 4-bit checkpoints on the command line: what is refused, with its file and tensor, and what is left behind.

use crate::common::{Place, refuse, succeed};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The weight that comes first of those in 4 bits.
const FIRST: &str = "model.layers.0.self_attn.q_proj.weight";

/// The names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    entries.collect()
}

/// The embedded model in NF4, doubly quantised.
fn four_bits(place: &Place, base: &str) -> String {
    let four = place.text("four");
    succeed(&["quantize", "--model", base, "--out", &four, "--double-quant"]);
    four
}

#[test]
fn an_output_that_is_the_input_is_refused_and_the_input_stays() {
    let place = Place::new();
    let base = place.base();
    let four = four_bits(&place, &base);
    let whole = |folder: &str| -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = names(Path::new(folder))
            .into_iter()
            .map(|n| (n.clone(), fs::read(Path::new(folder).join(n)).unwrap()))
            .collect();
        files.sort();
        files
    };
    let before = [whole(&base), whole(&four)];
    let detour = format!("{base}/../base/");
    for out in [&base, &detour] {
        refuse(&["quantize", "--model", &base, "--out", out], &["base", "empty folder"]);
    }
    refuse(&["dequantize", "--model", &four, "--out", &four], &["four", "empty folder"]);
    assert!(before == [whole(&base), whole(&four)]);
}

#[test]
fn what_has_the_wrong_bits_for_a_command_is_refused() {
    let place = Place::new();
    let base = place.base();
    let (four, out) = (four_bits(&place, &base), place.text("out"));
    refuse(&["quantize", "--model", &four, "--out", &out], &["four", "model.layers.0", "4 bits already"]);
    refuse(&["dequantize", "--model", &base, "--out", &out], &["base", "nothing to dequantise"]);
    for block in ["0", "16", "48", "8192"] {
        refuse(&["quantize", "--model", &base, "--out", &out, "--block", block], &["block", block, "power of two"]);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_weight_that_is_not_finite_is_named_with_its_element() {
    let place = Place::new();
    let base = place.base();
    let whole = fs::read(place.path("base/model.safetensors")).unwrap();
    let (header, data) = whole.split_at(8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize);
    let header: serde_json::Value = serde_json::from_slice(&header[8..]).unwrap();
    let start = header[FIRST]["data_offsets"][0].as_u64().unwrap() as usize;
    let out = place.text("out");
    for bits in [0x7fc0u16, 0x7f80, 0xff80] {
        let mut broken = whole.clone();
        // Two of them: element 70 is the first.
        for element in [70, 99] {
            let at = whole.len() - data.len() + start + 2 * element;
            broken[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
        place.file("base/model.safetensors", broken);
        let quantize = ["quantize", "--model", &base, "--out", &out];
        refuse(&quantize, &["base/model.safetensors", FIRST, "element 70", "finite"]);
        assert!(!place.path("out").exists());
    }
}

/// Each lie is as long as the truth, so that nothing else in the file moves.
#[test]
fn a_quantisation_state_that_lies_is_refused_with_its_tensor() {
    let place = Place::new();
    let four = four_bits(&place, &place.base());
    let (whole, out) = (fs::read(place.path("four/model.safetensors")).unwrap(), place.text("out"));
    let truth = br#"{"quant_type": "nf4", "blocksize": 64, "#;
    let at = whole.windows(truth.len()).position(|window| window == truth).unwrap();
    let end = at + whole[at..].iter().position(|byte| *byte == b'}').unwrap() + 1;
    let state = String::from_utf8(whole[at..end].to_vec()).unwrap();
    let shape = &state[state.find('[').unwrap()..=state.find(']').unwrap()];
    let offset = &state[state.rfind(": ").unwrap() + 2..state.len() - 1];
    let padded = |text: &str, like: &str| format!("{text:>width$}", width = like.len());
    for (from, to, word) in [
        ("\"nf4\"", "\"nf5\"".to_owned(), "nf5"),
        ("\"nf4\"", "\"fp4\"".to_owned(), "fp4"),
        (": 64,", ":  0,".to_owned(), "blocksize 0"),
        (": 64,", ": 32,".to_owned(), "absmax"),
        ("float", "flout".to_owned(), "flout"),
        (shape, padded("[1, 1]", shape), "shape"),
        (shape, padded("[9e9, 9]", shape), "state"),
        (shape, padded("[64]", shape), "two dimensions"),
        ("nested_blocksize", "nested_blocksise".to_owned(), "nested_blocksize None"),
        (offset, padded("NaN", offset), "state"),
        (offset, padded("1e39", offset), "nested_offset"),
        (offset, padded("null", offset), "nested_offset None"),
    ] {
        let lie = state.replacen(from, &to, 1);
        assert!(lie.len() == state.len() && lie != state, "{from} to {to}");
        let mut broken = whole.clone();
        broken[at..end].copy_from_slice(lie.as_bytes());
        place.file("four/model.safetensors", broken);
        for command in [&["dequantize", "--model", &four, "--out", &out][..], &["eval", "--model", &four]] {
            refuse(command, &["four/model.safetensors", "model.layers.0", word]);
        }
        assert!(!place.path("out").exists());
    }
}

/// Of an element type that does not exist, so that the message quotes both.
#[test]
fn control_characters_from_a_file_do_not_reach_the_terminal() {
    let place = Place::new();
    let file = |dtype: &str| {
        let header = format!(r#"{{"a\u001b[31m\u009b":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,1]}}}}"#);
        place.file("x.safetensors", [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0]].concat())
    };
    // The escapes are shown, and `refuse` would not find them had the characters been passed on.
    refuse(&["inspect", &file(r"U\u001b")], &[r"'a\u{1b}[31m\u{9b}'", r"dtype 'U\u{1b}'"]);
    let shown = succeed(&["inspect", &file("U8")]);
    assert!(shown.contains(r"a\u{1b}[31m\u{9b}"), "{shown:?}");
    assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
}

/// transformers gives a checkpoint to bitsandbytes by this name, and bitsandbytes has no int4.
#[test]
fn only_formats_that_bitsandbytes_has_are_said_to_be_its_own_and_all_are_read_back() {
    let place = Place::new();
    let base = place.base();
    for (format, method) in [("nf4", "bitsandbytes"), ("fp4", "bitsandbytes"), ("int4", "rankfold")] {
        let (four, dense) = (place.text(format), place.text(&format!("{format}-dense")));
        succeed(&["quantize", "--model", &base, "--out", &four, "--format", format]);
        let config = fs::read(place.path(format).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let quantization = &config["quantization_config"];
        assert_eq!(quantization["quant_method"], method);
        assert_eq!(quantization.get("bnb_4bit_quant_type").is_some(), method == "bitsandbytes");
        assert!(succeed(&["inspect", &four]).contains(&format!("← {format} ")));
        succeed(&["dequantize", "--model", &four, "--out", &dense]);
    }
    let help = succeed(&["quantize", "--help"]);
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains("bitsandbytes load nf4 and fp4 alone"));
}

/// Killed at any moment: the folder is not there, or it is there with every file whole.
#[test]
fn a_killed_conversion_leaves_the_whole_folder_or_none() {
    let place = Place::new();
    let base = place.base();
    let four = four_bits(&place, &base);
    let files = names(&place.path("four"));
    for delay in [0, 5, 10, 20, 30, 40, 60, 90] {
        let out = place.text("out");
        let quantize = ["quantize", "--model", &base, "--out", &out, "--double-quant"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_rankfold"));
        let mut child = command.args(quantize).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        if !place.path("out").exists() {
            // What was left of the temporary gives way to the next.
            succeed(&quantize);
        }
        for name in &files {
            let [found, expected] = [&out, &four].map(|folder| fs::read(Path::new(folder).join(name)).unwrap());
            assert!(found == expected, "{name}, killed after {delay} ms");
        }
        fs::remove_dir_all(&out).unwrap();
        assert_eq!(names(&place.path("")).len(), 2, "{:?}", names(&place.path("")));
    }
}
