//! When a page will be used next, from when pages were used before.
//!
//! A training step repeats the one before it: the same buffers in the same order. So the order in which pages were
//! touched is kept, and the place in it that is being repeated now is followed:
//!
//! ```text
//! order:   a b c d e f | a b c d e f | a b c
//!                            ^               ^
//!                            matched         now          next use of f: 3 touches ahead, of a: 4, of c: 6
//! ```
//!
//! What followed `matched` is what is expected to follow now. The page that leaves is the one expected farthest ahead,
//! which loses least where the expectation is right (Belady 1966, "A study of replacement algorithms for a
//! virtual-storage computer", MIN). Against the policies that look back only:
//!
//! - LRU lets go of the page that was unused longest. An optimiser walks through its states from first to last, once a
//!   step: the page unused longest is the very next one. With one page too few LRU keeps none of those it will need.
//! - CLOCK approximates LRU and shares the fault; scan-resistant relatives (2Q, ARC, LIRS) keep a part of the cycle, but
//!   must guess for each page on its own, and a layer's weights are used twice a step, at unequal distances.
//! - Here a cycle of n pages in a memory of c keeps c − 1 of them, as the optimum does, and forward and backward sweeps
//!   are known apart by what came before.
//!
//! While nothing repeats (the first step; something new) a page is expected as far ahead as its last use lies behind:
//! LRU, which is the right guess for a first forward pass, whose earliest tensors are needed last in backward.

/// A page's number within its pager.
pub(crate) type PageId = u32;

/// Touches that are remembered: what repeats at a longer distance is not foreseen.
const WINDOW: usize = 1 << 18;
/// Touches in their old order, steps from a page to its neighbour not counted, until the repetition is believed.
const BELIEVED: u32 = 16;
/// How far the present may skip ahead in the past that it repeats.
const SKIP: u64 = 256;
/// Earlier touches of a page that are looked at for one with the same touch before it.
const CANDIDATES: usize = 32;

/// One touch: which page, and how many touches before it the same page was touched last (0: not in the window).
#[derive(Clone, Copy, Debug)]
struct Touch {
    page: PageId,
    back: u32,
}

/// The order of touches, and the place in it that is repeated now.
#[derive(Debug, Default)]
pub(crate) struct Forecast {
    /// The last touches, touch number n at n mod WINDOW.
    touches: Vec<Touch>,
    /// Touches so far.
    now: u64,
    /// For each page, one more than the number of its last touch; 0 for none.
    last: Vec<u64>,
    /// The number of the touch that the last one repeats.
    matched: Option<u64>,
    /// Steps of the repetition so far.
    run: u32,
    /// How often `matched` did not go on, but somewhere else.
    breaks: u64,
}

impl Forecast {
    /// Pages that are new, or new under an old number: never touched.
    pub(crate) fn forget(&mut self, pages: std::ops::Range<PageId>) {
        let end = pages.end as usize;
        if self.last.len() < end {
            self.last.resize(end, 0);
        }
        self.last[pages.start as usize..end].fill(0);
    }

    /// A page is used now.
    pub(crate) fn touch(&mut self, page: PageId) {
        let before = self.now.checked_sub(1).map(|touch| self.at(touch).page);
        if before == Some(page) {
            return;
        }
        let number = self.now;
        let back = match self.last[page as usize] {
            0 => 0,
            last => u32::try_from(number + 1 - last).unwrap_or(0),
        };
        let touch = Touch { page, back: if (back as usize) < WINDOW { back } else { 0 } };
        if self.touches.len() < WINDOW {
            self.touches.push(touch);
        } else {
            self.touches[number as usize % WINDOW] = touch;
        }
        self.now += 1;
        self.last[page as usize] = number + 1;
        self.follow(number, page, before);
    }

    fn at(&self, number: u64) -> Touch {
        self.touches[number as usize % WINDOW]
    }

    /// Whether the touch of that number is still remembered, and lies before the last.
    fn remembers(&self, number: u64) -> bool {
        number + 1 < self.now && number + WINDOW as u64 >= self.now
    }

    /// Move `matched` to what touch `number`, of `page`, repeats.
    fn follow(&mut self, number: u64, page: PageId, before: Option<PageId>) {
        if let Some(next) = self.matched.map(|matched| matched + 1).filter(|next| self.remembers(*next)) {
            let ahead = (next..next + SKIP).take_while(|n| self.remembers(*n)).find(|n| self.at(*n).page == page);
            if ahead == Some(next) {
                self.matched = Some(next);
                if before.is_none_or(|before| page != before + 1) {
                    self.run = self.run.saturating_add(1);
                }
                return;
            }
            // Something new within what repeats: it will go on where it was.
            if self.at(number).back == 0 {
                return;
            }
            if let Some(ahead) = ahead {
                (self.matched, self.run) = (Some(ahead), self.run / 2);
                return;
            }
        }
        let same = |n: &u64| *n > 0 && self.remembers(*n - 1) && Some(self.at(*n - 1).page) == before;
        let earlier = || self.earlier(number).filter(|n| self.remembers(*n)).take(CANDIDATES);
        let best = earlier().find(same).or_else(|| earlier().next());
        (self.matched, self.run, self.breaks) = (best, 0, self.breaks + 1);
    }

    /// The touches of the page of touch `number` before it, the latest first.
    fn earlier(&self, number: u64) -> impl Iterator<Item = u64> {
        let back = move |n: &u64| match self.at(*n).back {
            0 => None,
            back => n.checked_sub(u64::from(back)).filter(|n| n + WINDOW as u64 >= self.now),
        };
        std::iter::successors(Some(number), back).skip(1)
    }

    /// The matched touch, where the repetition is believed.
    fn believed(&self) -> Option<u64> {
        self.matched.filter(|matched| self.run >= BELIEVED && self.remembers(*matched))
    }

    /// In how many touches a page is expected.
    pub(crate) fn distance(&self, page: PageId) -> u64 {
        let Some(last) = self.last[page as usize].checked_sub(1) else { return u64::MAX };
        let age = self.now - last;
        let Some(matched) = self.believed().filter(|matched| last > *matched) else { return age };
        if last + (WINDOW as u64) < self.now {
            return age;
        }
        let first = self.earlier(last).take_while(|n| *n > matched).last().unwrap_or(last);
        first - matched
    }

    /// The touches expected from now on, those of number `from` or later: (number, page), in their order
    /// and as far as is known; none while nothing repeats.
    pub(crate) fn expected(&self, from: u64) -> impl Iterator<Item = (u64, PageId)> {
        let (first, end) = match self.believed() {
            Some(matched) => (from.max(matched + 1), self.now),
            None => (0, 0),
        };
        (first..end).map(move |n| (n, self.at(n).page))
    }

    /// Whether a page is expected within so many touches, while something repeats.
    pub(crate) fn is_soon(&self, page: PageId, near: u64) -> bool {
        self.believed().is_some() && self.distance(page) <= near
    }

    /// Changes where what is expected is another past's repetition.
    pub(crate) fn breaks(&self) -> u64 {
        self.breaks
    }

    /// How far ahead a touch of that number is expected; nothing where nothing repeats, or it is not ahead.
    pub(crate) fn ahead(&self, number: u64) -> Option<u64> {
        self.believed().and_then(|matched| number.checked_sub(matched))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(order: impl IntoIterator<Item = PageId>, pages: PageId) -> Forecast {
        let mut forecast = Forecast::default();
        forecast.forget(0..pages);
        order.into_iter().for_each(|page| forecast.touch(page));
        forecast
    }

    /// Even numbers: no page is its neighbour's successor, so that each touch counts as a step of the repetition.
    fn cycle(pages: PageId, rounds: usize) -> impl Iterator<Item = PageId> {
        (0..rounds).flat_map(move |_| (0..pages).map(|page| 2 * page))
    }

    fn ahead(forecast: &Forecast) -> impl Iterator<Item = PageId> {
        forecast.expected(0).map(|(_, page)| page)
    }

    #[test]
    fn in_a_cycle_every_page_is_expected_after_those_before_it() {
        let forecast = of(cycle(40, 3).chain([0, 2, 4]), 80);
        assert_eq!((forecast.distance(6), forecast.distance(0), forecast.distance(4)), (1, 38, 40));
        assert!(ahead(&forecast).take(40).eq((3..43).map(|page| 2 * (page % 40))));
    }

    #[test]
    fn a_sweep_there_and_back_knows_where_it_is() {
        let there_and_back = || (0..40).chain((0..39).rev()).map(|page| 2 * page);
        let round: Vec<PageId> = there_and_back().collect();
        for stop in 0..round.len() {
            let order = round.iter().chain(&round).chain(&round[..=stop]).copied();
            let forecast = of(order.clone(), 80);
            let expected: Vec<PageId> = ahead(&forecast).take(round.len() - 1).collect();
            // The touch of page 0 that ends a round and the one that begins the next are one.
            let right: Vec<PageId> =
                round[stop + 1..].iter().chain(&round[1..]).copied().take(expected.len()).collect();
            assert_eq!(expected, right, "after {stop} touches of a round");
        }
    }

    #[test]
    fn what_is_new_does_not_end_a_repetition() {
        let mut forecast = of(cycle(40, 2).chain([0, 2]), 90);
        forecast.touch(85);
        forecast.touch(4);
        assert_eq!(forecast.distance(6), 1);
        assert_eq!(ahead(&forecast).next(), Some(6));
    }

    #[test]
    fn while_nothing_repeats_the_longest_unused_is_farthest() {
        let forecast = of((0..40).map(|page| 2 * page), 80);
        assert!(forecast.distance(0) > forecast.distance(2) && forecast.distance(76) > forecast.distance(78));
        assert_eq!((forecast.distance(1), ahead(&forecast).count()), (u64::MAX, 0));
    }

    /// Misses of a memory of `frames` pages that lets the page at the largest `distance` go.
    fn misses(order: &[PageId], frames: usize, distance: impl Fn(&Forecast, PageId) -> u64) -> usize {
        let mut forecast = of([], 1 + order.iter().max().unwrap());
        let (mut resident, mut misses) = (Vec::new(), 0);
        for &page in order {
            forecast.touch(page);
            if !resident.contains(&page) {
                misses += 1;
                if resident.len() == frames {
                    let farthest = (0..frames).max_by_key(|i| distance(&forecast, resident[*i])).unwrap();
                    resident.swap_remove(farthest);
                }
                resident.push(page);
            }
        }
        misses
    }

    /// Belady's optimum itself, which knows the order.
    fn least_misses(order: &[PageId], frames: usize) -> usize {
        let (mut resident, mut misses) = (Vec::<PageId>::new(), 0);
        for (i, page) in order.iter().enumerate() {
            if !resident.contains(page) {
                misses += 1;
                if resident.len() == frames {
                    let next = |page: &PageId| order[i..].iter().position(|other| other == page).unwrap_or(order.len());
                    let farthest = (0..frames).max_by_key(|j| next(&resident[*j])).unwrap();
                    resident.swap_remove(farthest);
                }
                resident.push(*page);
            }
        }
        misses
    }

    #[test]
    fn a_cycle_misses_what_the_optimum_misses_where_lru_misses_everything() {
        let order: Vec<PageId> = cycle(50, 20).collect();
        let lru = misses(&order, 40, |forecast, page| forecast.now - forecast.last[page as usize]);
        assert_eq!(lru, order.len());
        let ours = misses(&order, 40, Forecast::distance);
        // Until the repetition is believed (two rounds at the most) it is LRU.
        assert!(ours <= least_misses(&order, 40) + 2 * 50, "{ours} misses");
    }

    #[test]
    fn a_training_step_misses_what_the_optimum_misses() {
        // Weights forward and backward (even numbers), then the optimiser's states.
        let step = || (0..40).chain((0..40).rev()).chain(100..140).map(|page| 2 * page);
        let order: Vec<PageId> = (0..12).flat_map(|_| step()).collect();
        for frames in [20, 40, 60] {
            let (ours, least) = (misses(&order, frames, Forecast::distance), least_misses(&order, frames));
            assert!(ours <= least + 2 * 120, "{frames} frames: {ours} misses, at least {least}");
        }
    }
}
