//! How much may be resident: a number of bytes, or what is left of the whole process's memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// What bounds the pages in memory.
#[derive(Debug)]
pub enum Limit {
    /// So many bytes of pages.
    Pages(usize),
    /// What the rest of the process leaves of a limit on all of it.
    Process(ProcessLimit),
}

impl Limit {
    /// Bytes of pages that may be resident, as was last measured.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Pages(bytes) => *bytes,
            Self::Process(limit) => limit.left(limit.reserve),
        }
    }

    /// The same where nothing else helps: a part of what is kept free as well.
    pub(crate) fn last_resort(&self) -> usize {
        match self {
            Self::Pages(bytes) => *bytes,
            Self::Process(limit) => limit.left(limit.reserve / 2),
        }
    }

    /// Measure anew, where there is something to measure and `resident` bytes of pages are.
    pub(crate) fn measure(&mut self, resident: usize) {
        if let Self::Process(limit) = self {
            limit.measure(resident);
        }
    }
}

/// A limit on the resident memory of the process, as the system counts it.
///
/// Before pages take frames the process's resident memory is read, the pages' own part taken off, and the rest taken
/// as what others need from now on: it is never thought to be less than it was seen to be.
#[derive(Debug)]
pub struct ProcessLimit {
    bytes: usize,
    reserve: usize,
    /// The process's figures; none where the system has none.
    figures: Option<File>,
    /// The most that was seen beside the pages.
    beside: usize,
}

impl ProcessLimit {
    /// `bytes` for the whole process, `reserve` of which are kept free for what takes memory between two looks.
    pub fn new(bytes: usize, reserve: usize) -> Self {
        let mut limit = Self { bytes, reserve, figures: File::open("/proc/self/statm").ok(), beside: 0 };
        limit.measure(0);
        limit
    }

    /// Bytes that the process takes beside pages, as last measured; none where the system does not tell, and nothing
    /// but the pages is bounded.
    pub fn beside(&self) -> Option<usize> {
        self.figures.as_ref().map(|_| self.beside)
    }

    fn measure(&mut self, resident: usize) {
        if let Some(process) = self.figures.as_ref().and_then(resident_bytes) {
            self.beside = self.beside.max(process.saturating_sub(resident));
        }
    }

    /// What the rest of the process leaves, `reserve` of it kept free.
    fn left(&self, reserve: usize) -> usize {
        self.bytes.saturating_sub(self.beside).saturating_sub(reserve)
    }
}

/// The second number of `/proc/self/statm`: resident pages of the system.
fn resident_bytes(statm: &File) -> Option<usize> {
    let mut text = [0; 128];
    let len = statm.read_at(&mut text, 0).ok()?;
    let pages: usize = std::str::from_utf8(&text[..len]).ok()?.split_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: it reads a number that is fixed for the process.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    pages.checked_mul(page)
}
