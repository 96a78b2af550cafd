//! General matrix multiplication: C [m, n] = or += Σ_terms A·B on any stored right operand, of f32 or of both operands
//! rounded to bf16, with sums in f32.
//!
//! The scheme of Goto & van de Geijn (2008, "Anatomy of high-performance matrix multiplication"), with the cores'
//! private caches in its middle:
//!
//! ```text
//! for rows of C, ROWS at a time
//!   for k of all terms, GROUP at a time
//!     pack A [rows, k] into panels, on all threads                 (shared; in L3)
//!     tasks: columns of C, a few panels at a time, on all threads
//!       for k of the group, DEPTH at a time
//!         pack B [DEPTH, columns] into panels, decoding it         (the thread's own; in L2)
//!         for rows, L2_ROWS at a time                              (A's block comes to L2)
//!           for panels of B                                        (one in L1)
//!             for panels of A: the microkernel                     (a tile of C in registers)
//! ```
//!
//! So a weight is decoded once for every ROWS rows of activations, in a buffer that never leaves its core's L2. Where
//! there are few columns, tasks take some of the rows each, and A is read as it lies, without packing.
//!
//! k is counted in units here: an f32, or two bf16 (`unit.rs`). What else depends on the precision and the machine is
//! the microkernel (`micro.rs`), which says how large a tile is and how the panels of A lie.
//!
//! An element of C is the sum, in this order, of what the microkernel makes of every DEPTH of k; nothing else of the
//! above touches its bits, neither tiles nor tasks nor threads.
//!
//! Products of a few rows are bound by reading the right operand, not by arithmetic, and go another way: `few`. Kernels
//! that multiply blocks which they make themselves use the same panels and microkernels through `near`.
//!
//! Read `operand.rs`, this file, `unit.rs` and `micro.rs`, `pack.rs` and `quantized.rs`, `tile.rs`, `amx.rs`; `few`;
//! `near.rs`.

mod amx;
mod few;
mod micro;
pub(crate) mod near;
mod operand;
mod pack;
mod plan;
mod quantized;
mod tile;
mod unit;

pub(crate) use operand::{Left, QuantSlice, Right, Term, WeightSlice};
pub(crate) use plan::part;

use crate::scratch;
use crate::simd::{Isa, Simd};
use crate::threads::Threads;
use micro::{Geometry, Micro, Product};
use plan::{Segment, Source};
use rankfold_backend::Compute;
use std::ops::Range;
use tile::Tile;

/// Units of k that a tile of C stays for: a panel of B (2·LANES columns) takes 16 or 32 KiB, of L1.
const DEPTH: usize = 256;

/// Units of k that are packed at a time.
const GROUP: usize = 2048;

/// Rows that are packed at a time: with GROUP, at most 8 MiB.
pub(crate) const ROWS: usize = 1024;

/// Packing fewer elements takes less time than handing work to a thread.
const PACKED_ALONE: usize = 1 << 15;

/// Rows whose packed block of DEPTH takes about a third of L2.
const L2_ROWS: usize = 168;

/// Products on some threads with some instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm<'a> {
    /// Who works.
    pub threads: &'a Threads,
    /// With which instructions.
    pub isa: Isa,
    /// In which precision the operands are taken.
    pub compute: Compute,
}

/// Where a product goes: c ← scale ∘ (c + Σ) + bias, c taken as 0 without `accumulate`.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    /// [rows, columns]
    pub c: &'a mut [f32],
    /// Rows of c: m.
    pub rows: usize,
    /// Columns of c: n.
    pub columns: usize,
    /// Add to what c holds.
    pub accumulate: bool,
    /// A factor a column.
    pub scale: Option<&'a [f32]>,
    /// A summand a column.
    pub bias: Option<&'a [f32]>,
}

impl<'a> Output<'a> {
    /// c = Σ, nothing else.
    pub(crate) fn new(c: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self { c, rows, columns, accumulate: false, scale: None, bias: None }
    }
}

impl Gemm<'_> {
    /// c ← scale ∘ (c + Σ_terms left·right) + bias
    ///
    /// # Panics
    /// Where a slice's length is not what the dimensions say.
    pub(crate) fn product(&self, terms: &[Term], output: Output) {
        let Output { c, rows, columns, accumulate, scale, bias } = output;
        assert_eq!(c.len(), rows * columns, "c of the product");
        assert!(scale.is_none_or(|s| s.len() == columns) && bias.is_none_or(|b| b.len() == columns));
        terms.iter().for_each(|term| term.assert_lengths(rows, columns));
        if c.is_empty() {
            return;
        }
        let geometry = micro::geometry(self.isa, self.compute);
        if few::serves(terms, rows) {
            return self.few(geometry, terms, Output { c, rows, columns, accumulate, scale, bias });
        }
        let segments = plan::segments(terms, rows, columns, geometry);
        if segments.is_empty() && !accumulate {
            c.fill(0.0);
        }
        let c = Shared(c.as_mut_ptr());
        let plan = plan::Plan::new(rows.min(ROWS), columns, terms, geometry, self.threads.count());
        for first_row in (0..rows).step_by(ROWS) {
            let rows = first_row..rows.min(first_row + ROWS);
            let mut done = 0;
            loop {
                let group = plan::group(&segments[done..]);
                let packed: usize = group.iter().filter(|s| s.left == Source::Packed).map(|s| s.units).sum();
                let block = Block {
                    rows: rows.clone(),
                    columns: 0..columns,
                    segments: group,
                    accumulate: accumulate || done > 0,
                    c,
                    c_stride: columns,
                    finish: (done + group.len() == segments.len()).then_some((scale, bias)),
                };
                let packed = packed * plan::packed_rows(rows.len(), geometry);
                scratch::with(packed, |a| self.group(&plan, geometry, block, a));
                done += group.len();
                if done == segments.len() {
                    break;
                }
            }
        }
    }

    /// `f` on a left operand whose panels are packed once, for all of f's products with it, where a block of rows and a
    /// group of k hold it; elsewhere on what each packs for itself. More than a few rows, for other kernels take those.
    pub(crate) fn with_left<R>(&self, left: Left, rows: usize, k: usize, f: impl FnOnce(Left) -> R) -> R {
        let geometry = micro::geometry(self.isa, self.compute);
        if rows > ROWS || geometry.units(k) > GROUP || rows <= few::MOST_DOTS {
            return f(left);
        }
        let right = Right::rows(WeightSlice::from(&[][..]), 0);
        let term = [Term { left, right, k }];
        let mut segments = plan::segments(&term, rows, 0, geometry);
        segments.iter_mut().for_each(|segment| segment.left = Source::Packed);
        scratch::with(geometry.units(k) * plan::packed_rows(rows, geometry), |a| {
            let parallel = rows * k >= PACKED_ALONE;
            self.pack(parallel, geometry, 0..rows, &segments, a);
            f(Left { panels: Some(a), ..left })
        })
    }

    /// Pack rows of the left operands of those segments that are to be packed.
    fn pack(&self, parallel: bool, geometry: Geometry, rows: Range<usize>, segments: &[Segment], a: &mut [f32]) {
        let panels = plan::Panels::new(rows.len(), geometry).count;
        let out = Shared(a.as_mut_ptr());
        let task = |task: usize| {
            let panels = task * plan::PACKED_PANELS..panels.min((task + 1) * plan::PACKED_PANELS);
            self.run(PackLeft { rows: rows.clone(), segments, panels, out });
        };
        let tasks = panels.div_ceil(plan::PACKED_PANELS);
        if parallel { self.threads.run(tasks, task) } else { (0..tasks).for_each(task) }
    }

    /// Pack the left operand's rows, then run the tasks.
    fn group(&self, plan: &plan::Plan, geometry: Geometry, block: Block, a: &mut [f32]) {
        let panels = plan::Panels::new(block.rows.len(), geometry).count;
        if !a.is_empty() {
            self.pack(plan.parallel, geometry, block.rows.clone(), block.segments, a);
        }
        let packed = Shared(a.as_mut_ptr());
        let width = plan.panels * geometry.columns;
        let column_tasks = block.columns.len().div_ceil(width);
        plan.run(self.threads, column_tasks * plan.row_tasks, |task| {
            let (row_task, column_task) = (task / column_tasks, task % column_tasks);
            let panels = part(panels, plan.row_tasks, row_task);
            let columns = column_task * width..block.columns.end.min((column_task + 1) * width);
            let block = Block { columns, ..block.clone() };
            scratch::with(width * DEPTH, |b| {
                self.run(Multiply { block, panels, packed, b });
            });
        });
    }

    /// Run `product` on the microkernel for this instruction set and precision.
    fn run<P: Product>(&self, product: P) -> P::Output {
        micro::run(self.isa, self.compute, product)
    }
}

/// A pointer that tasks share; each writes its own elements.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: it is used within `product` alone, which borrows the memory; tasks of one run write disjoint elements, and
// read what an earlier run wrote.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// What lies `offset` elements further on.
    ///
    /// # Safety
    /// It is within the same memory.
    unsafe fn at(self, offset: usize) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { self.0.add(offset) })
    }
}

/// What is done to a tile of c when its sums are complete: its scale and its bias.
type Finish<'a> = (Option<&'a [f32]>, Option<&'a [f32]>);

/// A part of c, and the part of its sums that one group of segments makes.
#[derive(Clone)]
struct Block<'a> {
    rows: Range<usize>,
    columns: Range<usize>,
    segments: &'a [Segment<'a>],
    accumulate: bool,
    c: Shared,
    c_stride: usize,
    finish: Option<Finish<'a>>,
}

/// Packs panels of the left operand: those of a segment lie one after the other, segments too.
struct PackLeft<'a> {
    rows: Range<usize>,
    segments: &'a [Segment<'a>],
    panels: Range<usize>,
    out: Shared,
}

impl Product for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        let cut = plan::Panels::new(self.rows.len(), M::GEOMETRY);
        let mut offset = 0;
        for segment in self.segments.iter().filter(|segment| segment.left == Source::Packed) {
            for panel in self.panels.clone() {
                let rows = cut.rows(panel);
                // SAFETY: the buffer holds the panels of every packed segment, each its own part.
                unsafe {
                    let out = self.out.0.add(offset + rows.start * segment.units);
                    let first = self.rows.start;
                    let rows = first + rows.start..first + rows.end;
                    pack::left::<S, M>(segment.term.left, rows, segment.ks.clone(), out);
                }
            }
            offset += segment.units * plan::packed_rows(self.rows.len(), M::GEOMETRY);
        }
    }
}

/// One task: some panels of rows by some columns, over all segments of a group.
struct Multiply<'a> {
    block: Block<'a>,
    panels: Range<usize>,
    packed: Shared,
    b: &'a mut [f32],
}

impl Product for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd, M: Micro<S>>(self) {
        let (block, width) = (&self.block, M::GEOMETRY.columns);
        let cut = plan::Panels::new(block.rows.len(), M::GEOMETRY);
        let at_once = L2_ROWS / M::GEOMETRY.rows;
        let mut offset = 0;
        // SAFETY: the machine has what M uses.
        unsafe { M::begin() };
        for (i, segment) in block.segments.iter().enumerate() {
            let units = segment.units;
            let left = segment.term.left;
            // SAFETY: the buffers hold the panels as they were packed; `product` checked the operands' lengths; this
            // task alone writes its tiles of c.
            unsafe {
                let b = self.b.as_mut_ptr();
                pack::right::<S, M>(segment.term.right, segment.ks.clone(), block.columns.clone(), b);
                for first in self.panels.clone().step_by(at_once) {
                    let panels = first..self.panels.end.min(first + at_once);
                    for column in block.columns.clone().step_by(width) {
                        for panel in panels.clone() {
                            let rows = cut.rows(panel);
                            let row = block.rows.start + rows.start;
                            let tile = Tile {
                                units,
                                a: match segment.left {
                                    Source::Packed => self.packed.0.add(offset + rows.start * units),
                                    Source::Given(panels) => panels.as_ptr().add(rows.start * units),
                                    Source::Stored => left.data.as_ptr().add(row * left.stride + segment.ks.start),
                                },
                                stride: (segment.left == Source::Stored).then_some(left.stride),
                                b: b.add((column - block.columns.start) * units),
                                c: block.c.0.add(row * block.c_stride + column),
                                c_stride: block.c_stride,
                                columns: width.min(block.columns.end - column),
                                accumulate: block.accumulate || i > 0,
                            };
                            M::tile(tile, rows.len());
                        }
                    }
                }
            }
            if segment.left == Source::Packed {
                offset += units * plan::packed_rows(block.rows.len(), M::GEOMETRY);
            }
        }
        // SAFETY: as above.
        unsafe { M::end() };
        let Some((scale, bias)) = block.finish else { return };
        if (scale.is_none() && bias.is_none()) || self.panels.is_empty() {
            return;
        }
        let first = cut.rows(self.panels.start).start;
        let end = cut.rows(self.panels.end - 1).end;
        for row in block.rows.start + first..block.rows.start + end {
            // SAFETY: this task's own part of the row.
            let c = unsafe {
                let start = block.c.0.add(row * block.c_stride + block.columns.start);
                std::slice::from_raw_parts_mut(start, block.columns.len())
            };
            if let Some(scale) = scale {
                c.iter_mut().zip(&scale[block.columns.clone()]).for_each(|(c, scale)| *c *= scale);
            }
            if let Some(bias) = bias {
                c.iter_mut().zip(&bias[block.columns.clone()]).for_each(|(c, bias)| *c += bias);
            }
        }
    }
}

#[cfg(test)]
mod tests;
