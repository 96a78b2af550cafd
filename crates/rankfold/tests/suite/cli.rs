//! The binary as a user meets it: runs that stop and go on, threads that change nothing, bad input in one line.

#[cfg(target_os = "linux")]
use crate::common::least;
use crate::common::{Place, figures, kill_at, loss, metrics, refuse, succeed};
use std::path::Path;
use std::process::Command;

fn adapter(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

/// A short run of the main job; what differs is appended.
fn run<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let common = ["train", "--steps", "6", "--batch", "2", "--seq", "32", "--dropout", "0.1", "--accumulate", "2"];
    [&common[..], &["--checkpoint-every", "2", "--out", out], more].concat()
}

#[test]
fn one_and_two_threads_give_the_same_bits_with_and_without_checkpointing() {
    let place = Place::new();
    let adapters =
        [("one", "1", "false"), ("two", "2", "false"), ("three", "3", "true")].map(|(name, threads, again)| {
            let out = place.text(name);
            succeed(&run(&out, &["--threads", threads, "--checkpointing", again]));
            adapter(&place.path(name))
        });
    assert!(adapters[0] == adapters[1] && adapters[0] == adapters[2]);
}

#[test]
fn a_killed_and_resumed_run_gives_the_bits_of_one_that_never_stopped() {
    let place = Place::new();
    let (whole, killed) = (place.text("whole"), place.text("killed"));
    // All are kept, so that the one waited for is not gone before it is seen.
    let more = ["--steps", "40", "--eval-every", "10", "--keep", "20"];
    let args = |out| run(out, &more);
    succeed(&args(&whole));

    kill_at(&args(&killed), &place.path("killed/checkpoints/step-000010"));
    assert!(!place.path("killed/adapter_model.safetensors").exists(), "the product appears only at the end");

    refuse(&["train", "--out", &killed, "--resume", "--lr", "0.5"], &["lr", "0.5"]);
    refuse(&args(&killed), &["another run", "--resume"]);
    succeed(&["train", "--out", &killed, "--resume"]);
    assert!(adapter(&place.path("whole")) == adapter(&place.path("killed")));
    let losses = |name: &str| -> Vec<(serde_json::Value, serde_json::Value, serde_json::Value)> {
        let line = |line: &serde_json::Value| (line["step"].clone(), line["loss"].clone(), line["eval_loss"].clone());
        metrics(&place.path(name)).iter().map(line).collect()
    };
    assert_eq!(losses("whole"), losses("killed"));

    let (before, report) = (adapter(&place.path("killed")), place.path("killed/report.html"));
    // As a kill after the adapter and before the report would leave it.
    std::fs::remove_file(&report).unwrap();
    assert!(succeed(&["train", "--out", &killed, "--resume"]).contains("finished"));
    assert!(before == adapter(&place.path("killed")) && report.exists());
}

#[test]
fn activations_saved_in_bf16_are_an_option_that_a_resumed_run_keeps() {
    let place = Place::new();
    let (exact, out) = (place.text("exact"), place.text("bf16"));
    let [threads, other] = ["1", "3"].map(|n| ["--threads", n]);
    succeed(&run(&exact, &threads));
    succeed(&run(&out, &[&threads[..], &["--saved-activations", "bf16"]].concat()));
    let whole = adapter(&place.path("bf16"));
    assert!(whole != adapter(&place.path("exact")), "bf16 changes nothing");
    let first = |name: &str| figures(&place.path(name), "loss")[0].to_bits();
    assert_eq!(first("exact"), first("bf16"), "forward is exact");
    for product in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(place.path("bf16").join(product)).unwrap();
    }
    refuse(&["train", "--out", &out, "--resume", "--saved-activations", "f32"], &["saved-activations", "bf16"]);
    succeed(&[&["train", "--out", &out, "--resume"][..], &other].concat());
    assert!(adapter(&place.path("bf16")) == whole, "a resumed run has other bits");
}

/// A run that goes on from its checkpoint, on other threads, too. The paged ones under the least limit, at a rank at which
/// moments of 8 bits are larger than a page, too.
#[cfg(target_os = "linux")]
#[test]
fn paged_equals_unpaged_bit_for_bit() {
    let place = Place::new();
    let train = |optimizer: &str, threads: &str| {
        let (out, folder) = (place.text(optimizer), place.path(optimizer));
        let asked = ["--optimizer", optimizer, "--rank", "256"];
        // As many threads as any of the runs has: each has working memory of its own.
        let sizes = ["--batch", "2", "--seq", "32", "--dropout", "0.1", "--accumulate", "2", "--threads", "3"];
        let limit = least(&[&sizes[..], &asked].concat()).to_string();
        let is_paged = optimizer.starts_with("paged");
        let limited = if is_paged { &["--memory-limit", &limit][..] } else { &[] };
        succeed(&run(&out, &[&asked[..], &["--threads", threads], limited].concat()));
        let moved = figures(&folder, "paged_in");
        assert_eq!(moved.iter().all(|bytes| *bytes > 0.0) && moved.len() == 6, is_paged, "{optimizer}: {moved:?}");
        let whole = adapter(&folder);
        for product in ["adapter_model.safetensors", "adapter_config.json"] {
            std::fs::remove_file(folder.join(product)).unwrap();
        }
        succeed(&["train", "--out", &out, "--resume", "--threads", "3"]);
        assert!(adapter(&folder) == whole, "{optimizer}: a resumed run has other bits");
        whole
    };
    let exact = train("adamw", "1");
    assert!(exact == train("paged-adamw", "2"));
    let coded = train("adamw8bit", "3");
    assert!(coded == train("paged-adamw8bit", "1"));
    assert!(exact != coded, "8 bits change nothing");
    let out = place.text("adamw");
    refuse(&["train", "--out", &out, "--resume", "--optimizer", "adamw8bit"], &["optimizer", "adamw8bit"]);
    refuse(&run(&place.text("no"), &["--optimizer", "sgd"]), &["sgd"]);
}

#[test]
fn a_run_learns_and_its_adapter_is_used_by_every_command() {
    let place = Place::new();
    let (out, base) = (place.text("run"), place.base());
    succeed(&run(&out, &["--steps", "30", "--lr", "3e-3", "--rank", "4", "--targets", "q_proj,v_proj"]));
    let tokens = |args: &[&str]| loss(&[&["eval", "--seq", "64"], args].concat());
    let data = place.file("held.txt", "The LORD is my light and my salvation; whom shall I fear?\n".repeat(20));
    let plain = tokens(&["--model", &base, "--data", &data]);
    let adapted = tokens(&["--model", &base, "--data", &data, "--adapter", &out]);
    assert!(adapted < plain, "{adapted} is not below {plain}");

    let merged = place.text("merged");
    succeed(&["merge", "--model", &base, "--adapter", &out, "--out", &merged]);
    let in_one = tokens(&["--model", &merged, "--data", &data]);
    // bf16 weights: each off by at most 2⁻⁸ of itself, and the loss with them by far less than what was learned.
    assert!((in_one - adapted).abs() < 0.2 * (plain - adapted), "{in_one} is not near {adapted}");

    let quantised = place.text("quantised");
    succeed(&["quantize", "--model", &base, "--out", &quantised, "--double-quant"]);
    let built_in = tokens(&["--data", &data]);
    assert_eq!(tokens(&["--model", &quantised, "--data", &data]), built_in, "4 bits on the disk or made on reading");
    let dense = place.text("dense");
    succeed(&["dequantize", "--model", &quantised, "--out", &dense]);
    assert!((tokens(&["--model", &dense, "--data", &data]) - built_in).abs() < 0.05);

    let say = ["generate", "--adapter", &out, "--prompt", "The LORD", "--max-new", "12"];
    assert_eq!(succeed(&say), succeed(&say));
    assert!(succeed(&["inspect", &out]).contains("rank 4"));
    assert!(succeed(&["inspect", &quantised]).contains("nf4"));
}

#[test]
fn a_new_model_can_be_pretrained() {
    let place = Place::new();
    let text = place.file("text.txt", "to be or not to be, that is the question\n".repeat(50));
    let config = place.file(
        "config.json",
        r#"{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 10000, "dtype": "float32",
            "tie_word_embeddings": true, "vocab_size": 1}"#,
    );
    let (fresh, out) = (place.text("fresh"), place.text("out"));
    succeed(&["new", "--config", &config, "--vocab", "280", "--data", &text, "--out", &fresh]);
    let train = ["train", "--model", &fresh, "--data", &text, "--method", "full", "--steps", "20", "--lr", "1e-2"];
    succeed(&[&train[..], &["--batch", "4", "--seq", "32", "--out", &out]].concat());
    let evals = figures(&place.path("out"), "eval_loss");
    assert!(evals.len() == 2 && evals[1] < 0.7 * evals[0], "{evals:?}");
    succeed(&["generate", "--model", &out, "--prompt", "to be", "--max-new", "5"]);
}

#[test]
fn the_next_command_names_the_base_that_the_adapter_was_trained_on() {
    let place = Place::new();
    let text = place.file("text.txt", "In the beginning was the word. ".repeat(60));
    for (given, named) in [
        (&[][..], "--model builtin --adapter"),
        (&["--quantize", "none"], "--model builtin --quantize none --adapter"),
        (
            &["--quantize", "fp4", "--double-quant", "false", "--block", "128"],
            "--model builtin --quantize fp4 --double-quant false --block 128 --adapter",
        ),
    ] {
        let said = succeed(&run(&place.text("out"), &[&["--data", &text, "--overwrite"], given].concat()));
        assert!(said.contains(named), "{given:?}: {said}");
    }
}

#[test]
fn a_resumed_run_stays_on_its_instruction_set() {
    let place = Place::new();
    let out = place.text("out");
    let text = place.file("text.txt", "In the beginning was the word. ".repeat(60));
    refuse(&run(&out, &["--isa", "abacus"]), &["isa abacus", "expected", "portable"]);
    succeed(&run(&out, &["--isa", "portable", "--data", &text]));
    assert!(std::fs::read_to_string(place.path("out/run.toml")).unwrap().contains("isa = \"portable\""));
    let whole = adapter(&place.path("out"));
    for product in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::remove_file(place.path("out").join(product)).unwrap();
    }
    succeed(&["train", "--out", &out, "--resume"]);
    assert!(whole == adapter(&place.path("out")));
}

#[test]
fn bad_options_are_refused_in_one_line() {
    let place = Place::new();
    let out = place.text("out");
    refuse(&run(&out, &["--ranks", "8"]), &["unexpected argument '--ranks'", "Usage: rankfold train"]);
    refuse(&run(&out, &["--lr", "-1"]), &["--lr -1", "positive"]);
    refuse(&run(&out, &["--batch", "1000000", "--seq", "1000000"]), &["memory", "smaller --batch"]);
    refuse(&run(&out, &["--threads", "100000"]), &["--threads 100000", "1 to 1024"]);
    refuse(&["eval", "--seq", "100000000000"], &["--seq 100000000000", "at most"]);
    refuse(&["eval", "--batch", "0"], &["--batch 0", "at least 1"]);
    refuse(&run(&out, &["--rank", "0"]), &["rank 0", "at least 1"]);
    refuse(&run(&out, &["--block", "48"]), &["block 48", "power of two"]);
    refuse(&run(&out, &["--targets", "no_such_proj"]), &["no_such_proj", "matches no"]);
    refuse(&run(&out, &["--lr", "0"]), &["lr 0"]);
    refuse(&run(&out, &["--model", &place.text("nowhere")]), &["nowhere", "no such folder"]);
    let config = place.file("run.toml", "stepz = 3\n");
    refuse(&run(&out, &["--config", &config]), &["run.toml", "stepz"]);
    assert!(!place.path("out").exists(), "nothing is written before the input is known to be good");
    std::fs::create_dir(place.path("out")).unwrap();
    place.file("out/mine.txt", "keep");
    refuse(&run(&out, &[]), &["another run", "--overwrite"]);
    refuse(&run(&out, &["--overwrite"]), &["no run"]);
    refuse(&run(&out, &["--resume"]), &["no run"]);
    assert!(place.path("out/mine.txt").exists());

    let config = place.file("both.toml", "tokens = 'a.safetensors'\n");
    let out = place.text("other");
    refuse(&run(&out, &["--config", &config, "--data", "b.txt"]), &["--data", "--tokens"]);
    refuse(&["quantize", "--model", &place.text("nowhere"), "--out", &out], &["nowhere"]);
    assert!(!place.path("other").exists(), "a failed command leaves no folder");
}

#[test]
fn a_rank_above_the_matrix_only_warns() {
    let place = Place::new();
    let out = place.text("out");
    let args = run(&out, &["--targets", "k_proj", "--rank", "200", "--steps", "1"]);
    let output = Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("rank 200"), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "escapes where no terminal reads them: {stderr}");
}

#[test]
fn bad_data_is_refused_with_its_file_and_line() {
    let place = Place::new();
    let out = place.text("out");
    let refuse_data = |name: &str, bytes: &[u8], words: &[&str]| {
        let data = place.file(name, bytes);
        refuse(&run(&out, &["--data", &data]), &[&[name], words].concat());
    };
    refuse_data("empty.txt", b"", &[]);
    refuse_data("bad.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n", &["bad.jsonl:2"]);
    refuse_data("keys.jsonl", b"{\"words\": \"a\"}\n", &["keys.jsonl:1", "prompt"]);
    refuse_data("bytes.txt", b"abc\xff", &["UTF-8"]);
    refuse(&run(&out, &["--data", &place.text("gone.txt")]), &["gone.txt"]);
}

/// A safetensors file of one tensor.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn bad_model_files_are_refused_by_name() {
    let place = Place::new();
    let base = place.base();
    let file = place.path("base/model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let evaluate = ["eval", "--model", &base];
    let refuse_bytes = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&file, bytes).unwrap();
        refuse(&evaluate, words);
    };
    refuse_bytes(&whole[..whole.len() - 7], &["model.safetensors"]);
    refuse_bytes(&whole[..5], &["model.safetensors"]);
    refuse_bytes(
        &safetensors(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
        &["model.embed_tokens.weight"],
    );
    let mut nan = whole.clone();
    let last = nan.len() - 2;
    nan[last..].copy_from_slice(&half_nan());
    refuse_bytes(&nan, &["model.safetensors", "NaN"]);
    std::fs::write(&file, &whole).unwrap();

    let config = std::fs::read_to_string(place.path("base/config.json")).unwrap();
    let with = |from: &str, to: &str, words: &[&str]| {
        assert!(config.contains(from), "{from}");
        std::fs::write(place.path("base/config.json"), config.replace(from, to)).unwrap();
        refuse(&evaluate, &[&["config.json"], words].concat());
    };
    with("LlamaForCausalLM", "MambaForCausalLM", &["MambaForCausalLM"]);
    with("rope_theta", "rope_phi", &["rope_theta"]);
    std::fs::write(place.path("base/config.json"), config.replace("\"hidden_size\": 256", "\"hidden_size\": 128"))
        .unwrap();
    refuse(&evaluate, &["model.safetensors", "model.embed_tokens.weight"]);
    std::fs::remove_file(place.path("base/config.json")).unwrap();
    refuse(&evaluate, &["config.json"]);
}

/// A NaN in bf16.
fn half_nan() -> [u8; 2] {
    0x7fc0u16.to_le_bytes()
}

#[test]
fn a_token_beyond_the_vocabulary_is_refused_with_its_place() {
    let place = Place::new();
    let header = r#"{"ids":{"dtype":"I64","shape":[1,2],"data_offsets":[0,16]},"labels":{"dtype":"I64","shape":[1,2],"data_offsets":[16,32]}}"#;
    let data: Vec<u8> = [1i64, 99_999, 1, 2].iter().flat_map(|x| x.to_le_bytes()).collect();
    let tokens = place.file("tokens.safetensors", safetensors(header, &data));
    let out = place.text("out.safetensors");
    refuse(&["logits", "--tokens", &tokens, "--out", &out], &["tokens.safetensors", "99999", "position 1"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint() {
    let place = Place::new();
    let out = place.text("out");
    // The first step moves B by the rate, the second A too; then activations near 1e30 have squares beyond f32.
    let wild = ["--steps", "60", "--lr", "1e5", "--warmup", "0", "--clip", "0", "--checkpoint-every", "1"];
    refuse(&run(&out, &wild), &["step", "expected a finite number"]);
    assert!(!place.path("out/adapter_model.safetensors").exists());
    let kept: Vec<_> = std::fs::read_dir(place.path("out/checkpoints")).unwrap().collect();
    assert!(!kept.is_empty());
    let text = place.file("text.txt", "The LORD is my shepherd; I shall not want. ".repeat(40));
    for checkpoint in kept {
        let adapter = checkpoint.unwrap().path();
        succeed(&["eval", "--adapter", adapter.to_str().unwrap(), "--data", &text, "--seq", "32"]);
    }
}
