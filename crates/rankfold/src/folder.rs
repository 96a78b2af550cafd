//! The folder of a run: whose it is, and what may be done with it.

use crate::error::{Error, Result};
use crate::options::Options;
use std::path::{Path, PathBuf};

/// The folder of the base that a run made, where its adapter belongs to no other.
pub const BASE: &str = "base";

/// What a run writes at its folder's top; nothing else is ever removed.
const OWN: [&str; 13] = [
    "metrics.jsonl",
    "report.html",
    "profile.json",
    "trace.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "checkpoints",
    BASE,
    // Last: a removal that was interrupted can be gone on with, as the folder still says that it is a run's.
    "run.toml",
];

/// Make `runs/001`, or the first that is not there: of two runs that start at once, each gets its own.
pub fn first_free(runs: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(runs).map_err(Error::io(runs))?;
    for path in (1u32..).map(|n| runs.join(format!("{n:03}"))) {
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
    }
    Err(Error::Usage("no free number is left in runs".into()))
}

/// Whether the run's product is there: it appears at the end.
pub fn is_finished(folder: &Path) -> bool {
    is_run(folder) && (folder.join("adapter_config.json").exists() || folder.join("config.json").exists())
}

/// Whether a run was started in it.
fn is_run(folder: &Path) -> bool {
    folder.join("run.toml").exists()
}

/// That the folder may become ours: it is new or empty, or the run to resume, or a run to remove.
pub fn refuse_taken(folder: &Path, resume: bool, overwrite: bool) -> Result<()> {
    let is_free = match std::fs::read_dir(folder) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) => return Err(Error::io(folder)(e)),
    };
    if is_free || ((resume || overwrite) && is_run(folder)) {
        return Ok(());
    }
    let why = match (resume, overwrite) {
        (true, _) => "it holds something that is no run: expected a run's folder, or an empty one, for --resume",
        (_, true) => "it holds something that is no run: --overwrite removes runs only",
        _ => "it holds another run: expected an empty folder, --resume or --overwrite",
    };
    Err(Error::Path { path: folder.to_owned(), why: why.into() })
}

/// Make the folder ours, as [`refuse_taken`] allows; an overwritten run is removed.
pub fn claim(folder: &Path, resume: bool, overwrite: bool) -> Result<()> {
    refuse_taken(folder, resume, overwrite)?;
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    if !overwrite {
        return Ok(());
    }
    for name in OWN {
        let path = folder.join(name);
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(path)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// The options of the run in `folder`, which those given must not contradict; the given ones where there is no run.
pub fn options_to_resume(folder: &Path, given: &Options) -> Result<Options> {
    let path = folder.join("run.toml");
    if !path.exists() {
        return given.clone().or(given.defaults());
    }
    // Where pages go changes no result, and may be what made the run stop.
    let kept = Options::read(&path)?.paged_as(given);
    match given.first_difference(&kept)? {
        None => Ok(kept),
        Some((key, now, then)) => {
            let why = format!("--{key} is {now}, but the run to resume has {then}: expected the run's own options");
            Err(Error::Path { path, why })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_anything_in_it_is_only_taken_with_a_word_for_it() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        claim(&run, false, false).unwrap();
        std::fs::write(run.join("notes.txt"), "mine").unwrap();
        assert!(claim(&run, false, false).is_err());
        assert!(claim(&run, false, true).unwrap_err().to_string().contains("no run"));
        assert!(claim(&run, true, false).unwrap_err().to_string().contains("no run"));
        std::fs::write(run.join("run.toml"), "").unwrap();
        std::fs::create_dir(run.join("checkpoints")).unwrap();
        claim(&run, true, false).unwrap();
        assert!(run.join("checkpoints").exists());
        claim(&run, false, true).unwrap();
        assert!(!run.join("checkpoints").exists() && run.join("notes.txt").exists());
    }
}
