//! How a product is cut: k into segments, rows and columns into tasks.

use super::micro::{Geometry, Order};
use super::operand::Term;
use super::{DEPTH, GROUP};
use crate::simd::tiles;
use crate::threads::Threads;
use std::ops::Range;

/// Panels of the left operand that a task packs.
pub(super) const PACKED_PANELS: usize = 8;

/// Products below this many FMAs take less time than waking a thread.
const ALONE: usize = 1 << 20;

/// Panels of the right operand that a task packs at a time: with DEPTH, an eighth of L2.
pub(super) const MOST_PANELS: usize = 4;

/// At most DEPTH units of one term's k.
#[derive(Clone, Debug)]
pub(super) struct Segment<'a> {
    pub term: &'a Term<'a>,
    pub ks: Range<usize>,
    /// `ks` as units.
    pub units: usize,
    pub left: Source<'a>,
}

/// Where a tile finds its rows of the left operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Source<'a> {
    /// As they are stored.
    Stored,
    /// In panels that the product packs.
    Packed,
    /// In panels that there were: the segment's, and those after it.
    Given(&'a [f32]),
}

/// All k of all terms, in order.
pub(super) fn segments<'a>(terms: &'a [Term<'a>], rows: usize, columns: usize, g: Geometry) -> Vec<Segment<'a>> {
    // Packing pays where elements are read more than twice afterwards.
    let reread = columns > 2 * g.columns && rows > g.rows;
    let cut = |term: &'a Term<'a>| {
        let starts = (0..term.k).step_by(DEPTH * g.k);
        starts.map(move |start| {
            let ks = start..term.k.min(start + DEPTH * g.k);
            let left = match term.left.panels {
                Some(panels) => Source::Given(&panels[start / g.k * packed_rows(rows, g)..]),
                None if reread || term.left.transposed || !g.stored => Source::Packed,
                None => Source::Stored,
            };
            Segment { term, units: g.units(ks.len()), ks, left }
        })
    };
    terms.iter().flat_map(cut).collect()
}

/// The first segments, GROUP units together at most (but one segment at least).
pub(super) fn group<'a, 'b>(segments: &'b [Segment<'a>]) -> &'b [Segment<'a>] {
    let mut units = 0;
    let count = segments.iter().take_while(|segment| {
        units += segment.units;
        units <= GROUP
    });
    &segments[..count.count()]
}

/// Part i of 0 … len cut into `parts` nearly equal ones.
pub(crate) fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}

/// Rows cut into panels, none above a tile's height: nearly equal ones, or of whole tiles all but the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels {
    pub count: usize,
    rows: usize,
    /// Every panel's height (of whole tiles: all but the last's); the first `taller` have one row more.
    height: usize,
    taller: usize,
}

impl Panels {
    #[inline(always)]
    pub(super) fn new(rows: usize, g: Geometry) -> Self {
        let count = rows.div_ceil(g.rows);
        match g.left {
            Order::Columns => Self { count, rows, height: rows / count.max(1), taller: rows % count.max(1) },
            Order::Tiles => Self { count, rows, height: g.rows, taller: 0 },
        }
    }

    /// The rows of a panel; where it is packed, its units start at those of as many whole rows.
    #[inline(always)]
    pub(super) fn rows(&self, panel: usize) -> Range<usize> {
        let start = panel * self.height + panel.min(self.taller);
        start..self.rows.min(start + self.height + usize::from(panel < self.taller))
    }
}

/// Rows that the packed panels of so many take.
#[inline(always)]
pub(super) fn packed_rows(rows: usize, g: Geometry) -> usize {
    match g.left {
        Order::Columns => rows,
        Order::Tiles => rows.next_multiple_of(tiles::ROWS),
    }
}

/// The tasks of a product.
#[derive(Debug)]
pub(super) struct Plan {
    /// Panels of columns a task.
    pub panels: usize,
    /// Tasks that share the rows.
    pub row_tasks: usize,
    pub parallel: bool,
}

impl Plan {
    /// The cut that lets the last thread finish first, by counting tiles.
    ///
    /// A task costs its tiles; packing a panel of columns costs about as much as 3/2 of a tile, and bringing a panel
    /// of rows to L2 about a third.
    pub(super) fn new(rows: usize, columns: usize, terms: &[Term], g: Geometry, threads: usize) -> Self {
        let depth: usize = terms.iter().map(|term| term.k).sum();
        if threads == 1 || rows * columns * depth < ALONE {
            return Self { panels: MOST_PANELS, row_tasks: 1, parallel: false };
        }
        let (row_panels, column_panels) = (rows.div_ceil(g.rows), columns.div_ceil(g.columns));
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
