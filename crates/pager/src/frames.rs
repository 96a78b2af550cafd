//! Frames on their way from one allocation to another.
//!
//! A page that leaves gives its frame back, and one that comes takes one. Through the system that is dear: it zeroes what
//! it gives, for bytes that the disk is about to write over, and looks for 2 MiB in one piece where it can. So frames that
//! leave are put aside, at addresses of their own, and moved behind those of the next pages that come: the system changes
//! its page tables and touches no byte. On an AMD EPYC Zen 4, beside two busy threads, the frames of 2 MiB take 14 µs
//! aside and as long back, against 360 µs (in one huge frame) to 1350 (in small ones) for new ones.
//!
//! What is set aside counts as memory in use: whoever takes frames of any kind first gives up as many of these
//! ([`Frames::give_up`]), so that there are never more in all than if each had gone back at once.
//!
//! Only Linux moves frames (`mremap` with `MREMAP_DONTUNMAP`, 5.7); elsewhere all go back to the system.

use crate::Result;
use crate::space::{BLOCK, Space};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most pieces that are set aside.
const PIECES: usize = 256;

/// The most mappings that moving may make in the system's books, which grant a process 65530: what was moved is one of its
/// own, each block, and where parts of blocks are moved, each page.
const MAPPINGS: usize = 1 << 14;

/// Frames that are set aside, in pieces of a block or a part of one.
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

    /// Put frames behind a range that has none: those that are set aside where a piece is as long, else new ones. What they
    /// hold is unspecified.
    ///
    /// Errors: a range that the system does not open.
    ///
    /// # Safety
    /// Nobody has a reference into the range.
    pub(crate) unsafe fn take(&self, space: &Space, range: Range<usize>) -> Result<()> {
        for piece in self.pieces(range) {
            // SAFETY: the caller's condition.
            if !unsafe { self.take_piece(space, piece.clone()) } {
                self.give_up(piece.len());
                space.open(piece.clone())?;
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
        // What comes as whole blocks stays in small frames for good if it takes those that others left.
        let is_whole = range.len().is_multiple_of(BLOCK) && range.start.is_multiple_of(BLOCK);
        let will_do = |from: &Range<usize>| from.len() == range.len() && (!is_whole || aside.is_huge(from));
        let Some(at) = state.aside.iter().rposition(|piece| will_do(&self.place(piece))) else { return false };
        let (piece, from) = (state.aside[at].0, self.place(&state.aside[at]));
        // SAFETY: the caller's condition; nobody ever has a reference into what is set aside.
        let is_there = unsafe { aside.move_frames(from, space, range.start) };
        if is_there {
            state.aside.remove(at);
            state.free.push(piece);
        }
        is_there
    }

    fn is_huge(&self, piece: &(usize, usize)) -> bool {
        self.space.as_ref().is_some_and(|aside| aside.is_huge(&self.place(piece)))
    }

    /// Where a piece lies.
    fn place(&self, (piece, bytes): &(usize, usize)) -> Range<usize> {
        piece * self.piece..piece * self.piece + bytes
    }

    /// At least so many bytes of what is set aside go back to the system, as far as there are any, in pieces that are not
    /// needlessly long, those in small frames first.
    pub(crate) fn give_up(&self, bytes: usize) {
        let mut state = self.state();
        let mut left = bytes;
        while left > 0 && !state.aside.is_empty() {
            let long_enough = state.aside.iter().enumerate().filter(|(_, (_, bytes))| *bytes >= left);
            let at = long_enough.min_by_key(|(_, piece)| (piece.1, self.is_huge(piece))).map_or(0, |(at, _)| at);
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

    /// The parts of a range that lie in one block each.
    fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (piece, end) = (self.piece, range.end);
        let next = move |part: &Range<usize>| Some(part.end..end.min(part.end + piece)).filter(|next| !next.is_empty());
        let first = range.start..end.min((range.start + 1).next_multiple_of(piece));
        std::iter::successors(Some(first).filter(|first| !first.is_empty()), next)
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
            one.open(range.clone()).unwrap();
            fill(&one, &range, 7);
            // SAFETY: no reference is left.
            unsafe { frames.put(&one, range.clone()) };
            assert_eq!(frames.bytes(), range.len());
            // SAFETY: there is none yet.
            unsafe { frames.take(&other, target.clone()) }.unwrap();
            assert_eq!(frames.bytes(), 0);
            // They are the same frames: nobody zeroed them.
            assert!(is_full(&other, &target, 7));
            // And none are where they were.
            one.open(range.clone()).unwrap();
            assert!(is_full(&one, &range, 0));
        }
    }

    /// KiB of huge frames within the first block of a space, as the system says.
    #[cfg(target_os = "linux")]
    fn huge(space: &Space) -> u64 {
        let start = space.start().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begins_at_or_before = |line: &str| -> Option<bool> {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let at = |text| usize::from_str_radix(text, 16);
            Some((at(from).ok()?..at(to).ok()?).contains(&start))
        };
        let mut lines = maps.lines().skip_while(|line| begins_at_or_before(line) != Some(true));
        let line = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
        line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Where a block had small frames the system keeps their table, and what others left in small frames stays small: both
    /// once kept nearly all blocks from ever being huge.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_block_that_comes_as_a_whole_is_huge_whatever_was_there_before() {
        let whole = 0..BLOCK;
        // SAFETY: nobody has a reference into these spaces.
        let come = |frames: &Frames, space: &Space| unsafe { frames.take(space, whole.clone()) }.unwrap();
        let fresh = Space::reserve(BLOCK).unwrap();
        come(&frames(PAGE), &fresh);
        if huge(&fresh) == 0 {
            eprintln!("skipped: this system has no huge frames to give");
            return;
        }
        let (frames, space) = (frames(PAGE), Space::reserve(BLOCK).unwrap());
        let parts = || (0..BLOCK).step_by(PAGE).map(|start| start..start + PAGE);
        for at_once in [false, true] {
            // SAFETY: as above.
            parts().for_each(|part| unsafe { frames.take(&space, part) }.unwrap());
            fill(&space, &whole, 1);
            assert_eq!((huge(&space), space.is_huge(&whole)), (0, false));
            match at_once {
                // SAFETY: as above.
                false => parts().for_each(|part| unsafe { space.release(part) }),
                // SAFETY: as above.
                true => unsafe { frames.put(&space, whole.clone()) },
            }
            come(&frames, &space);
            assert_eq!((huge(&space), space.is_huge(&whole)), (2048, true));
            if !at_once {
                // SAFETY: as above.
                unsafe { space.release(whole.clone()) };
            }
        }
        // What is huge stays it on its way to another and back, and is gone where it was.
        // SAFETY: as above.
        unsafe { frames.put(&space, whole.clone()) };
        assert!(!space.is_huge(&whole));
        fill(&fresh, &whole, 2);
        // SAFETY: as above.
        unsafe { fresh.release(whole.clone()) };
        come(&frames, &fresh);
        assert_eq!((huge(&fresh), fresh.is_huge(&whole), frames.bytes()), (2048, true, 0));
        // A part of it that leaves ends that.
        // SAFETY: as above.
        unsafe { fresh.release(0..PAGE) };
        assert!(!fresh.is_huge(&whole));
    }

    #[test]
    fn in_spaces_too_large_for_the_systems_books_nothing_is_moved() {
        let frames = Frames::new(PAGE);
        let pages = BLOCK / PAGE;
        for (bytes, most) in [(BLOCK, MAPPINGS), (PAGE, MAPPINGS / pages), (BLOCK - PAGE, MAPPINGS / pages)] {
            assert!(frames.may_move(bytes, most) && !frames.may_move(bytes, most + 1));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn as_many_frames_as_are_taken_go_back_and_the_shortest_piece_that_will_do() {
        let (frames, space) = (frames(PAGE), Space::reserve(2 * BLOCK).unwrap());
        let aside = || {
            let pages = |(_, bytes): &(usize, usize)| bytes / PAGE;
            frames.state().aside.iter().map(pages).collect::<Vec<_>>()
        };
        for pages in [0..20, 20..23, 32..40] {
            let range = pages.start * PAGE..pages.end * PAGE;
            space.open(range.clone()).unwrap();
            // SAFETY: nobody has a reference.
            unsafe { frames.put(&space, range) };
        }
        assert_eq!(aside(), [20, 3, 8]);
        frames.give_up(5 * PAGE);
        assert_eq!(aside(), [20, 3]);
        // SAFETY: as above.
        unsafe { frames.take(&space, 40 * PAGE..42 * PAGE) }.unwrap();
        assert_eq!(aside(), [20]);
        frames.keep(20 * PAGE);
        assert_eq!(aside(), [20]);
        frames.keep(19 * PAGE);
        assert_eq!(frames.bytes(), 0);
        frames.give_up(PAGE);
    }

    proptest! {
        #[test]
        fn the_pieces_of_a_range_are_the_range_and_each_lies_in_a_block(
            page in prop::sample::select(&SIZES[..]), start in 0..200usize, pages in 0..200usize,
        ) {
            let (frames, block) = (Frames::new(page), page.max(BLOCK));
            let (range, mut end) = (start * page..(start + pages) * page, start * page);
            for piece in frames.pieces(range.clone()) {
                prop_assert!(piece.start == end && piece.start / block == (piece.end - 1) / block);
                end = piece.end;
            }
            prop_assert_eq!(end, range.end);
        }
    }
}
