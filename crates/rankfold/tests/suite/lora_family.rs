//! What LoRA's relatives add to a run: starts out of the base, LoRA+, ranks by pattern, what is trained beside.

use crate::common::{self, Place, both, figures, refuse, succeed};
use rankfold_files::Checkpoint;
use std::path::Path;

/// A small model with biases on q, k and v, and a batch.
const MODEL: &str = r#"{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 96,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "dtype": "float32", "tie_word_embeddings": false}"#;

struct Small {
    place: Place,
    model: String,
    tokens: String,
}

impl Small {
    fn new(config: &str) -> Self {
        let place = Place::new();
        let [model, tokens] = place.model(config, [2, 16]);
        Self { place, model, tokens }
    }

    /// Six steps; what differs is appended. Its folder.
    fn train(&self, out: &str, more: &[&str]) -> String {
        let out = self.place.text(out);
        succeed(&[&self.args(&out)[..], more].concat());
        out
    }

    fn args<'a>(&'a self, out: &'a str) -> [&'a str; 13] {
        let Self { model, tokens, .. } = self;
        let common = ["train", "--steps", "6", "--lr", "1e-3", "--checkpoint-every", "2", "--model", model];
        let rest = ["--tokens", tokens, "--out", out];
        std::array::from_fn(|i| if i < 9 { common[i] } else { rest[i - 9] })
    }

    /// The loss of a model on the batch.
    fn loss(&self, args: &[&str]) -> f64 {
        common::loss(&[&["eval", "--compute", "f32", "--tokens", &self.tokens], args].concat())
    }
}

fn tensors(folder: &str) -> Vec<u8> {
    std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap()
}

fn config(folder: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(Path::new(folder).join("adapter_config.json")).unwrap()).unwrap()
}

/// The losses of the steps.
fn losses(folder: &str) -> Vec<f64> {
    figures(Path::new(folder), "loss")
}

/// Take its product away from a run and let it go on from its last checkpoint, on another number of threads; what it
/// then says of its progress.
fn finish_again(folder: &str) -> String {
    for product in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(Path::new(folder).join(product)).unwrap();
    }
    let [_, said] = both(&["train", "--out", folder, "--resume", "--threads", "3"]);
    said
}

#[test]
fn a_run_that_begins_as_a_part_of_its_base_goes_on_with_the_same_bits_and_is_a_plain_lora_to_others() {
    let small = Small::new(MODEL);
    let before = small.loss(&["--model", &small.model]);
    for init in ["pissa", "olora"] {
        let flags = ["--init", init, "--rank", "4", "--rank-pattern", "q_proj=2,down_proj=6"];
        let out = small.train(init, &[&flags[..], &["--threads", "2"]].concat());
        let alone = small.train(&format!("{init}-alone"), &[&flags[..], &["--threads", "1"]].concat());
        assert!(tensors(&out) == tensors(&alone), "{init}: one thread gives other bits");
        let written = config(&out);
        assert_eq!((&written["r"], &written["init_lora_weights"]), (&8.into(), &true.into()));
        assert_eq!((&written["lora_alpha"], &written["rank_pattern"]["q_proj"]), (&8.into(), &4.into()));
        // Both losses are sums in f32 of a few thousand terms of at most a few units: 1e-4 is far above their rounding,
        // and far below what a start that is off by any of its parts would give.
        let losses = losses(&out);
        assert!((losses[0] - before).abs() < 1e-4, "{init} begins at {}, the base at {before}", losses[0]);
        assert!(losses[5] < losses[0]);
        let after = small.loss(&["--model", &small.model, "--adapter", &out]);
        assert!(after < losses[5], "{init}: the adapter on the original base is at {after}, the run at {losses:?}");
        // In a checkpoint the update is of what is left of the base, and no plain adapter on the whole of it.
        let (checkpoint, plain) = (format!("{out}/checkpoints/step-000004"), small.place.text("plain"));
        let merge = ["merge", "--model", &small.model, "--as-adapter", "--out", &plain, "--adapter"];
        refuse(&[&merge[..], &[&checkpoint]].concat(), &["--as-adapter", "leave the base as it is"]);
        let whole = tensors(&out);
        finish_again(&out);
        assert!(whole == tensors(&out), "{init}: a resumed run has other bits");
    }
    let out = small.place.text("no");
    let args = |more: &[&'static str]| [&small.args(&out)[..], more].concat();
    refuse(&args(&["--init", "olora", "--rank", "33"]), &["r' is 33"]);
    refuse(&args(&["--init", "pizza"]), &["pizza"]);
}

#[test]
fn a_run_that_makes_its_base_in_4_bits_keeps_it_and_goes_on_with_the_same_bits() {
    let small = Small::new(MODEL);
    let no = small.place.text("no");
    let cases: [(&str, &str, &[&str]); 5] = [
        ("loftq", "nf4", &["--init", "loftq", "--loftq-iter", "3"]),
        ("loftq-int4", "int4", &["--init", "loftq", "--quantize", "int4", "--double-quant"]),
        ("pissa", "nf4", &["--init", "pissa", "--quantize", "nf4"]),
        ("pissa-fp4", "fp4", &["--init", "pissa", "--quantize", "fp4", "--double-quant", "--method", "dora"]),
        ("olora", "nf4", &["--init", "olora", "--quantize", "nf4", "--double-quant"]),
    ];
    for (name, format, flags) in cases {
        let flags = [flags, &["--rank", "8", "--seed", "3"]].concat();
        let out = small.train(name, &flags);
        let base = format!("{out}/base");
        let written = config(&out);
        assert_eq!(written["base_model_name_or_path"], base.as_str());
        assert_eq!((&written["init_lora_weights"], &written["r"]), (&true.into(), &8.into()), "{name}");
        // Of the loss before the last step the adapter is one step ahead.
        let after = small.loss(&["--model", &base, "--adapter", &out]);
        assert!(after < losses(&out)[5], "{name}: {after} {:?}", losses(&out));
        assert!(succeed(&["inspect", &base]).contains(format), "{name}");
        let whole = tensors(&out);
        let said = finish_again(&out);
        assert!(!said.contains("was made for"), "{said}");
        assert!(whole == tensors(&out), "{name}: a resumed run has other bits");
        // The matrix that was quantised is in no 4-bit checkpoint; what OLoRA takes of one is what is there.
        let again = [&["--model", &base][..], &flags].concat();
        match name {
            "olora" => {
                let again = small.train("again", &again);
                assert!(losses(&again)[5] < losses(&again)[0]);
                assert!(Path::new(&again).join("base/model.safetensors").exists());
            }
            _ => refuse(&[&small.args(&no)[..], &again].concat(), &["base", "q_proj"]),
        }
    }
    refuse(&[&small.args(&no)[..], &["--init", "loftq", "--quantize", "none"]].concat(), &["--quantize", "nf4"]);
}

/// A folder that PEFT's OLoRA left on a base in 4 bits: what is trained on from it has a base of its own as well.
#[test]
fn an_olora_that_is_trained_on_in_4_bits_leaves_its_base_too() {
    let small = Small::new(MODEL);
    let dense = small.train("dense", &["--init", "olora", "--rank", "4"]);
    let begun = format!("{dense}/checkpoints/step-000004");
    let four = ["--init-adapter", &begun, "--quantize", "nf4"];
    let out = small.train("out", &four);
    let (base, whole) = (format!("{out}/base"), tensors(&out));
    assert_eq!((&config(&out)["r"], &config(&out)["init_lora_weights"]), (&4.into(), &true.into()));
    let after = small.loss(&["--model", &base, "--adapter", &out]);
    assert!(after < losses(&out)[5], "{after} {:?}", losses(&out));
    finish_again(&out);
    assert!(whole == tensors(&out), "a resumed run has other bits");
    // On its own base the folder is as any other, and no sum is made of it where it makes one.
    let eval = ["eval", "--tokens", &small.tokens, "--model", &small.model, "--quantize", "nf4", "--weight", "2"];
    refuse(&[&eval[..], &["--adapter", &begun]].concat(), &["step-000004", "no sum", "base was made"]);
}

#[test]
fn a_base_that_an_adapter_was_not_made_for_is_warned_of() {
    let small = Small::new(MODEL);
    let [one, other] = ["one", "other"].map(|out| small.train(out, &["--init", "loftq", "--rank", "4"]));
    let plain = small.train("plain", &["--rank", "4"]);
    let warned = |model: &str, adapter: &str| {
        let eval = ["eval", "--tokens", &small.tokens, "--model", model, "--adapter", adapter];
        both(&eval)[1].contains("the adapter was made for")
    };
    let [ones, others] = [&one, &other].map(|run| format!("{run}/base"));
    assert!(!warned(&ones, &one) && warned(&others, &one), "each LoftQ base is its own run's");
    assert!(!warned(&small.model, &plain) && warned(&ones, &plain));
    // The embedded model has a name as well.
    let (builtin, exported) = (small.place.text("builtin"), small.place.base());
    succeed(&["train", "--steps", "1", "--batch", "1", "--seq", "16", "--out", &builtin]);
    let tokens = small.place.tokens([1, 16]);
    let said = |model: &str| both(&["eval", "--tokens", &tokens, "--model", model, "--adapter", &builtin])[1].clone();
    assert!(!said("builtin").contains("was made for") && said(&exported).contains("made for 'builtin'"));
}

/// LoftQ's A and B make up for what its own 4 bits lost, and for no others'.
#[test]
fn an_adapter_of_loftqs_is_refused_on_4_bits_that_are_made_while_reading() {
    let small = Small::new(MODEL);
    let out = small.train("loftq", &["--init", "loftq", "--rank", "4"]);
    let (begun, base) = (format!("{out}/checkpoints/step-000004"), format!("{out}/base"));
    assert_eq!(config(&begun)["init_lora_weights"], "loftq");
    let eval = ["eval", "--tokens", &small.tokens, "--adapter", &begun, "--model"];
    for format in ["nf4", "fp4"] {
        let made = [&eval[..], &[&small.model, "--quantize", format]].concat();
        refuse(&made, &[&begun, "loftq", "that base as it is stored"]);
    }
    succeed(&[&eval[..], &[&base]].concat());
}

#[test]
fn lora_plus_of_1_changes_nothing_and_another_is_kept_by_a_resumed_run() {
    let small = Small::new(MODEL);
    let plain = small.train("plain", &[]);
    let one = small.train("one", &["--lora-plus", "1"]);
    assert!(tensors(&plain) == tensors(&one));
    let out = small.train("out", &["--lora-plus", "16"]);
    let whole = tensors(&out);
    assert!(whole != tensors(&one));
    assert!(std::fs::read_to_string(format!("{out}/run.toml")).unwrap().contains("lora-plus = 16"));
    finish_again(&out);
    assert!(whole == tensors(&out), "a resumed run has other bits");
    refuse(&["train", "--out", &out, "--resume", "--lora-plus", "4"], &["lora-plus", "16"]);
    refuse(
        &[&small.args(&small.place.text("no"))[..], &["--lora-plus", "-1"]].concat(),
        &["--lora-plus -1", "positive"],
    );
}

#[test]
fn patterns_biases_and_saved_modules_are_written_counted_and_used() {
    let small = Small::new(MODEL);
    let flags = ["--rank", "4", "--rank-pattern", "q_proj=2,layers.1.mlp.down_proj=7", "--alpha-pattern", "k_proj=3.5"];
    let beside = ["--bias", "all", "--modules-to-save", "lm_head,embed_tokens,model.norm"];
    let out = small.train("out", &[&flags[..], &beside].concat());
    let written = config(&out);
    assert_eq!((&written["bias"], &written["alpha_pattern"]["k_proj"]), (&"all".into(), &3.5.into()));
    assert_eq!(written["modules_to_save"], serde_json::json!(["lm_head", "embed_tokens", "model.norm"]));
    let file = Checkpoint::open(&Path::new(&out).join("adapter_model.safetensors")).unwrap();
    let shape = |name: &str| file.info(&format!("base_model.model.{name}")).unwrap().shape.clone();
    assert_eq!(shape("model.layers.0.self_attn.q_proj.lora_A.weight"), [2, 32]);
    assert_eq!(shape("model.layers.1.mlp.down_proj.lora_B.weight"), [32, 7]);
    assert_eq!(shape("model.layers.1.self_attn.k_proj.base_layer.bias"), [16]);
    assert_eq!(shape("lm_head.weight"), [96, 32]);
    assert_eq!(shape("model.embed_tokens.weight"), [96, 32]);
    assert_eq!(shape("model.norm.weight"), [32]);

    let json = small.place.text("plan.json");
    let plan = ["plan", "--model", &small.model, "--tokens", &small.tokens, "--json", &json];
    succeed(&[&plan[..], &flags, &beside].concat());
    let plan: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let elements: usize = file.names().map(|name| file.info(name).unwrap().elements()).sum();
    let parameters = &plan["plan"]["parameters"];
    assert_eq!(parameters["trained"], elements);
    // The run says the same share: what is trained of the base is not counted twice.
    let all = parameters["frozen"].as_u64().unwrap() as usize + elements;
    let [_, said] = both(&[&small.args(&small.place.text("again"))[..], &flags, &beside].concat());
    let share = format!("({:.2} %)", 100.0 * elements as f64 / all as f64);
    assert!(said.lines().any(|line| line.starts_with("training ") && line.ends_with(&share)), "{share}: {said}");

    let adapted = small.loss(&["--model", &small.model, "--adapter", &out]);
    assert!(adapted < losses(&out)[5]);
    let merged = small.place.text("merged");
    succeed(&["merge", "--model", &small.model, "--adapter", &out, "--out", &merged]);
    // f32 weights: each is off by a few roundings, as above.
    assert!((small.loss(&["--model", &merged]) - adapted).abs() < 1e-4);
    let whole = tensors(&out);
    finish_again(&out);
    assert!(whole == tensors(&out), "a resumed run has other bits");

    let no = small.place.text("no");
    let refused = |more: &[&str], words: &[&str]| refuse(&[&small.args(&no)[..], more].concat(), words);
    refused(&["--rank-pattern", "q_proj"], &["--rank-pattern 'q_proj'", "NAME=NUMBER"]);
    refused(&["--alpha-pattern", "=2"], &["--alpha-pattern '=2'"]);
    refused(&["--rank-pattern", "(=2"], &["rank_pattern", "regular expression"]);
    refused(&["--modules-to-save", "q_proj"], &["modules_to_save", "q_proj", "lm_head"]);
    refused(&["--bias", "some"], &["some", "lora_only"]);
}

/// In the architecture of the model, whatever it is; as the folder of PEFT would say it.
#[test]
fn pefts_own_targets_are_asked_for_by_name() {
    let small = Small::new(MODEL);
    for (method, expected) in [("lora", ["q_proj", "v_proj"].as_slice()), ("ia3", &["down_proj", "q_proj", "v_proj"])] {
        let out = small.train(method, &["--method", method, "--targets", "peft-default"]);
        assert_eq!(config(&out)["target_modules"], serde_json::json!(expected), "{method}");
    }
}

#[test]
fn a_head_that_is_the_embedding_is_not_saved_as_one_of_the_two() {
    let small = Small::new(&MODEL.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true"));
    let out = small.place.text("no");
    for module in ["lm_head", "embed_tokens"] {
        refuse(
            &[&small.args(&out)[..], &["--modules-to-save", module]].concat(),
            &["modules_to_save", "none of the two"],
        );
    }
    // Nor taken from a folder, which is named.
    let untied = Small::new(MODEL);
    let head = untied.train("head", &["--modules-to-save", "lm_head"]);
    let eval = ["eval", "--model", &small.model, "--tokens", &small.tokens, "--adapter", &head];
    refuse(&eval, &[&head, "modules_to_save", "none of the two"]);
}
