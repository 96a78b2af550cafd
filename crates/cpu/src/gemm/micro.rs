//! The microkernels: how panels lie, and how a tile of C is formed of two of them.
//!
//! Everything above (packing, blocking, tasks) is written once, over a [`Micro`]. There are two: [`Registers`], with a
//! tile of C in vector registers, for every instruction set and every [`Unit`]; and [`Matrix`], with it in AMX's tiles.
//!
//! A panel of the right operand has 2·LANES columns: unit (l, j) at l·2·LANES + j. How one of the left operand lies is
//! the microkernel's matter.

use super::amx::Matrix;
use super::tile::{Registers, Tile};
use super::unit::{Full, Pair, Rounded, Unit};
use crate::simd::{Bf16Kernel, Bf16Units, Isa, Kernel, Simd, Units};
use rankfold_backend::Compute;

/// How a left panel lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Column after column of h units, h the panel's own height: unit (i, l) at l·h + i.
    Columns,
    /// Tiles of 16 rows by 16 units, row by row, those of the first 16 rows before those of the others: unit (i, l) at
    /// i / 16·(16·units) + l / 16·256 + i % 16·16 + l % 16.
    Tiles,
}

/// The sizes of a microkernel's panels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Elements of k a unit.
    pub k: usize,
    /// Units of a panel are a multiple of it, zeros after the last element.
    pub units: usize,
    /// Rows of the highest tile.
    pub rows: usize,
    /// Columns of every tile.
    pub columns: usize,
    /// How left panels lie.
    pub left: Order,
    /// Whether a left operand may be read as it is stored.
    pub stored: bool,
}

impl Geometry {
    /// Units of so many elements.
    #[inline(always)]
    pub(crate) fn units(&self, k: usize) -> usize {
        k.div_ceil(self.k).next_multiple_of(self.units)
    }
}

/// A microkernel.
pub(crate) trait Micro<S: Simd>: 'static {
    /// What panels are made of.
    type Unit: Unit<S>;

    /// Its panels.
    const GEOMETRY: Geometry;

    /// Before the first tile of a task.
    ///
    /// # Safety
    /// The machine has what the microkernel uses.
    #[inline(always)]
    unsafe fn begin() {}

    /// One tile of `rows` rows.
    ///
    /// # Safety
    /// Between `begin` and `end`; rows is 1 … `GEOMETRY.rows`; the pointers are valid for what [`Tile`] names.
    unsafe fn tile(tile: Tile, rows: usize);

    /// After the last tile of a task.
    ///
    /// # Safety
    /// As for `begin`.
    #[inline(always)]
    unsafe fn end() {}
}

/// Work that is written over a microkernel.
pub(crate) trait Product {
    /// What it returns.
    type Output;
    /// Whether it uses more of a microkernel than its unit, which tiles share with pairs.
    const IN_TILES: bool = true;
    /// Do it. Implementations are `#[inline(always)]`, as those of [`Kernel`] are.
    ///
    /// # Safety
    /// The machine has S and what M uses.
    unsafe fn run<S: Simd, M: Micro<S>>(self) -> Self::Output;
}

/// Run `product` on the microkernel for this instruction set and precision.
#[inline]
pub(crate) fn run<P: Product>(isa: Isa, compute: Compute, product: P) -> P::Output {
    match (compute, isa.units()) {
        (Compute::F32, _) => isa.run(InF32(product)),
        (Compute::Bf16, Units::None) => isa.run(Widened(product)),
        (Compute::Bf16, Units::Tiles) if const { P::IN_TILES } => isa.run_bf16(OnTiles(product)),
        (Compute::Bf16, Units::Pairs | Units::Tiles) => isa.run_bf16(OnPairs(product)),
    }
}

/// Its sizes.
pub(crate) fn geometry(isa: Isa, compute: Compute) -> Geometry {
    struct Sizes;
    impl Product for Sizes {
        type Output = Geometry;
        #[inline(always)]
        unsafe fn run<S: Simd, M: Micro<S>>(self) -> Geometry {
            M::GEOMETRY
        }
    }
    run(isa, compute, Sizes)
}

struct InF32<P>(P);

impl<P: Product> Kernel for InF32<P> {
    type Output = P::Output;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> P::Output {
        // SAFETY: the caller's.
        unsafe { self.0.run::<S, Registers<Full>>() }
    }
}

struct Widened<P>(P);

impl<P: Product> Kernel for Widened<P> {
    type Output = P::Output;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> P::Output {
        // SAFETY: the caller's.
        unsafe { self.0.run::<S, Registers<Rounded>>() }
    }
}

struct OnPairs<P>(P);

impl<P: Product> Bf16Kernel for OnPairs<P> {
    type Output = P::Output;
    #[inline(always)]
    unsafe fn run<S: Bf16Units>(self) -> P::Output {
        // SAFETY: the caller's.
        unsafe { self.0.run::<S, Registers<Pair>>() }
    }
}

struct OnTiles<P>(P);

impl<P: Product> Bf16Kernel for OnTiles<P> {
    type Output = P::Output;
    #[inline(always)]
    unsafe fn run<S: Bf16Units>(self) -> P::Output {
        // SAFETY: the caller's, whose machine has tiles too: see `run`.
        unsafe { self.0.run::<S, Matrix>() }
    }
}
