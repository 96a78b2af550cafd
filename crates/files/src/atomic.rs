//! Files and folders that appear complete or not at all.
//!
//! Bytes go to a temporary beside the target; it is synchronised to the disk, renamed over the target (which the
//! operating system does in one step) and the folder that holds both names is synchronised too. Whatever fails or
//! dies on the way, the target is what it was before. A temporary that is not committed is removed. One that a killed
//! process left (`.NAME.PID-N.tmp`) is removed by the next that writes the same target: a living owner holds a lock
//! on it, and a lock dies with its process.

use crate::{Error, Result};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// Write `bytes` as the whole file at `path`, replacing what was there.
///
/// Errors: a folder that is missing or not writable, a full disk; the file that was there is then untouched.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let staged = StagedFile::create(path)?;
    staged.write_all_at(bytes, 0)?;
    staged.commit()
}

/// Where a temporary's bytes go: a file, or in tests one whose disk is full.
pub(crate) trait Disk: Send + Sync + std::fmt::Debug {
    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()>;
    fn sync_all(&self) -> io::Result<()>;
}

impl Disk for File {
    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, position)
    }

    fn sync_all(&self) -> io::Result<()> {
        Self::sync_all(self)
    }
}

/// A file that is not there yet.
#[derive(Debug)]
pub(crate) struct StagedFile {
    target: PathBuf,
    temporary: Temporary,
    disk: Box<dyn Disk>,
}

impl StagedFile {
    pub(crate) fn create(target: &Path) -> Result<Self> {
        Self::create_on(target, |file| Box::new(file))
    }

    /// The same, its bytes going through what `disk` makes of the file.
    pub(crate) fn create_on(target: &Path, disk: impl FnOnce(File) -> Box<dyn Disk>) -> Result<Self> {
        let path = temporary_beside(target)?;
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(Error::io(target, "create a file beside"))?;
        Ok(Self { target: target.into(), temporary: Temporary::own(path), disk: disk(file) })
    }

    /// The path that the file will have.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], position: u64) -> Result<()> {
        self.disk.write_all_at(bytes, position).map_err(Error::io(&self.target, "write"))
    }

    pub(crate) fn commit(self) -> Result<()> {
        self.disk.sync_all().map_err(Error::io(&self.target, "write"))?;
        self.temporary.rename_to(&self.target)
    }
}

/// A folder that is not there yet: fill [`StagedFolder::path`], then [`StagedFolder::commit`].
#[derive(Debug)]
pub struct StagedFolder {
    target: PathBuf,
    temporary: Temporary,
}

impl StagedFolder {
    /// A temporary folder beside `target`.
    ///
    /// Errors: a target that exists; a parent that is missing or not writable.
    pub fn create(target: &Path) -> Result<Self> {
        refuse_existing(target)?;
        let path = temporary_beside(target)?;
        fs::create_dir(&path).map_err(Error::io(target, "create a folder beside"))?;
        Ok(Self { target: target.into(), temporary: Temporary::own(path) })
    }

    /// Where to write the folder's files, with [`write_atomically`] and [`crate::Writer`], which synchronise them.
    pub fn path(&self) -> &Path {
        &self.temporary.path
    }

    /// Give the folder its name. Without this it is removed with all that is in it.
    pub fn commit(self) -> Result<()> {
        refuse_existing(&self.target)?;
        sync_folder(&self.temporary.path, &self.target)?;
        self.temporary.rename_to(&self.target)
    }
}

fn refuse_existing(target: &Path) -> Result<()> {
    match target.symlink_metadata() {
        Ok(_) => Err(Error::Exists { path: target.into() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(target, "look at")(e)),
    }
}

/// A path that is removed when dropped, unless it was renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    is_renamed: bool,
    /// Held for the lock alone, which tells other processes that this temporary is alive.
    _lock: Option<File>,
}

impl Temporary {
    /// Own a file or folder that was just made.
    fn own(path: PathBuf) -> Self {
        // Where a file system has no locks, nothing is ever found unlocked and removed.
        let lock = File::open(&path).ok().filter(|file| file.try_lock().is_ok());
        Self { path, is_renamed: false, _lock: lock }
    }

    fn rename_to(mut self, target: &Path) -> Result<()> {
        fs::rename(&self.path, target).map_err(Error::io(target, "rename the finished temporary to"))?;
        self.is_renamed = true;
        sync_folder(parent(target), target)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.is_renamed {
            remove(&self.path);
        }
    }
}

/// A failure here has no one to be told: the error that led here is already on its way.
fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Make the folder's names durable; `target` is whom an error concerns.
fn sync_folder(folder: &Path, target: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(target, "synchronise the folder of"))
}

/// A new name beside the target; what dead processes left under such names is removed.
fn temporary_beside(target: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = target.file_name() else {
        return Err(Error::io(target, "write")(io::ErrorKind::InvalidFilename.into()));
    };
    let name = name.to_string_lossy();
    for entry in fs::read_dir(parent(target)).into_iter().flatten().flatten() {
        let is_dead = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if is_temporary_of(&name, &entry.file_name()) && is_dead() {
            remove(&entry.path());
        }
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(parent(target).join(format!(".{name}.{}-{count}.tmp", process::id())))
}

/// Whether `entry` is `.NAME.PID-N.tmp`.
fn is_temporary_of(name: &str, entry: &OsStr) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = || entry.to_str()?.strip_prefix('.')?.strip_prefix(name)?.strip_prefix('.')?.strip_suffix(".tmp");
    numbers().and_then(|numbers| numbers.split_once('-')).is_some_and(|(pid, n)| is_number(pid) && is_number(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for bytes in [&b"longer than the next"[..], b"short", b""] {
            write_atomically(&path, bytes).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes);
            assert_eq!(names(folder.path()), ["config.json"]);
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (file, inner) = (folder.path().join("file"), folder.path().join("folder"));
        fs::write(&file, "whole").unwrap();
        fs::create_dir(&inner).unwrap();
        for target in [folder.path().join("missing/x"), file.join("x"), inner.clone(), "..".into()] {
            let error = write_atomically(&target, b"y").unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: cannot ", target.display())), "{error}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"whole");
        assert_eq!(names(folder.path()).len(), 2);
        assert!(names(&inner).is_empty());
    }

    #[test]
    fn a_folder_appears_with_all_its_files_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("step-10");

        let staged = StagedFolder::create(&target).unwrap();
        write_atomically(&staged.path().join("a"), b"1").unwrap();
        assert!(!target.exists());
        drop(staged);
        assert!(names(folder.path()).is_empty());

        let staged = StagedFolder::create(&target).unwrap();
        let rival = StagedFolder::create(&target).unwrap();
        write_atomically(&staged.path().join("a"), b"2").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"2");
        assert!(matches!(rival.commit(), Err(Error::Exists { path }) if path == target));
        assert!(matches!(StagedFolder::create(&target), Err(Error::Exists { path }) if path == target));
        assert_eq!(names(folder.path()), ["step-10"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let alive = StagedFile::create(&path("x")).unwrap();
        for other in [".y.1-2.tmp", ".x.1-.tmp", ".x.1-2", "x.1-2.tmp", ".x.y.1-2.tmp"] {
            fs::write(path(other), "kept").unwrap();
        }
        fs::write(path(".x.1-2.tmp"), "left").unwrap();
        fs::create_dir(path(".x.1-3.tmp")).unwrap();
        fs::write(path(".x.1-3.tmp/inner"), "left").unwrap();
        write_atomically(&path("x"), b"one").unwrap();
        assert!(!path(".x.1-2.tmp").exists() && !path(".x.1-3.tmp").exists());
        assert_eq!(names(folder.path()).len(), 5 + 2, "{:?}", names(folder.path()));
        alive.write_all_at(b"two", 0).unwrap();
        alive.commit().unwrap();
        assert_eq!(fs::read(path("x")).unwrap(), b"two");
    }
}
