//! Compiled kernels on disk, by a hash of all that they depend on: compiling takes seconds, reading milliseconds.

use super::nvrtc::{Compiled, Nvrtc};
use crate::{Result, Source};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::{env, fs, process};

/// Where cubins are kept: none where the user has no home.
fn folder() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Some(cache.or_else(home)?.join("rankfold").join("kernels"))
}

/// A source's cubin for an architecture, compiled where it is not kept. That it cannot be kept is no error.
pub(super) fn cubin(nvrtc: Nvrtc, source: &Source, architecture: &str) -> Result<Vec<u8>> {
    let mut hasher = DefaultHasher::new();
    nvrtc.recipe(source, architecture).hash(&mut hasher);
    let name = format!("{}-{architecture}-{:016x}.cubin", source.file, hasher.finish());
    let path = folder().map(|folder| folder.join(name));
    if let Some(kept) = path.as_ref().and_then(|path| fs::read(path).ok()).and_then(whole) {
        return Ok(kept);
    }
    let Compiled { cubin, .. } = nvrtc.compile(source, architecture)?;
    if let Some(path) = path {
        keep(&path, &cubin);
    }
    Ok(cubin)
}

/// What [`keep`] wrote, without its checksum, where that is right: a file may have been cut short.
fn whole(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let start = bytes.len().checked_sub(8)?;
    let sum = u64::from_le_bytes(bytes.split_off(start).try_into().ok()?);
    (sum == checksum(&bytes)).then_some(bytes)
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Under another name first, so that nobody reads half of it.
fn keep(path: &std::path::Path, cubin: &[u8]) {
    let whole = [cubin, &checksum(cubin).to_le_bytes()].concat();
    let part = path.with_extension(format!("{}.part", process::id()));
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    let kept = folder.and_then(|()| fs::write(&part, whole)).and_then(|()| fs::rename(&part, path));
    if kept.is_err() {
        // Whatever is left of it is of no use.
        let _ = fs::remove_file(&part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep").join("kernel.cubin");
        keep(&path, b"code");
        let kept = fs::read(&path).unwrap();
        assert_eq!(whole(kept.clone()).unwrap(), b"code");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        for cut in 0..kept.len() {
            assert!(whole(kept[..cut].to_vec()).is_none());
        }
        let flipped = [&kept[..1], &[kept[1] ^ 1], &kept[2..]].concat();
        assert!(whole(flipped).is_none());
    }
}
