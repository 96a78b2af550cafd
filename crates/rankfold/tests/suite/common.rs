//! The binary run as a user runs it, in a folder of its own.

use rankfold_backend::DType;
use rankfold_files::{Spec, Writer};
use rankfold_trainer::model::ModelConfig;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn rankfold(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).output().unwrap()
}

pub fn succeed(args: &[&str]) -> String {
    both(args)[0].clone()
}

/// What a command that succeeds says on standard output and on standard error.
pub fn both(args: &[&str]) -> [String; 2] {
    let output = rankfold(args);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
    assert!(output.status.success(), "{args:?}: {stderr}");
    [stdout, stderr]
}

/// The lines of a run's metrics.
pub fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A field of a run's metrics, of the lines that have it.
pub fn figures(run: &Path, field: &str) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line[field].as_f64()).collect()
}

/// The loss that a command says.
pub fn loss(args: &[&str]) -> f64 {
    succeed(args).strip_prefix("loss ").unwrap().split([' ', ';']).next().unwrap().parse().unwrap()
}

/// That a command ends with exit code 2 and one line that holds every one of `words`.
pub fn refuse(args: &[&str], words: &[&str]) {
    let output = rankfold(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let error: Vec<&str> = stderr.lines().filter(|line| line.starts_with("rankfold: ")).collect();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(error.len(), 1, "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(error[0].contains(word), "{args:?}: '{word}' is not in: {}", error[0]);
    }
}

/// The least memory limit that the plan says will work.
#[cfg(target_os = "linux")]
pub fn least(args: &[&str]) -> u64 {
    let said = succeed(&[&["plan"], args].concat());
    let line = said.lines().find_map(|line| line.strip_prefix("the least memory limit: ")).unwrap();
    line.split(" MiB").next().unwrap().parse::<u64>().unwrap() << 20
}

/// Start a command, and kill it when `file` is there.
pub fn kill_at(args: &[&str], file: &Path) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).spawn().unwrap();
    let begun = Instant::now();
    while !file.exists() {
        assert!(begun.elapsed() < Duration::from_secs(600) && child.try_wait().unwrap().is_none(), "killed too late");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A folder for one test, and paths in it as text.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A file with these bytes; its path.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.text(name)
    }

    /// The embedded model's folder.
    pub fn base(&self) -> String {
        let base = self.text("base");
        succeed(&["export", "--out", &base]);
        base
    }

    /// The configuration of 32 million parameters that kernels are measured on, and 4 rows of 256 tokens for it.
    pub fn small(&self) -> [String; 2] {
        let config = r#"{"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408, "rms_norm_eps": 1e-5,
            "rope_theta": 10000, "dtype": "float32", "tie_word_embeddings": false}"#;
        self.model(config, [4, 256])
    }

    /// A file of so many rows of so many of the embedded model's tokens.
    pub fn tokens(&self, [rows, seq]: [usize; 2]) -> String {
        let tensors = ["ids", "labels"].map(|name| (name.to_owned(), vec![rows, seq]));
        self.tensors("tokens.safetensors", DType::I64, &tensors, |i| (i as i64 * 31 % 200).to_le_bytes());
        self.text("tokens.safetensors")
    }

    /// A model's folder by its configuration, and a file of so many rows of so many of its tokens.
    pub fn model(&self, config: &str, [rows, seq]: [usize; 2]) -> [String; 2] {
        std::fs::create_dir(self.path("small")).unwrap();
        let config = ModelConfig::parse(config, Path::new(&self.file("small/config.json", config))).unwrap();
        // Numbers between ±1/16, no two neighbours alike.
        let weight = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) as i32 as f32 / 34_359_738_368.0).to_le_bytes();
        self.tensors("small/model.safetensors", DType::F32, &config.tensors(), weight);
        let ids = [("ids".to_owned(), vec![rows, seq]), ("labels".to_owned(), vec![rows, seq])];
        let vocab = config.vocab as i64;
        self.tensors("tokens.safetensors", DType::I64, &ids, |i| (i as i64 * 31 % vocab).to_le_bytes());
        [self.text("small"), self.text("tokens.safetensors")]
    }

    /// A safetensors file whose tensors' elements are a function of their number.
    fn tensors<const BYTES: usize>(
        &self,
        name: &str,
        dtype: DType,
        tensors: &[(String, Vec<usize>)],
        value: impl Fn(usize) -> [u8; BYTES],
    ) {
        let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, dtype, &**shape)).collect();
        let mut writer = Writer::create(&self.path(name), specs).unwrap();
        for (name, shape) in tensors {
            writer.write(name, &(0..shape.iter().product()).flat_map(&value).collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
    }
}
