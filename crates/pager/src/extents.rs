//! Who has which pages of the file: first fit over its free runs.
//!
//! The free runs below the end of the file are kept by their first page, each as long as it can be: a run that is
//! given back melts into its neighbours, and into the end where it touches that. A place is the lowest free run that
//! holds it, or the end. So the places depend on the order of the calls alone.
//!
//! First fit looks at every run in the worst case; there are at most as many as allocations.

use std::collections::BTreeMap;

/// A place in the file: `pages` pages from page `first` on. It cannot be copied, so it is given back once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a place that is not given back stays taken"]
pub(crate) struct Extent {
    pub(crate) first: u64,
    pub(crate) pages: usize,
}

/// The free and the taken pages of a file.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    /// Pages of each free run by its first page; no two touch, and none touches the end.
    free: BTreeMap<u64, u64>,
    /// One past the last page taken.
    end: u64,
}

impl Extents {
    /// The lowest place of `pages` pages, at least one.
    pub(crate) fn reserve(&mut self, pages: usize) -> Extent {
        debug_assert!(pages > 0, "a place of no pages");
        let wanted = pages as u64;
        let fitting = self.free.iter().find(|&(_, &run)| run >= wanted).map(|(&first, &run)| (first, run));
        let first = match fitting {
            Some((first, run)) => {
                self.free.remove(&first);
                if run > wanted {
                    self.free.insert(first + wanted, run - wanted);
                }
                first
            }
            None => {
                self.end += wanted;
                self.end - wanted
            }
        };
        Extent { first, pages }
    }

    /// Give a place back.
    pub(crate) fn free(&mut self, extent: Extent) {
        let (mut first, mut end) = (extent.first, extent.first + extent.pages as u64);
        if let Some((&before, &run)) = self.free.range(..first).next_back()
            && before + run == first
        {
            self.free.remove(&before);
            first = before;
        }
        if let Some(run) = self.free.remove(&end) {
            end += run;
        }
        if end == self.end {
            self.end = first;
        } else {
            self.free.insert(first, end - first);
        }
    }

    /// One past the last page taken.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// How much of what is free below the end is not in its largest run: 1 − largest / all, 0 where nothing is free.
    pub(crate) fn fragmentation(&self) -> f64 {
        let all: u64 = self.free.values().sum();
        let largest = self.free.values().max().copied().unwrap_or(0);
        if all == 0 { 0.0 } else { 1.0 - largest as f64 / all as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same, page by page: `true` is taken; all beyond is free.
    #[derive(Default)]
    struct Bitmap(Vec<bool>);

    impl Bitmap {
        fn reserve(&mut self, pages: usize) -> u64 {
            let is_free = |page: usize| !self.0.get(page).copied().unwrap_or(false);
            let first = (0..).find(|&first| (first..first + pages).all(is_free)).unwrap();
            self.0.resize(self.0.len().max(first + pages), false);
            self.0[first..first + pages].fill(true);
            first as u64
        }

        fn free(&mut self, first: u64, pages: usize) {
            self.0[first as usize..first as usize + pages].fill(false);
            while self.0.last() == Some(&false) {
                self.0.pop();
            }
        }

        /// The free runs below the end, as long as they can be.
        fn runs(&self) -> BTreeMap<u64, u64> {
            let mut runs = BTreeMap::new();
            let mut first = 0;
            for same in self.0.chunk_by(|a, b| a == b) {
                if !same[0] {
                    runs.insert(first, same.len() as u64);
                }
                first += same.len() as u64;
            }
            runs
        }
    }

    proptest! {
        #[test]
        fn places_are_those_of_a_bitmap_and_free_runs_are_whole(
            calls in prop::collection::vec((any::<bool>(), 1usize..9, any::<prop::sample::Index>()), 1..120),
        ) {
            let (mut extents, mut bitmap, mut taken) = (Extents::default(), Bitmap::default(), Vec::new());
            for (is_free, pages, which) in calls {
                if is_free && !taken.is_empty() {
                    let extent: Extent = taken.swap_remove(which.index(taken.len()));
                    bitmap.free(extent.first, extent.pages);
                    extents.free(extent);
                } else {
                    let extent = extents.reserve(pages);
                    // The bitmap gives only pages that are free, so no two places overlap.
                    prop_assert_eq!(&extent, &Extent { first: bitmap.reserve(pages), pages });
                    taken.push(extent);
                }
                prop_assert_eq!(&extents.free, &bitmap.runs());
                prop_assert_eq!(extents.end(), bitmap.0.len() as u64);
            }
            for extent in taken {
                extents.free(extent);
            }
            prop_assert!(extents.free.is_empty() && extents.end() == 0);
        }
    }

    #[test]
    fn fragmentation_is_the_part_outside_the_largest_free_run() {
        let mut extents = Extents::default();
        assert_eq!(extents.fragmentation(), 0.0);
        let [a, b, c, d] = [1, 2, 3, 4].map(|pages| extents.reserve(pages));
        extents.free(a);
        assert_eq!(extents.fragmentation(), 0.0);
        extents.free(c);
        assert_eq!(extents.fragmentation(), 0.25);
        extents.free(b);
        assert_eq!(extents.fragmentation(), 0.0);
        extents.free(d);
        assert_eq!((extents.fragmentation(), extents.end()), (0.0, 0));
    }
}
