//! Devices as a user meets them: training and generating on the CUDA kernels on the host, and what is said where a GPU,
//! its driver or its compiler is missing, too old or too small. The last are played by small libraries (`fakes/`) that
//! the system finds before any others.

use crate::common::{Place, figures, refuse, succeed};
use std::path::Path;
use std::process::Command;

/// A tiny model: the trainer's golden one.
fn tiny() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden");
    folder.join("tiny-llama").to_str().unwrap().to_owned()
}

fn vectors() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden");
    folder.join("tiny-llama-io.safetensors").to_str().unwrap().to_owned()
}

fn adapter(place: &Place, run: &str) -> Vec<u8> {
    std::fs::read(place.path(run).join("adapter_model.safetensors")).unwrap()
}

fn losses(place: &Place, run: &str) -> Vec<f64> {
    figures(&place.path(run), "loss")
}

/// Four steps of QLoRA on the tiny model; what differs is appended.
fn train(out: &str, more: &[&str]) {
    let (model, tokens) = (tiny(), vectors());
    let common =
        ["train", "--model", &model, "--tokens", &tokens, "--quantize", "nf4", "--double-quant", "--steps", "4"];
    succeed(&[&common[..], &["--rank", "4", "--lr", "1e-2", "--checkpoint-every", "2", "--out", out], more].concat());
}

#[test]
fn cuda_on_the_host_trains_as_the_cpu_does_on_any_number_of_threads() {
    let place = Place::new();
    train(&place.text("cpu"), &[]);
    for (name, threads) in [("one", "1"), ("two", "2")] {
        train(&place.text(name), &["--device", "cuda-host", "--threads", threads]);
    }
    assert!(adapter(&place, "one") == adapter(&place, "two"), "two threads give other bits than one");
    let (cpu, cuda) = (losses(&place, "cpu"), losses(&place, "one"));
    assert!(cpu.len() == 4 && cpu[3] < cpu[0]);
    // What golden/README asks of a trajectory.
    assert!(cpu.iter().zip(&cuda).all(|(a, b)| (a - b).abs() < 1e-3), "{cpu:?} {cuda:?}");
}

#[test]
fn a_run_on_cuda_goes_on_where_it_stopped_and_nowhere_else() {
    let place = Place::new();
    let (whole, part) = (place.text("whole"), place.text("part"));
    train(&whole, &["--device", "cuda-host"]);
    train(&part, &["--device", "cuda-host"]);
    for product in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(place.path("part").join(product)).unwrap();
    }
    refuse(&["train", "--out", &part, "--resume", "--device", "cpu"], &["device", "cuda-host"]);
    succeed(&["train", "--out", &part, "--resume"]);
    assert!(adapter(&place, "whole") == adapter(&place, "part"));
}

#[test]
fn bf16_products_train_as_f32_ones_do_nearly() {
    let place = Place::new();
    for (i, device) in [&["cuda-host"][..], &["cpu"], &["cpu", "--isa", "portable"]].into_iter().enumerate() {
        let of = |compute: &str| {
            let run = format!("{compute}-{i}");
            train(&place.text(&run), &[&["--compute", compute, "--device"], device].concat());
            losses(&place, &run)
        };
        let (f32, bf16) = (of("f32"), of("bf16"));
        assert!(f32 != bf16, "{device:?}: bf16 changes nothing");
        // A product's inputs lose up to 2⁻⁸ of themselves, the loss of a few layers of them no more than a few times that.
        assert!(f32.iter().zip(&bf16).all(|(a, b)| (a - b).abs() < 0.02 * a), "{device:?}: {f32:?} {bf16:?}");
    }
}

/// Measured on 200 steps of the default run, AMD EPYC Zen 4: 3.1998 and 3.1995.
#[test]
fn the_built_in_run_in_bf16_ends_within_half_a_percent_of_f32() {
    let place = Place::new();
    let held_out = |compute: &str| {
        let out = place.text(compute);
        succeed(&["train", "--steps", "12", "--batch", "4", "--seq", "64", "--compute", compute, "--out", &out]);
        *figures(&place.path(compute), "eval_loss").last().unwrap()
    };
    let (f32, bf16) = (held_out("f32"), held_out("bf16"));
    assert!(f32 != bf16 && (f32 - bf16).abs() < 0.005 * f32, "{f32} in f32, {bf16} in bf16");
}

/// A million parameters with their gradients and moments, on a device that has room for half of what they take.
#[test]
fn training_on_half_of_the_device_has_the_bits_of_training_on_all() {
    let place = Place::new();
    let config = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384, "rms_norm_eps": 1e-5,
        "rope_theta": 10000, "dtype": "float32", "tie_word_embeddings": false}"#;
    let [model, tokens] = place.model(config, [2, 32]);
    let run = |name: &str, more: &[&str]| {
        let out = place.text(name);
        let common = ["train", "--model", &model, "--tokens", &tokens, "--method", "full", "--steps", "3"];
        let args = [&common[..], &["--device", "cuda-host", "--out", &out], more].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (std::fs::read(place.path(name).join("model.safetensors")).unwrap(), said)
    };
    let (free, _) = run("free", &[]);
    let (all, said) = run("all", &["--memory-limit", "1GiB"]);
    let (_, taken) = said.split_once("nothing was paged: ").unwrap();
    let taken: f64 = taken.split_once(" MiB of buffers at the most").unwrap().0.parse().unwrap();
    let (half, said) = run("half", &["--memory-limit", &format!("{}MiB", taken / 2.0)]);
    assert!(said.contains("the device's memory: paged: "), "{said}");
    assert!(free == all && all == half, "other bits on {} MiB of {taken}", taken / 2.0);
}

/// A machine that has some of NVIDIA's libraries.
struct Machine {
    place: Place,
    environment: Vec<(&'static str, &'static str)>,
}

impl Machine {
    fn with(libraries: &[&str], environment: &[(&'static str, &'static str)]) -> Self {
        let place = Place::new();
        for library in libraries {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes").join(format!("{library}.c"));
            let object = place.path(&format!("lib{library}.so"));
            let compiled = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(object).arg(source).status();
            assert!(compiled.unwrap().success(), "{library}.c does not compile");
        }
        Self { place, environment: environment.to_vec() }
    }

    /// That training on its GPU ends in one line with every one of `words`.
    fn refuses(&self, words: &[&str]) {
        let (model, tokens) = (tiny(), vectors());
        let output = Command::new(env!("CARGO_BIN_EXE_rankfold"))
            .args(["train", "--device", "cuda", "--steps", "1", "--model", &model, "--tokens", &tokens])
            .args(["--out", &self.place.text("run")])
            .env("LD_LIBRARY_PATH", self.place.text(""))
            .env("XDG_CACHE_HOME", self.place.text("cache"))
            .envs(self.environment.iter().copied())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(last.starts_with("rankfold: ") && !stderr.contains("panicked"), "{stderr}");
        for word in words {
            assert!(last.contains(word), "'{word}' is not in: {last}");
        }
    }
}

#[test]
fn what_a_gpu_lacks_is_said_in_one_line() {
    let both = &["cuda", "nvrtc"][..];
    if !Path::new("/proc/driver/nvidia").exists() {
        Machine::with(&[], &[]).refuses(&["no NVIDIA driver"]);
        Machine::with(&["cuda"], &[]).refuses(&["NVRTC", "LD_LIBRARY_PATH"]);
    }
    for (environment, words) in [
        (("FAKE_INIT", "100"), &["finds no GPU", "no CUDA-capable device"][..]),
        (("FAKE_DEVICES", "0"), &["finds no GPU"]),
        (("FAKE_DRIVER", "12020"), &["CUDA 12.2", "expected 12.8"]),
        (("FAKE_NVRTC", "14"), &["NVRTC is of CUDA 14.0", "driver of CUDA 13.0"]),
        (("FAKE_CAPABILITY", "75"), &["Fake GPU", "7.5", "expected 8.0"]),
        (("FAKE_CAPABILITY", "129"), &["sm_129", "Fake GPU"]),
        (("FAKE_MEMORY", "1000"), &["bytes of device memory were asked for, 1000 are free", "--batch"]),
    ] {
        Machine::with(both, &[environment]).refuses(words);
    }
}

#[test]
fn a_kernel_that_does_not_compile_shows_the_compilers_log() {
    Machine::with(&["cuda", "nvrtc"], &[]).refuses(&["does not compile", "kernel.cu(7)", "\"y\" is undefined"]);
}
