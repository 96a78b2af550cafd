//! Frames on their way from one allocation to another.
//!
//! A page that leaves gives its frame back, and one that comes takes one. Through the system that is dear: it zeroes
//! what it gives, for bytes that the disk is about to write over, and looks for 2 MiB in one piece where it can. So
//! frames that leave are put aside, at addresses of their own, and moved behind those of the next pages that come: the
//! system changes its page tables and touches no byte. On an AMD EPYC Zen 4, beside two busy threads, the frames of 2
//! MiB take 14 µs aside and as long back, against 360 µs (in one huge frame) to 1350 (in small ones) for new ones.
//!
//! What is set aside counts as memory in use: whoever takes frames of any kind first gives up as many of these
//! ([`Frames::give_up`]), so that there are never more in all than if each had gone back at once.
//!
//! Only Linux moves frames (`mremap` with `MREMAP_DONTUNMAP`, 5.7); elsewhere all go back to the system.

use crate::Result;
use crate::space::{BLOCK, MAPPINGS, Space};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most pieces that are set aside.
const PIECES: usize = 256;

/// Frames that are set aside, in pieces of a block or a page.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Where they lie, `piece` addresses for each; none where there are no addresses for it.
    space: Option<Space>,
    page: usize,
    /// The most bytes of a piece: a block, or a page where that is more.
    piece: usize,
    /// The most mappings that moving may make.
    mappings: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// (Which piece, its bytes), those set aside last at the end.
    aside: Vec<(usize, usize)>,
    /// Pieces in which nothing lies.
    free: Vec<usize>,
}

impl State {
    fn bytes(&self) -> usize {
        self.aside.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl Frames {
    /// For spaces in pages of `page` bytes.
    pub(crate) fn new(page: usize) -> Self {
        Self::within(MAPPINGS, page)
    }

    /// The same, where moving may make so many mappings.
    fn within(mappings: usize, page: usize) -> Self {
        let piece = page.max(BLOCK);
        let space = Space::reserve(PIECES * piece).ok();
        let free = (0..PIECES).filter(|_| space.is_some()).collect();
        Self { space, page, piece, mappings, state: Mutex::new(State { aside: Vec::new(), free }) }
    }

    /// Bytes set aside.
    pub(crate) fn bytes(&self) -> usize {
        self.state().bytes()
    }

    /// Set the frames of a range aside, as far as there is place for them; the others go back to the system.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    pub(crate) unsafe fn put(&self, space: &Space, range: Range<usize>) {
        for piece in self.pieces(range) {
            // SAFETY: the caller's condition.
            if !unsafe { self.put_piece(space, piece.clone()) } {
                // SAFETY: as above.
                unsafe { space.release(piece) };
            }
        }
    }

    /// # Safety
    /// As for [`Frames::put`].
    unsafe fn put_piece(&self, space: &Space, range: Range<usize>) -> bool {
        // A block that came in small frames would be one in small frames wherever it went.
        if range.len() == self.piece && !space.is_huge(&range) {
            return false;
        }
        let mut state = self.state();
        let Some(aside) = self.space.as_ref().filter(|_| self.may_move(range.len(), Space::blocks())) else {
            return false;
        };
        let Some(piece) = state.free.pop() else { return false };
        let bytes = range.len();
        // SAFETY: the caller's condition; nobody ever has a reference into what is set aside.
        let is_there = unsafe { space.move_frames(range, aside, piece * self.piece) };
        if is_there {
            state.aside.push((piece, bytes))
        } else {
            state.free.push(piece)
        }
        is_there
    }

    /// Whether pieces of so many bytes may be moved in spaces of so many blocks, all together.
    fn may_move(&self, bytes: usize, blocks: usize) -> bool {
        let parts = if bytes == self.piece { 1 } else { self.piece / self.page };
        blocks.saturating_mul(parts) <= self.mappings
    }

    /// Put frames behind a range that has none: those that are set aside, of a block for a block and of a page for a
    /// page, else new ones. What they hold is unspecified.
    ///
    /// Errors: a range that the system does not open.
    ///
    /// # Safety
    /// Nobody has a reference into the range, and no part of it has frames.
    pub(crate) unsafe fn take(&self, space: &Space, range: Range<usize>) -> Result<()> {
        for piece in self.pieces(range) {
            // SAFETY: the caller's condition.
            if !unsafe { self.take_piece(space, piece.clone()) } {
                self.give_up(piece.len());
                // SAFETY: the caller's condition.
                unsafe { space.open(piece.clone()) }?;
                space.populate(piece);
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Frames::take`].
    unsafe fn take_piece(&self, space: &Space, range: Range<usize>) -> bool {
        let mut state = self.state();
        let Some(aside) = &self.space else { return false };
        let Some(at) = state.aside.iter().rposition(|(_, bytes)| *bytes == range.len()) else { return false };
        let (piece, from) = (state.aside[at].0, self.place(&state.aside[at]));
        // SAFETY: the caller's condition; nobody ever has a reference into what is set aside.
        let is_there = unsafe { aside.move_frames(from, space, range.start) };
        if is_there {
            state.aside.remove(at);
            state.free.push(piece);
        }
        is_there
    }

    /// Where a piece lies.
    fn place(&self, (piece, bytes): &(usize, usize)) -> Range<usize> {
        piece * self.piece..piece * self.piece + bytes
    }

    /// At least so many bytes of what is set aside go back to the system, as far as there are any, and no whole block
    /// for less while there are pages.
    pub(crate) fn give_up(&self, bytes: usize) {
        let mut state = self.state();
        let mut left = bytes;
        while left > 0 && !state.aside.is_empty() {
            let sizes = || state.aside.iter().map(|(_, bytes)| *bytes).enumerate();
            let fits = sizes().filter(|(_, bytes)| *bytes <= left).max_by_key(|(_, bytes)| *bytes);
            let at = fits.or_else(|| sizes().min_by_key(|(_, bytes)| *bytes)).map_or(0, |(at, _)| at);
            left = left.saturating_sub(self.give_up_piece(&mut state, at));
        }
    }

    /// All but so many bytes of what is set aside go back to the system.
    pub(crate) fn keep(&self, most: usize) {
        let mut state = self.state();
        let mut bytes = state.bytes();
        while bytes > most {
            bytes -= self.give_up_piece(&mut state, 0);
        }
    }

    /// The bytes of a piece that is set aside, which go back to the system.
    fn give_up_piece(&self, state: &mut State, at: usize) -> usize {
        let piece = state.aside.remove(at);
        if let Some(aside) = &self.space {
            // SAFETY: nobody ever has a reference into what is set aside.
            unsafe { aside.release(self.place(&piece)) };
        }
        state.free.push(piece.0);
        piece.1
    }

    /// The whole blocks of a range, and pages. Each lies in one mapping of the system's, however many others its
    /// neighbours came by: before Linux 6.17 frames in several cannot be moved.
    fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (piece, page, end) = (self.piece, self.page, range.end);
        let from = move |start: usize| {
            let is_whole = start.is_multiple_of(piece) && end - start >= piece;
            Some(start..start + if is_whole { piece } else { page }).filter(|_| start < end)
        };
        std::iter::successors(from(range.start), move |last| from(last.end))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 64 << 10;

    /// Bytes of a page: parts of a block, a block, and more.
    const SIZES: [usize; 4] = [PAGE, 256 << 10, 2 << 20, 4 << 20];

    /// Frames that move however many spaces other tests have.
    fn frames(page: usize) -> Frames {
        Frames::within(usize::MAX, page)
    }

    /// New frames behind a range that has none.
    fn open(space: &Space, range: &Range<usize>) {
        // SAFETY: each test uses its spaces alone, and has no reference into them.
        unsafe { space.open(range.clone()) }.unwrap();
    }

    /// [`Frames::put`] and [`Frames::take`], as the tests use them.
    fn put(frames: &Frames, space: &Space, range: &Range<usize>) {
        // SAFETY: as above.
        unsafe { frames.put(space, range.clone()) };
    }

    fn take(frames: &Frames, space: &Space, range: &Range<usize>) {
        // SAFETY: as above.
        unsafe { frames.take(space, range.clone()) }.unwrap();
    }

    /// Write all bytes of a range that has frames.
    fn fill(space: &Space, range: &Range<usize>, byte: u8) {
        // SAFETY: within the space; each test uses its spaces alone.
        unsafe { space.start().add(range.start).write_bytes(byte, range.len()) };
    }

    /// Whether they are all the same.
    fn is_full(space: &Space, range: &Range<usize>, byte: u8) -> bool {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(space.start().add(range.start), range.len()) }.iter().all(|at| *at == byte)
    }

    /// KiB that the system's books say of the mapping in which a byte of a space lies: `Rss:`, `AnonHugePages:`.
    #[cfg(target_os = "linux")]
    fn figure(space: &Space, at: usize, name: &str) -> u64 {
        let address = space.start().addr() + at;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let has_it = |line: &str| -> Option<bool> {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let at = |text| usize::from_str_radix(text, 16);
            Some((at(from).ok()?..at(to).ok()?).contains(&address))
        };
        let mut lines = maps.lines().skip_while(|line| has_it(line) != Some(true));
        let figure = lines.find_map(|line| line.strip_prefix(name));
        figure.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn frames_go_where_as_many_are_wanted() {
        for page in SIZES {
            frames_of_one_size_go_where_as_many_are_wanted(page);
        }
    }

    #[cfg(target_os = "linux")]
    fn frames_of_one_size_go_where_as_many_are_wanted(page: usize) {
        let (frames, piece) = (frames(page), page.max(BLOCK));
        let [one, other] = [(); 2].map(|()| Space::reserve(3 * piece).unwrap());
        for (range, target) in [(0..piece, piece..2 * piece), (piece..piece + page, 3 * piece - page..3 * piece)] {
            open(&one, &range);
            fill(&one, &range, 7);
            assert_ne!(figure(&one, range.start, "Rss:"), 0);
            put(&frames, &one, &range);
            assert_eq!(frames.bytes(), range.len());
            take(&frames, &other, &target);
            assert_eq!(frames.bytes(), 0);
            // They are the same frames: nobody zeroed them.
            assert!(is_full(&other, &target, 7));
            // And none are where they were.
            assert_eq!(figure(&one, range.start, "Rss:"), 0);
        }
    }

    /// Where a block had small frames the system keeps their table, and what others left in small frames stays small:
    /// both once kept nearly all blocks from ever being huge.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_block_that_comes_as_a_whole_is_huge_whatever_was_there_before() {
        let whole = 0..BLOCK;
        let huge = |space: &Space| figure(space, 0, "AnonHugePages:");
        let has_huge_frames = || {
            let fresh = Space::reserve(BLOCK).unwrap();
            take(&frames(PAGE), &fresh, &whole);
            huge(&fresh) > 0
        };
        let (frames, space) = (frames(PAGE), Space::reserve(BLOCK).unwrap());
        let parts = || (0..BLOCK).step_by(PAGE).map(|start| start..start + PAGE);
        for at_once in [false, true] {
            parts().for_each(|part| take(&frames, &space, &part));
            fill(&space, &whole, 1);
            assert_eq!((huge(&space), space.is_huge(&whole)), (0, false));
            match at_once {
                // SAFETY: nobody has a reference.
                false => parts().for_each(|part| unsafe { space.release(part) }),
                true => put(&frames, &space, &whole),
            }
            take(&frames, &space, &whole);
            if huge(&space) == 0 && !has_huge_frames() {
                eprintln!("skipped: this system has no huge frames to give now");
                return;
            }
            assert_eq!((huge(&space), space.is_huge(&whole)), (2048, true));
            // SAFETY: as above.
            unsafe { space.release(whole.clone()) };
        }
        // What is huge stays it on its way to another and back, and is gone where it was.
        let other = Space::reserve(BLOCK).unwrap();
        take(&frames, &space, &whole);
        fill(&space, &whole, 3);
        for (from, to) in [(&space, &other), (&other, &space)] {
            put(&frames, from, &whole);
            assert!(!from.is_huge(&whole));
            take(&frames, to, &whole);
            assert!(to.is_huge(&whole) && is_full(to, &whole, 3));
            assert_eq!(frames.bytes(), 0);
        }
        // A part of it that leaves ends that.
        put(&frames, &space, &(0..PAGE));
        assert!(!space.is_huge(&whole));
    }

    /// Each that is mapped anew is one more in the system's books, for good: only those that must.
    #[cfg(target_os = "linux")]
    #[test]
    fn blocks_that_never_had_small_frames_stay_one_mapping() {
        let (frames, space) = (frames(PAGE), Space::reserve(64 * BLOCK).unwrap());
        let blocks = (0..64).map(|i| i * BLOCK..(i + 1) * BLOCK);
        for block in blocks {
            take(&frames, &space, &block);
            // SAFETY: nobody has a reference.
            unsafe { space.release(block) };
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let (start, end) = (space.start().addr(), space.start().addr() + 64 * BLOCK);
        let starts = maps.lines().filter_map(|line| usize::from_str_radix(line.split_once('-')?.0, 16).ok());
        let count = starts.filter(|at| (start..end).contains(at)).count();
        assert!(count <= 1, "{count} mappings");
    }

    #[test]
    fn in_spaces_too_large_for_the_systems_books_nothing_is_moved() {
        let frames = Frames::new(PAGE);
        let pages = BLOCK / PAGE;
        for (bytes, most) in [(BLOCK, MAPPINGS), (PAGE, MAPPINGS / pages)] {
            assert!(frames.may_move(bytes, most) && !frames.may_move(bytes, most + 1));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn as_many_frames_as_are_taken_go_back_and_no_block_for_a_page() {
        let (frames, space) = (frames(PAGE), Space::reserve(2 * BLOCK).unwrap());
        let aside = || {
            let pages = |(_, bytes): &(usize, usize)| bytes / PAGE;
            frames.state().aside.iter().map(pages).collect::<Vec<_>>()
        };
        for pages in [32..64, 0..3] {
            let range = pages.start * PAGE..pages.end * PAGE;
            open(&space, &range);
            put(&frames, &space, &range);
        }
        assert_eq!(aside(), [32, 1, 1, 1]);
        frames.give_up(PAGE + 1);
        assert_eq!(aside(), [32, 1]);
        take(&frames, &space, &(8 * PAGE..9 * PAGE));
        assert_eq!(aside(), [32]);
        take(&frames, &space, &(9 * PAGE..10 * PAGE));
        assert_eq!(aside(), []);
        open(&space, &(32 * PAGE..64 * PAGE));
        put(&frames, &space, &(32 * PAGE..64 * PAGE));
        put(&frames, &space, &(8 * PAGE..10 * PAGE));
        frames.keep(34 * PAGE);
        assert_eq!(aside(), [32, 1, 1]);
        frames.keep(33 * PAGE);
        assert_eq!(aside(), [1, 1]);
        frames.give_up(3 * PAGE);
        assert_eq!(frames.bytes(), 0);
    }

    proptest! {
        #[test]
        fn the_pieces_of_a_range_are_the_range_and_each_is_a_block_or_a_page(
            page in prop::sample::select(&SIZES[..]), start in 0..200usize, pages in 0..200usize,
        ) {
            let (frames, block) = (Frames::new(page), page.max(BLOCK));
            let (range, mut end) = (start * page..(start + pages) * page, start * page);
            for piece in frames.pieces(range.clone()) {
                prop_assert!(piece.start == end && piece.start / block == (piece.end - 1) / block);
                prop_assert!(piece.len() == page || piece.len() == block);
                // A block that lies in the range is one piece.
                let first = piece.start / block * block;
                prop_assert!(piece.len() == block || first < range.start || first + block > range.end);
                end = piece.end;
            }
            prop_assert_eq!(end, range.end);
        }
    }
}
