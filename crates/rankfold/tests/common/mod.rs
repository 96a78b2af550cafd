//! The binary run as a user runs it, in a folder of its own.
#![allow(dead_code)] // each test file uses a part

use std::path::PathBuf;
use std::process::{Command, Output};

fn rankfold(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rankfold")).args(args).output().unwrap()
}

pub fn succeed(args: &[&str]) -> String {
    let output = rankfold(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
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
}
