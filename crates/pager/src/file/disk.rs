//! The file behind the tier, and the seam at which tests put a disk with faults.
//!
//! No run leaves a file behind, however it ends. On Linux the file is made without a name (`O_TMPFILE`), where the
//! file system can: it goes when its last handle does, so with its process. Elsewhere it is made as
//! `rankfold-pages-PID-N`, locked, and its name removed at once. A process killed between the two leaves a file with a
//! name; the next that opens a tier in that folder removes it: a living owner holds a lock, and a lock dies with its
//! process. (Whoever finds the file before it is locked removes a name that was about to go anyway.)
//!
//! Space is given back by punching holes (`fallocate`), where the file system can; elsewhere it is only used again.
//!
//! Direct I/O (`O_DIRECT`) moves pages between memory and the disk without a copy in the system's cache. Buffered, the
//! system keeps what it has room for (and may count it against the process's control group), and a write that fails
//! after it was taken into the cache is only seen when the page comes back damaged.

use crate::{Error, Result};
use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where pages go: a file, or in tests one with faults. Counts may be short; 0 of a count asked for is the end.
pub(crate) trait Disk: Debug + Send + Sync {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize>;
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize>;
    /// Give back the space of a range, if the file system can.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;
    /// Bring what was written to the medium, with the errors that a cache kept back.
    fn sync(&self) -> io::Result<()>;
    /// Bytes that could still be written, where the system tells.
    fn free(&self) -> Option<u64>;
}

impl Disk for File {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, at)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        system::punch(self, at, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn free(&self) -> Option<u64> {
        let mut figures = MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: a place for the answer, and a descriptor that `self` keeps open.
        let told = unsafe { libc::fstatvfs(self.as_raw_fd(), figures.as_mut_ptr()) } == 0;
        // SAFETY: the call filled it where it says so.
        let figures = told.then(|| unsafe { figures.assume_init() })?;
        // Of other types on other systems.
        #[allow(clippy::useless_conversion)]
        Some(u64::from(figures.f_bavail).saturating_mul(u64::from(figures.f_frsize)))
    }
}

/// All of `bytes`, in as many reads as it takes.
pub(crate) fn read_all(disk: &dyn Disk, bytes: &mut [u8], at: u64) -> io::Result<()> {
    transfer(bytes.len(), io::ErrorKind::UnexpectedEof, |done| disk.read_at(&mut bytes[done..], at + done as u64))
}

/// All of `bytes`, in as many writes as it takes.
pub(crate) fn write_all(disk: &dyn Disk, bytes: &[u8], at: u64) -> io::Result<()> {
    transfer(bytes.len(), io::ErrorKind::WriteZero, |done| disk.write_at(&bytes[done..], at + done as u64))
}

/// Give back the space of a range, if the file system can.
pub(crate) fn punch(disk: &dyn Disk, at: u64, len: u64) -> io::Result<()> {
    uninterrupted(|| disk.punch(at, len))
}

/// Call `next` with what is done until that is all; `nothing` is what it is called when it does no more.
fn transfer(all: usize, nothing: io::ErrorKind, mut next: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < all {
        match uninterrupted(|| next(done))? {
            0 => return Err(nothing.into()),
            count => done += count,
        }
    }
    Ok(())
}

fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// A file in `folder` that no other process can find, and that goes with this one.
///
/// Errors: a folder that is missing, is none or cannot be written; a file system without direct I/O, if that is asked.
pub(crate) fn open(folder: &Path, direct: bool) -> Result<File> {
    let failed = |action| move |source| Error::File { path: folder.into(), action, source };
    remove_stale(folder);
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let file = match system::open_unnamed(&options, folder) {
        // The folder is there: what is missing is this kind of file, or what is wrong shows again.
        Err(e) if e.kind() != io::ErrorKind::NotFound => open_named(&options, folder).and_then(NamedFile::into_unnamed),
        opened => opened,
    };
    let file = file.map_err(failed("open a file in it"))?;
    if direct {
        system::use_direct_io(&file).map_err(failed("use direct I/O in it"))?;
    }
    Ok(file)
}

/// A file that has a name yet, and a lock that says that its owner lives.
#[derive(Debug)]
struct NamedFile {
    file: File,
    path: PathBuf,
}

impl NamedFile {
    fn into_unnamed(self) -> io::Result<File> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(self.file),
        }
    }
}

/// The first part of the names of files.
const PREFIX: &str = "rankfold-pages-";

fn open_named(options: &OpenOptions, folder: &Path) -> io::Result<NamedFile> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let path = folder.join(format!("{PREFIX}{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        match options.clone().create_new(true).open(&path) {
            // Taken by a process of that number in another container.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(file) => {
                // Where a file system has no locks, nothing is ever found unlocked and removed.
                let _ = file.try_lock();
                return Ok(NamedFile { file, path });
            }
        }
    }
}

/// Remove the files that killed processes left. What cannot be removed is no harm to this one.
fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = || entry.file_type().is_ok_and(|kind| kind.is_file());
        let is_dead = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if is_ours(&entry.file_name()) && is_file() && is_dead() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a name is `rankfold-pages-PID-N`.
fn is_ours(name: &OsStr) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'));
    numbers.is_some_and(|(pid, n)| is_number(pid) && is_number(n))
}

/// What Linux has for it.
#[cfg(target_os = "linux")]
mod system {
    use super::*;

    pub(super) fn open_unnamed(options: &OpenOptions, folder: &Path) -> io::Result<File> {
        // O_EXCL: it never gets a name either.
        options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder)
    }

    pub(super) fn use_direct_io(file: &File) -> io::Result<()> {
        // SAFETY: numbers alone, and a descriptor that `file` keeps open; it has no other flag that this could clear.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_DIRECT) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn punch(file: &File, at: u64, len: u64) -> io::Result<()> {
        let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (at, len) = (at.try_into().map_err(too_far)?, len.try_into().map_err(too_far)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: numbers alone, and a descriptor that `file` keeps open.
        if unsafe { libc::fallocate64(file.as_raw_fd(), mode, at, len) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(()),
            e => Err(e),
        }
    }
}

/// What every unix has for it.
#[cfg(not(target_os = "linux"))]
mod system {
    use super::*;

    pub(super) fn open_unnamed(_: &OpenOptions, _: &Path) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn use_direct_io(_: &File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn punch(_: &File, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn named(folder: &Path) -> NamedFile {
        open_named(OpenOptions::new().read(true).write(true).mode(0o600), folder).unwrap()
    }

    #[test]
    fn an_open_file_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let other = named(folder.path()).into_unnamed().unwrap();
        for file in [open(folder.path(), false).unwrap(), other] {
            write_all(&file, b"pages", 3).unwrap();
            let mut back = [0; 5];
            read_all(&file, &mut back, 3).unwrap();
            assert_eq!((&back, file.metadata().unwrap().nlink()), (b"pages", 0));
            assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        }
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let kept = ["rankfold-pages-1", "rankfold-pages-1-", "rankfold-pages-1-2x", "rankfold-pages-1-2-3", "x-1-2"];
        for name in kept {
            fs::write(path(name), "kept").unwrap();
        }
        fs::create_dir(path("rankfold-pages-1-5")).unwrap();
        std::os::unix::fs::symlink(path("x-1-2"), path("rankfold-pages-1-6")).unwrap();
        fs::write(path("rankfold-pages-1-2"), "left").unwrap();
        let alive = named(folder.path());
        let mut expected = names(folder.path());
        open(folder.path(), false).unwrap();
        expected.retain(|name| name != "rankfold-pages-1-2");
        assert_eq!(names(folder.path()), expected);
        assert_eq!(expected.len(), kept.len() + 3);
        assert!(alive.path.exists());
        alive.into_unnamed().unwrap();
    }

    /// Not a law: the process of the next test, which it kills.
    #[test]
    #[ignore = "waits to be killed"]
    fn process_with_a_named_file() {
        let Some(folder) = std::env::var_os("RANKFOLD_TEST_FOLDER") else { return };
        let file = named(Path::new(&folder));
        writeln!(io::stdout(), "\nready {}", file.path.display()).unwrap();
        io::stdin().read_line(&mut String::new()).unwrap();
    }

    #[test]
    fn a_file_is_kept_while_its_process_lives_and_removed_when_that_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "file::disk::tests::process_with_a_named_file"])
            .env("RANKFOLD_TEST_FOLDER", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert!(lines.map(Result::unwrap).any(|line| line.starts_with("ready ")));
        open(folder.path(), false).unwrap();
        assert_eq!(names(folder.path()).len(), 1);
        process.kill().unwrap();
        process.wait().unwrap();
        open(folder.path(), false).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_folder_that_cannot_hold_a_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "whole").unwrap();
        for target in [folder.path().join("missing"), file.clone(), "/proc".into(), "".into()] {
            let error = open(&target, false).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: cannot open a file in it: ", target.display())), "{error}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"whole");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn direct_io_is_an_error_where_the_file_system_has_none() {
        assert!(system::use_direct_io(&File::open("/proc/self/status").unwrap()).is_err());
    }
}
