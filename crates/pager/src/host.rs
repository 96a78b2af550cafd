//! The host's memory over a file.

use crate::extents::Extent;
use crate::file::FileTier;
use crate::frames::Frames;
use crate::space::{BLOCK, Space};
use crate::{Error, FileFigures, FileOptions, Memory, Result};
use std::ops::Range;
use std::sync::Arc;

/// While one thread puts frames behind addresses and sums checksums, another keeps the disk busy; and a third, where
/// one of the two moves a page alone, which waits as long as a long run before it.
const MOVERS: usize = 3;

/// Host memory, whose pages are kept in a file where there is one.
#[derive(Debug)]
pub struct Host {
    page: usize,
    /// With what comes from it and goes to it, the frames for that.
    file: Option<(Arc<FileTier>, Frames)>,
}

/// Addresses of the process, and a place in the file.
#[derive(Debug)]
pub struct HostRegion {
    space: Space,
    place: Option<Place>,
}

/// A place in the file, given back when it is dropped.
#[derive(Debug)]
struct Place {
    file: Arc<FileTier>,
    /// `None` only while it is dropped.
    extent: Option<Extent>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(extent) = self.extent.take() {
            self.file.free(extent);
        }
    }
}

impl HostRegion {
    /// The first byte's address.
    pub(crate) fn start(&self) -> *mut u8 {
        self.space.start()
    }

    fn kept(&self) -> Result<(&FileTier, &Extent)> {
        let Some(Place { file, extent: Some(extent) }) = &self.place else { return Err(Error::NoTier) };
        Ok((file, extent))
    }
}

impl Host {
    pub(crate) fn new(page: usize, file: Option<&FileOptions>) -> Result<Self> {
        Ok(match file {
            Some(options) => Self::on(FileTier::open(options, page)?, page),
            None => Self { page, file: None },
        })
    }

    pub(crate) fn on(file: FileTier, page: usize) -> Self {
        Self { page, file: Some((Arc::new(file), Frames::new(page))) }
    }

    /// The bytes of pages.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    unsafe fn bytes<'a>(&self, region: &'a HostRegion, pages: &Range<usize>) -> &'a [u8] {
        let range = pages.start * self.page..pages.end * self.page;
        assert!(range.end <= region.space.bytes(), "pages beyond their region");
        // SAFETY: within the space; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(region.start().add(range.start), range.len()) }
    }

    /// The same, to write.
    ///
    /// # Safety
    /// Nobody else touches them while the slice lives.
    #[allow(clippy::mut_from_ref)] // the memory is the region's, not borrowed from it; see the safety condition
    unsafe fn bytes_mut<'a>(&self, region: &'a HostRegion, pages: &Range<usize>) -> &'a mut [u8] {
        let range = pages.start * self.page..pages.end * self.page;
        assert!(range.end <= region.space.bytes(), "pages beyond their region");
        // SAFETY: within the space; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(region.start().add(range.start), range.len()) }
    }
}

// SAFETY of what follows: the core calls `commit` for empty pages, under its lock; `store` for pages for which no hold
// for writing has been given out and gives none out before it is done; `load` and `release` for pages for which none of
// any kind has, and never two at once for one page.
impl Memory for Host {
    type Region = HostRegion;

    fn reserve(&self, pages: usize) -> Result<HostRegion> {
        let source = std::io::ErrorKind::OutOfMemory;
        let too_many = || Error::Address { bytes: usize::MAX, source: source.into() };
        let space = Space::reserve(pages.checked_mul(self.page).ok_or_else(too_many)?)?;
        let place = |(file, _): &(Arc<FileTier>, _)| Place { file: file.clone(), extent: Some(file.reserve(pages)) };
        Ok(HostRegion { space, place: self.file.as_ref().map(place) })
    }

    fn commit(&self, region: &HostRegion, pages: Range<usize>) -> Result<()> {
        // The system puts the frames there, when a page is first touched.
        if let Some((_, frames)) = &self.file {
            frames.give_up(pages.len() * self.page);
        }
        // SAFETY: as above, and empty pages have no frames.
        unsafe { region.space.open(pages.start * self.page..pages.end * self.page) }
    }

    fn store(&self, region: &HostRegion, pages: Range<usize>) -> Result<()> {
        let (file, extent) = region.kept()?;
        // SAFETY: as above.
        file.store(extent, pages.start, unsafe { self.bytes(region, &pages) })
    }

    fn load(&self, region: &HostRegion, pages: Range<usize>) -> Result<()> {
        let (file, extent) = region.kept()?;
        let range = pages.start * self.page..pages.end * self.page;
        match &self.file {
            // SAFETY: as above.
            Some((_, frames)) => unsafe { frames.take(&region.space, range) }?,
            None => return Err(Error::NoTier),
        }
        // SAFETY: as above.
        file.load(extent, pages.start, unsafe { self.bytes_mut(region, &pages) })
    }

    fn release(&self, region: &HostRegion, pages: Range<usize>) {
        let range = pages.start * self.page..pages.end * self.page;
        match &self.file {
            // SAFETY: as above.
            Some((_, frames)) => unsafe { frames.put(&region.space, range) },
            // SAFETY: as above.
            None => unsafe { region.space.release(range) },
        }
    }

    fn forget(&self, region: &HostRegion, pages: Range<usize>) {
        if let Ok((file, extent)) = region.kept() {
            file.discard(extent, pages);
        }
    }

    fn aside(&self) -> usize {
        self.file.as_ref().map_or(0, |(_, frames)| frames.bytes())
    }

    fn keep_aside(&self, most: usize) {
        if let Some((_, frames)) = &self.file {
            frames.keep(most);
        }
    }

    fn movers(&self) -> usize {
        MOVERS
    }

    fn block(&self) -> usize {
        (BLOCK / self.page).max(1)
    }

    fn file(&self) -> Option<FileFigures> {
        self.file.as_ref().map(|(file, _)| file.figures())
    }
}
