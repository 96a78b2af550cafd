//! LoRA's relatives as a user meets them: trained, stopped and gone on with, evaluated, written from, merged.

use crate::common::{Place, figures, loss, refuse, succeed};
use rankfold_files::Checkpoint;
use serde_json::Value;
use std::path::Path;

/// A sentence often, so that a few steps teach it.
const TEXT: &str = "In the beginning was the word, and the word was short. ";

fn bytes(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

fn names(file: &Path) -> Vec<String> {
    Checkpoint::open(file).unwrap().names().map(str::to_owned).collect()
}

fn losses(run: &Path) -> [f64; 2] {
    figures(run, "eval_loss").try_into().unwrap()
}

/// What every method must do; the run's folder and the folder that a model, data and run lie in.
fn round_trip(method: &str, more: &[&str]) -> Place {
    let place = Place::new();
    let base = place.base();
    let (data, held) = (place.file("data.txt", TEXT.repeat(60)), place.file("held.txt", TEXT.repeat(8)));
    let (out, run) = (place.text("run"), place.path("run"));
    let options = [&["--model", &base, "--data", &data, "--eval-data", &held, "--method", method], more].concat();
    let shape = ["--steps", "12", "--batch", "4", "--seq", "32", "--checkpoint-every", "5"];
    let options = [&options[..], &shape].concat();
    assert!(succeed(&[&["plan"], &options[..]].concat()).contains("trained"));
    succeed(&[&["train", "--out", &out], &options[..]].concat());

    // It learns, and what is saved is what was measured: the six digits that are printed.
    let [first, last] = losses(&run);
    assert!(last < first, "{method}: {last} is not below {first}");
    let evaluate =
        |adapter: &str| loss(&["eval", "--model", &base, "--adapter", adapter, "--data", &held, "--seq", "32"]);
    assert!((evaluate(&out) - last).abs() <= 1e-6, "{method}: {} after {last}", evaluate(&out));

    // From its checkpoint, the last steps again.
    let whole = bytes(&run);
    let checkpoint = place.text("run/checkpoints/step-000010");
    assert!(evaluate(&checkpoint).is_finite());
    for product in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(run.join(product)).unwrap();
    }
    succeed(&["train", "--out", &out, "--resume", "--threads", "1"]);
    assert!(bytes(&run) == whole, "{method}: a resumed run has other bits");

    // Checkpointing computes what is computed without.
    let again = place.text("again");
    succeed(&[&["train", "--out", &again, "--checkpointing"], &options[..]].concat());
    assert!(bytes(&place.path("again")) == whole, "{method}: checkpointing changes bits");

    let say = ["generate", "--model", &base, "--adapter", &out, "--prompt", "In the", "--max-new", "5"];
    assert_eq!(succeed(&say), succeed(&say));
    assert!(succeed(&["inspect", &out]).contains("adapter: "));
    let go_on = place.text("go-on");
    let few = ["--steps", "1", "--batch", "1", "--seq", "16"];
    let start = ["train", "--model", &base, "--data", &data, "--init-adapter", &out, "--out", &go_on];
    succeed(&[&start[..], &few].concat());

    let tokens = place.tokens([2, 9]);
    let (logits, grads) = (place.text("logits.safetensors"), place.text("grads.safetensors"));
    let with = |command: &str, file: &str| {
        loss(&[command, "--model", &base, "--adapter", &checkpoint, "--tokens", &tokens, "--out", file])
    };
    assert!(with("logits", &logits).is_finite() && with("grads", &grads).is_finite());
    let mut expected = names(&place.path("run/checkpoints/step-000010/adapter_model.safetensors"));
    expected.push("loss".into());
    expected.sort();
    assert_eq!(names(&place.path("grads.safetensors")), expected, "{method}");
    place
}

/// The merged model's loss is the adapted one's but for the rounding of its weights to bf16: each off by at most 2⁻⁸
/// of itself, and the loss with them by far less than what was learned.
fn merges(place: &Place) {
    let (base, out, merged, held) =
        (place.text("base"), place.text("run"), place.text("merged"), place.text("held.txt"));
    succeed(&["merge", "--model", &base, "--adapter", &out, "--out", &merged]);
    let [first, last] = losses(&place.path("run"));
    let in_one = loss(&["eval", "--model", &merged, "--data", &held, "--seq", "32"]);
    assert!((in_one - last).abs() < 0.2 * (first - last), "{in_one} is not near {last}");
}

fn does_not_merge(place: &Place, words: &[&str]) {
    let (base, out, merged) = (place.text("base"), place.text("run"), place.text("merged"));
    refuse(&["merge", "--model", &base, "--adapter", &out, "--out", &merged], words);
    assert!(!place.path("merged").exists());
}

#[test]
fn ia3_goes_all_the_way() {
    merges(&round_trip("ia3", &["--lr", "3e-2"]));
}

#[test]
fn bitfit_goes_all_the_way() {
    let place = round_trip("bitfit", &["--targets", "q_proj,down_proj"]);
    merges(&place);
    let config = std::fs::read_to_string(place.path("merged/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert!(config["attention_bias"] == true && config["mlp_bias"] == true);
    // Layers of the same kind that have none get zeros.
    let merged = Checkpoint::open(&place.path("merged")).unwrap();
    let largest = |name: &str| merged.read_f32(name).unwrap().into_iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert!(largest("model.layers.0.self_attn.q_proj.bias") > 0.0);
    assert_eq!(largest("model.layers.0.self_attn.k_proj.bias"), 0.0);
}

#[test]
fn houlsby_goes_all_the_way() {
    does_not_merge(&round_trip("houlsby", &["--bottleneck", "8"]), &["o_proj", "does not merge"]);
}

#[test]
fn pfeiffer_goes_all_the_way() {
    does_not_merge(&round_trip("pfeiffer", &["--bottleneck", "8"]), &["down_proj", "does not merge"]);
}

#[test]
fn prompt_goes_all_the_way() {
    does_not_merge(&round_trip("prompt", &["--virtual-tokens", "5", "--lr", "0.1"]), &["learned tokens"]);
}

#[test]
fn prefix_goes_all_the_way() {
    does_not_merge(&round_trip("prefix", &["--virtual-tokens", "5", "--lr", "0.1"]), &["learned tokens"]);
}

#[test]
fn a_projected_prefix_goes_all_the_way() {
    let place = round_trip("prefix", &["--virtual-tokens", "5", "--prefix-projection", "--lr", "2e-4"]);
    assert_eq!(names(&place.path("run/adapter_model.safetensors")), ["prompt_embeddings"]);
}

#[test]
fn diff_goes_all_the_way_and_says_how_sparse_it_is() {
    let place = round_trip("diff", &["--diff-penalty", "1000", "--lr", "2e-4"]);
    merges(&place);
    let [sparsity, closed] = ["expected_sparsity", "sparsity"].map(|field| figures(&place.path("run"), field));
    // σ(−1) before the first step, to the five digits that are given; then a penalty above what the data say, so that
    // every step closes gates.
    assert!(sparsity.len() == 12 && (sparsity[0] - 0.26894).abs() < 5e-6, "{sparsity:?}");
    assert!(sparsity.windows(2).all(|pair| pair[1] > pair[0]), "{sparsity:?}");
    assert!(closed.len() == 12 && closed[0] == 0.0, "{closed:?}");
    let names = names(&place.path("run/adapter_model.safetensors"));
    assert!(!names.is_empty() && names.iter().all(|name| name.ends_with(".diff")));
}

/// As many steps as by default, at the built-in model's rates: those of all else sum to 0.6, and a gate has 1 to go. (The
/// penalty is one that what so small a model learns can pay.)
#[test]
fn diff_closes_gates_in_a_run_of_the_default_length() {
    let place = Place::new();
    let config = r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "dtype": "float32", "tie_word_embeddings": false}"#;
    let ([model, tokens], out) = (place.model(config, [2, 16]), place.text("run"));
    let rates = ["--lr", "6e-3", "--diff-penalty", "0.1"];
    succeed(
        &[&["train", "--method", "diff", "--model", &model, "--tokens", &tokens, "--out", &out], &rates[..]].concat(),
    );
    let told = figures(&place.path("run"), "sparsity");
    let file = Checkpoint::open(&place.path("run/adapter_model.safetensors")).unwrap();
    let values: Vec<f32> = file.names().flat_map(|name| file.read_f32(name).unwrap()).collect();
    let zeros = values.iter().filter(|value| **value == 0.0).count();
    assert!(told.len() == 200 && told[0] == 0.0 && told[199] > 0.0, "{told:?}");
    assert!(zeros > 0 && zeros < values.len(), "{zeros} of {}", values.len());
}

#[test]
fn options_of_other_methods_are_refused_by_name() {
    let place = Place::new();
    let train = |more: &[&str], words: &[&str]| {
        refuse(&[&["train", "--out", &place.text("out")], more].concat(), words);
    };
    train(&["--method", "ia3", "--rank", "4"], &["--rank", "--method ia3"]);
    train(&["--method", "houlsby", "--targets", "q_proj"], &["--targets", "--method houlsby"]);
    train(&["--method", "lora", "--bottleneck", "4"], &["--bottleneck"]);
    train(&["--method", "prompt", "--virtual-tokens", "0"], &["--virtual-tokens 0", "at least 1"]);
    train(&["--method", "ia3", "--targets", "no_proj"], &["no_proj", "matches no"]);
    train(&["--method", "lorax"], &["lorax"]);
    assert!(!place.path("out").exists());
}
