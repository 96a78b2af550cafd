//! How a product is cut: k into segments, rows and columns into tasks.

use super::operand::Term;
use super::{DEPTH, GROUP, tile};
use crate::threads::Threads;
use std::ops::Range;

/// Panels of the left operand that a task packs.
pub(super) const PACKED_PANELS: usize = 8;

/// Products below this many FMAs take less time than waking a thread.
const ALONE: usize = 1 << 20;

/// Panels of the right operand that a task packs at a time: with DEPTH, an eighth of L2.
pub(super) const MOST_PANELS: usize = 4;

/// At most DEPTH of one term's k.
#[derive(Clone, Debug)]
pub(super) struct Segment<'a> {
    pub term: &'a Term<'a>,
    pub ks: Range<usize>,
    /// Whether the left operand is packed; else it is read as it lies.
    pub packed: bool,
}

/// All k of all terms, in order.
pub(super) fn segments<'a>(terms: &'a [Term<'a>], rows: usize, columns: usize, lanes: usize) -> Vec<Segment<'a>> {
    // Packing pays where elements are read more than twice afterwards.
    let reread = columns > 2 * tile::columns(lanes) && rows > tile::rows(lanes);
    let cut = |term: &'a Term<'a>| {
        let starts = (0..term.k).step_by(DEPTH);
        let packed = reread || term.left.transposed;
        starts.map(move |start| Segment { term, ks: start..term.k.min(start + DEPTH), packed })
    };
    terms.iter().flat_map(cut).collect()
}

/// The first segments, GROUP of k together at most (but one segment at least).
pub(super) fn group<'a, 'b>(segments: &'b [Segment<'a>]) -> &'b [Segment<'a>] {
    let mut depth = 0;
    let count = segments.iter().take_while(|segment| {
        depth += segment.ks.len();
        depth <= GROUP
    });
    &segments[..count.count()]
}

/// Part i of 0 … len cut into `parts` nearly equal ones.
pub(super) fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}

/// Rows cut into panels of nearly equal height, none above a tile's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels {
    pub count: usize,
    /// Every panel's height; the first `taller` have one row more.
    height: usize,
    taller: usize,
}

impl Panels {
    #[inline(always)]
    pub(super) fn new(rows: usize, lanes: usize) -> Self {
        let count = rows.div_ceil(tile::rows(lanes));
        Self { count, height: rows / count.max(1), taller: rows % count.max(1) }
    }

    /// The rows of a panel.
    #[inline(always)]
    pub(super) fn rows(&self, panel: usize) -> Range<usize> {
        let start = panel * self.height + panel.min(self.taller);
        start..start + self.height + usize::from(panel < self.taller)
    }
}

/// The tasks of a product.
#[derive(Debug)]
pub(super) struct Plan {
    /// Panels of columns a task.
    pub panels: usize,
    /// Tasks that share the rows.
    pub row_tasks: usize,
    parallel: bool,
}

impl Plan {
    /// The cut that lets the last thread finish first, by counting tiles.
    ///
    /// A task costs its tiles; packing a panel of columns costs about as much as 3/2 of a tile, and bringing a panel
    /// of rows to L2 about a third.
    pub(super) fn new(rows: usize, columns: usize, terms: &[Term], lanes: usize, threads: usize) -> Self {
        let depth: usize = terms.iter().map(|term| term.k).sum();
        if threads == 1 || rows * columns * depth < ALONE {
            return Self { panels: MOST_PANELS, row_tasks: 1, parallel: false };
        }
        let (row_panels, column_panels) = (rows.div_ceil(tile::rows(lanes)), columns.div_ceil(tile::columns(lanes)));
        let cost = |panels: usize, row_tasks: usize| {
            let rounds = (column_panels.div_ceil(panels) * row_tasks).div_ceil(threads);
            let task_rows = row_panels.div_ceil(row_tasks);
            rounds * (6 * task_rows * panels + 9 * panels + 2 * task_rows)
        };
        let cuts = (1..=MOST_PANELS).rev().flat_map(|panels| {
            (0..10).map(move |i| (panels, 1 << i)).filter(|(_, row_tasks)| *row_tasks <= row_panels)
        });
        let (panels, row_tasks) =
            cuts.min_by_key(|&(panels, row_tasks)| cost(panels, row_tasks)).unwrap_or((MOST_PANELS, 1));
        Self { panels, row_tasks, parallel: true }
    }

    /// `f(0)`, …, on all threads or on this one.
    pub(super) fn run(&self, threads: &Threads, tasks: usize, f: impl Fn(usize) + Sync) {
        if self.parallel { threads.run(tasks, f) } else { (0..tasks).for_each(f) }
    }
}
