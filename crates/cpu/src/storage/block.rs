//! Where memory comes from: the system or, in a backend on a pager, the pager, whose pages may leave for a file
//! whenever nobody holds them.
//!
//! So bytes are lent against [`Holds`] alone: what is lent cannot outlive them, and they keep its pages in place until
//! they are dropped. In the system's memory there is nothing to hold, and nothing is paid.

use super::ALIGN;
use rankfold_backend::HostBytes;
use rankfold_pager::{Access, Allocation, Hold, Pager, Result};
use std::alloc::Layout;
use std::cell::RefCell;
use std::ops::Range;
use std::ptr::NonNull;

/// Which buffers lie on a pager.
#[derive(Debug)]
pub(crate) struct Paging {
    /// Whose pages they take.
    pub(crate) pager: Pager,
    /// Those of at least as many bytes.
    pub(crate) from: usize,
}

/// What one kernel keeps in place while it runs.
#[derive(Debug, Default)]
pub(crate) struct Holds(RefCell<Vec<Hold>>);

impl Holds {
    /// Hold a part of an allocation for as long as self lives, and say where it starts. An empty part needs no hold.
    fn hold(&self, allocation: &Allocation, part: &Range<usize>, access: Access) -> Result<*mut u8> {
        assert!(part.start <= part.end && part.end <= allocation.bytes(), "a part beyond its block");
        if !part.is_empty() {
            let hold = allocation.hold(part.clone(), access)?;
            self.0.borrow_mut().push(hold);
            #[cfg(test)]
            super::tests::taken(part, access);
        }
        // SAFETY: within the allocation.
        Ok(unsafe { allocation.start().add(part.start) })
    }
}

#[cfg(test)]
impl Drop for Holds {
    fn drop(&mut self) {
        super::tests::released(self.0.get_mut().len());
    }
}

/// Memory that is zero when it is new and never uninitialised.
pub(super) enum Block {
    /// Always there.
    System(System),
    /// There while it is held.
    Paged(Allocation),
}

impl Block {
    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::System(block) => block.len,
            Self::Paged(allocation) => allocation.bytes(),
        }
    }

    /// Its first byte's address.
    pub(super) fn start(&self) -> *const u8 {
        match self {
            Self::System(block) => block.start(),
            Self::Paged(allocation) => allocation.start(),
        }
    }

    /// Whether it lies on a pager.
    pub(super) fn is_paged(&self) -> bool {
        matches!(self, Self::Paged(_))
    }

    /// What lies in it is no longer wanted.
    pub(super) fn discard(&mut self) {
        match self {
            Self::System(_) => {}
            Self::Paged(allocation) => allocation.discard(0..allocation.bytes()),
        }
    }

    /// A part of it; the whole starts at a multiple of [`ALIGN`].
    ///
    /// # Panics
    /// Here and below: where the part is not within the block.
    pub(super) fn bytes<'s>(&'s self, part: Range<usize>, holds: &'s Holds) -> Result<&'s [u8]> {
        match self {
            Self::System(block) => Ok(&block.bytes()[part]),
            Self::Paged(allocation) => {
                let start = holds.hold(allocation, &part, Access::Read)?;
                // SAFETY: initialised memory (the pager's is zero when it is new), which self owns and 's borrows. Its
                // pages stay in place for 's: a hold leaves `holds`, which 's borrows too, only when that is dropped.
                Ok(unsafe { std::slice::from_raw_parts(start, part.len()) })
            }
        }
    }

    /// A part of it, to write.
    pub(super) fn bytes_mut<'s>(&'s mut self, part: Range<usize>, holds: &'s Holds) -> Result<&'s mut [u8]> {
        match self {
            Self::System(block) => Ok(&mut block.bytes_mut()[part]),
            Self::Paged(allocation) => {
                let start = holds.hold(allocation, &part, Access::Write)?;
                // SAFETY: as above, self borrowed mutably for 's.
                Ok(unsafe { std::slice::from_raw_parts_mut(start, part.len()) })
            }
        }
    }

    /// A part of it for the host to write, held while it is lent.
    pub(super) fn host_bytes(&mut self, part: Range<usize>) -> Result<HostBytes<'_>> {
        Ok(match self {
            Self::System(block) => HostBytes::new(&mut block.bytes_mut()[part]),
            Self::Paged(allocation) => HostBytes::new(allocation.pin_mut(part)?),
        })
    }
}

/// The system's memory.
pub(super) struct System {
    /// What the system gave, `ALIGN` bytes longer than the block.
    raw: NonNull<u8>,
    len: usize,
}

// SAFETY: a block is owned memory, not bound to a thread.
unsafe impl Send for System {}
// SAFETY: a block is read and written through references to its owner alone.
unsafe impl Sync for System {}

impl System {
    /// The allocator's zeroed memory is untouched pages only at its natural alignment; hence the slack and the shift.
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.checked_add(ALIGN)?, 16).ok()
    }

    /// `len` bytes, where the system has as many.
    pub(super) fn new(len: usize) -> Option<Self> {
        // SAFETY: the layout's size is at least ALIGN.
        let raw = NonNull::new(unsafe { std::alloc::alloc_zeroed(Self::layout(len)?) })?;
        Some(Self { raw, len })
    }

    /// The first aligned byte.
    fn start(&self) -> *mut u8 {
        let shift = self.raw.as_ptr().align_offset(ALIGN);
        // SAFETY: the shift is below ALIGN, by which the allocation is longer than the block.
        unsafe { self.raw.as_ptr().add(shift) }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: initialised (zeroed) memory of `len` bytes, owned by self and borrowed with it.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably with self.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let layout = Self::layout(self.len).expect("the layout it was allocated with");
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.raw.as_ptr(), layout) }
    }
}
