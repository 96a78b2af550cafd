//! The working memory of the CPU backend's kernels.
//!
//! A thread keeps its buffers as a stack: a use within a use takes the next one, and each grows to the most that was
//! ever asked of its place. So what matters of a call is how much it asks for at which depth. Tasks run on every
//! thread: on the caller's at the depth that the call has reached, on the others at the bottom.

use rankfold_backend::params::{Attention, Linear};
use rankfold_backend::{Compute, LowRank};

/// What one call asks for, in elements of f32.
#[derive(Debug, Default)]
pub(super) struct Nest {
    /// On the calling thread, by depth.
    main: Vec<usize>,
    /// On any other.
    task: usize,
}

/// The GEMM packs so many rows and so much of k of its left operand at a time,
const PACKED_ROWS: usize = 1024;
const PACKED_DEPTH: usize = 2048;
/// where it has more columns than this (or is stored transposed);
const UNPACKED_COLUMNS: usize = 64;
/// and a thread this much of its right operand: 4 panels of 32 columns, 256 deep.
const PANELS: usize = 4 * 32 * 256;
/// Attention's blocks of queries and keys, what a head is padded to a multiple of, alone and as columns of a panel, and
/// the rows of the highest tile but AMX's.
const QUERIES: usize = 64;
const KEYS: usize = 64;
const PAD: usize = 16;
const COLUMNS: usize = 32;
const TILE: usize = 14;
/// Elements of a task of a kernel that works row by row.
const CHUNK: usize = 1 << 14;

impl Nest {
    /// What is packed of a left operand at a time. In bf16 that depends on the machine's units: at the most, an f32 an
    /// element, of whole tiles of 16 by 16.
    fn panels(m: usize, k: usize, compute: Compute) -> usize {
        let whole = |n: usize| if compute == Compute::Bf16 { n.next_multiple_of(16) } else { n };
        whole(m.min(PACKED_ROWS)) * whole(k).min(PACKED_DEPTH)
    }

    fn with(&mut self, depth: usize, elements: usize) {
        if self.main.len() <= depth {
            self.main.resize(depth + 1, 0);
        }
        self.main[depth] = self.main[depth].max(elements);
    }

    fn task(&mut self, depth: usize, elements: usize) {
        self.with(depth, elements);
        self.task = self.task.max(elements);
    }

    /// [m, k] · [k, n], the left operand stored as it is or transposed.
    fn product(&mut self, depth: usize, [m, n, k]: [usize; 3], transposed: bool, compute: Compute) {
        let packs = transposed || n > UNPACKED_COLUMNS || compute == Compute::Bf16;
        self.with(depth, if packs { Self::panels(m, k, compute) } else { 0 });
        self.task(depth + 1, PANELS);
    }

    pub(super) fn linear(p: &Linear, low_rank: Option<&LowRank>) -> Self {
        let (mut nest, m, n, k) = (Self::default(), p.tokens, p.outputs, p.inputs);
        let Some(l) = low_rank else {
            nest.product(0, [m, n, k], false, p.compute);
            return nest;
        };
        match l.dropout {
            None => nest.updated(0, [m, n, k], l.rank, p.compute),
            Some(_) => {
                nest.with(0, m * k);
                nest.hidden(1, [m, l.rank, k], p.compute);
                nest.product(2, [m, n, k + l.rank], false, p.compute);
            }
        }
        nest
    }

    pub(super) fn linear_grad_input(p: &Linear, low_rank: Option<&LowRank>) -> Self {
        let (mut nest, m, n, k) = (Self::default(), p.tokens, p.outputs, p.inputs);
        let Some(l) = low_rank else {
            nest.product(0, [m, k, n], false, p.compute);
            return nest;
        };
        let mut depth = 0;
        if l.row_scale.is_some() {
            nest.with(depth, m * n);
            depth += 1;
        }
        match l.dropout {
            None => nest.updated(depth, [m, k, n], l.rank, p.compute),
            Some(_) => {
                nest.hidden(depth, [m, l.rank, n], p.compute);
                nest.with(depth + 1, m * k);
                nest.with(depth + 2, m * k);
                nest.product(depth + 2, [m, k, n + l.rank], false, p.compute);
            }
        }
        nest
    }

    pub(super) fn linear_grad_weight(p: &Linear, low_rank: Option<&LowRank>, weight: bool, update: bool) -> Self {
        let (mut nest, m, n, k) = (Self::default(), p.tokens, p.outputs, p.inputs);
        if weight {
            nest.product(0, [n, k, m], true, p.compute);
        }
        let Some(l) = low_rank.filter(|_| update) else { return nest };
        let mut depth = 0;
        if l.dropout.is_some() {
            nest.with(depth, m * k);
            depth += 1;
        }
        if l.row_scale.is_some() {
            nest.with(depth, m * n);
            depth += 1;
        }
        nest.with(depth, 2 * m * l.rank);
        nest.product(depth + 1, [m, l.rank, n.max(k)], false, p.compute);
        nest.product(depth + 1, [l.rank, k, m], true, p.compute);
        nest.with(depth + 1, l.rank * n);
        nest.product(depth + 2, [l.rank, n, m], true, p.compute);
        if l.row_scale.is_some() {
            nest.with(depth + 1, m * n);
            nest.product(depth + 2, [m, n, k + l.rank], false, p.compute);
        }
        nest
    }

    /// [m, k] · [k, n] and its low-rank update, on panels of the left operand that both use, a block of rows at a time.
    fn updated(&mut self, depth: usize, [m, n, k]: [usize; 3], rank: usize, compute: Compute) {
        let m = m.min(PACKED_ROWS);
        // Two bf16 may be one unit of k: what is packed for both is then no more than for each.
        if k > PACKED_DEPTH {
            self.hidden(depth, [m, rank, k], compute);
            return self.product(depth + 1, [m, n, k + rank], false, compute);
        }
        self.with(depth, Self::panels(m, k, compute));
        // The update's own product finds all of its left operand packed; the weight's packs that product.
        self.with(depth + 1, m * rank);
        self.with(depth + 2, rank.max(Self::panels(m, rank, compute)));
        self.task(depth + 3, PANELS);
        self.task(depth + 4, PANELS);
    }

    /// [m, rank] of the low-rank update, formed at the depth where it is kept.
    fn hidden(&mut self, depth: usize, [m, rank, k]: [usize; 3], compute: Compute) {
        self.with(depth, m * rank);
        self.with(depth + 1, rank);
        self.product(depth + 2, [m, rank, k], false, compute);
    }

    pub(super) fn attention(p: &Attention) -> Self {
        let room = Heads::of(p);
        let mut nest = Self::default();
        nest.task(0, 2 * room.keys + room.queries + QUERIES * (room.width + 2) + 2 * TILE * KEYS);
        nest
    }

    pub(super) fn attention_grad(p: &Attention) -> Self {
        let room = Heads::of(p);
        let mut nest = Self::default();
        let of_keys = 3 * room.keys + 2 * p.keys.next_multiple_of(KEYS) * room.width;
        nest.task(0, of_keys + 4 * room.queries + QUERIES * (room.width + 1 + 2 * KEYS) + TILE * KEYS);
        nest
    }

    /// The parts of a sum over rows (a gain's gradient, a factor's, a score's), one a task.
    pub(super) fn column_sums(rows: usize, width: usize) -> Self {
        Self::of(rows.div_ceil((CHUNK / width.max(1)).max(1)) * width)
    }

    /// Elements on the calling thread alone.
    pub(super) fn of(elements: usize) -> Self {
        Self { main: vec![elements], task: 0 }
    }
}

/// What attention packs of one head. In bf16 that depends on the machine's units: at the most, an f32 an element.
struct Heads {
    width: usize,
    /// All keys, and a block of queries.
    keys: usize,
    queries: usize,
}

impl Heads {
    fn of(p: &Attention) -> Self {
        let columns = p.head_dim.next_multiple_of(COLUMNS);
        let keys = p.keys.next_multiple_of(KEYS) * columns;
        Self { width: p.head_dim.next_multiple_of(PAD), keys, queries: QUERIES * columns }
    }
}

/// What all calls so far have asked for, in elements.
#[derive(Debug, Default)]
pub(super) struct Scratch(Nest);

impl Scratch {
    /// Add a call; whether it asked for more than those before it.
    pub(super) fn grow(&mut self, nest: &Nest) -> bool {
        let before = self.bytes();
        for (depth, elements) in nest.main.iter().enumerate() {
            self.0.with(depth, *elements);
        }
        self.0.task = self.0.task.max(nest.task);
        self.bytes() != before
    }

    /// Bytes of the calling thread's buffers, in whole cache lines, and of each other thread's.
    pub(super) fn bytes(&self) -> [u64; 2] {
        let lines = |elements: &usize| elements.div_ceil(16) as u64 * 64;
        [self.0.main.iter().map(lines).sum(), lines(&self.0.task)]
    }
}
