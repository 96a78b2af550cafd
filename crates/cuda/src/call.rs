//! One kernel of the contract on its way to the device: views become arguments, with errors that name the kernel and
//! the tensor.
//!
//! A call keeps what it gave addresses of in place for as long as it lives, and it is by a call that the device is
//! reached: an operation makes one, takes its addresses from it, and launches through it.

use crate::memory::{BufferMemory, DeviceMemory, Holds};
use crate::{Argument, CudaBackend, Driver, Launch, NAME};
use rankfold_backend::{DType, Element, Error, Result, View, ViewMut};

/// A call of a kernel of the contract.
pub(crate) struct Call<'a> {
    pub(crate) on: &'a CudaBackend,
    /// The kernel's name in errors.
    pub(crate) kernel: &'static str,
    holds: Holds,
}

/// The float types that weights, tables and casts come in.
pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    blocks: [u64; 3],
    threads: u32,
    shared: u32,
}

impl Grid {
    /// This many blocks of this many threads.
    pub(crate) fn blocks(blocks: usize, threads: u32) -> Self {
        Self::cube([blocks, 1, 1], threads)
    }

    /// Blocks in three dimensions.
    pub(crate) fn cube(blocks: [usize; 3], threads: u32) -> Self {
        Self { blocks: blocks.map(|n| n as u64), threads, shared: 0 }
    }

    /// Blocks that stride over `n` elements, one or more a thread: enough of them to fill any device.
    pub(crate) fn stride(n: usize) -> Self {
        const THREADS: usize = 256;
        const MOST_BLOCKS: usize = 4096;
        Self::blocks(n.div_ceil(THREADS).min(MOST_BLOCKS), THREADS as u32)
    }

    /// A block a row, of about four elements a thread.
    pub(crate) fn a_block_a_row(rows: usize, width: usize) -> Self {
        const WARP: usize = 32;
        Self::blocks(rows, width.div_ceil(4).next_multiple_of(WARP).clamp(WARP, 256) as u32)
    }

    /// With dynamic shared memory.
    pub(crate) fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }
}

impl<'a> Call<'a> {
    /// Of a kernel of this name.
    pub(crate) fn new(on: &'a CudaBackend, kernel: &'static str) -> Self {
        Self { on, kernel, holds: Holds::default() }
    }

    /// The device.
    pub(crate) fn driver(&self) -> &dyn Driver {
        self.on.driver()
    }

    fn wrong(&self, tensor: &'static str, expected: &'static str, found: DType) -> Error {
        Error::DType { kernel: self.kernel, tensor, expected, found }
    }

    fn own<'v>(&self, view: &View<'v>) -> Result<&'v BufferMemory> {
        let memory: &BufferMemory = view.buffer().storage(NAME)?;
        if self.on.owns(memory) { Ok(memory) } else { Err(Error::Foreign { backend: NAME }) }
    }

    /// That a view is this backend's and has this element type.
    pub(crate) fn check(&self, tensor: &'static str, dtype: DType, view: &View) -> Result<()> {
        self.own(view)?;
        if view.dtype() == dtype { Ok(()) } else { Err(self.wrong(tensor, dtype.name(), view.dtype())) }
    }

    /// The address of a view's first element, for as long as this call lives.
    pub(crate) fn at(&self, tensor: &'static str, view: View) -> Result<u64> {
        self.own(&view)?.address(view.bytes(), &self.holds).map_err(Error::paging(self.kernel, tensor))
    }

    /// The same of a view to write.
    pub(crate) fn at_mut(&self, tensor: &'static str, view: &mut ViewMut) -> Result<u64> {
        let part = view.as_view().bytes();
        self.own(&view.as_view())?;
        let memory: &mut BufferMemory = view.buffer_mut().storage_mut(NAME)?;
        memory.address_mut(part, &self.holds).map_err(Error::paging(self.kernel, tensor))
    }

    /// A view that the kernel reads, of this element type.
    pub(crate) fn input(&self, tensor: &'static str, dtype: DType, view: View) -> Result<Argument> {
        self.check(tensor, dtype, &view)?;
        Ok(Argument::input(dtype, self.at(tensor, view)?))
    }

    /// A view that may be absent.
    pub(crate) fn some_input(&self, tensor: &'static str, dtype: DType, view: Option<View>) -> Result<Argument> {
        view.map_or(Ok(Argument::input(dtype, 0)), |view| self.input(tensor, dtype, view))
    }

    /// A view that the kernel writes.
    pub(crate) fn output(&self, tensor: &'static str, dtype: DType, view: &mut ViewMut) -> Result<Argument> {
        self.check(tensor, dtype, &view.as_view())?;
        Ok(Argument::output(dtype, self.at_mut(tensor, view)?))
    }

    /// An output that may not be asked for.
    pub(crate) fn some_output(
        &self,
        tensor: &'static str,
        dtype: DType,
        view: &mut Option<ViewMut>,
    ) -> Result<Argument> {
        view.as_mut().map_or(Ok(Argument::output(dtype, 0)), |view| self.output(tensor, dtype, view))
    }

    /// The elements of a view whose type was checked, on the host: without a wait where the host wrote them.
    pub(crate) fn on_the_host<T: Element>(&self, tensor: &'static str, view: View) -> Result<Vec<T>> {
        let memory = self.own(&view)?;
        let (part, mut elements) = (view.bytes(), vec![T::zeroed(); view.len()]);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut elements);
        match memory.remembered() {
            Some(written) => bytes.copy_from_slice(&written[part]),
            None => self.driver().download(self.at(tensor, view)?, bytes)?,
        }
        Ok(elements)
    }

    /// f32, to read.
    pub(crate) fn f32(&self, tensor: &'static str, view: View) -> Result<Argument> {
        self.input(tensor, DType::F32, view)
    }

    /// f32, to write.
    pub(crate) fn f32_mut(&self, tensor: &'static str, view: &mut ViewMut) -> Result<Argument> {
        self.output(tensor, DType::F32, view)
    }

    /// That a view has one of the float types.
    pub(crate) fn float(&self, tensor: &'static str, dtype: DType) -> Result<()> {
        if FLOATS.contains(&dtype) { Ok(()) } else { Err(self.wrong(tensor, "f32, bf16 or f16", dtype)) }
    }

    /// A dimension, where the kernel's indices have 32 bits.
    pub(crate) fn size(&self, n: usize) -> Result<Argument> {
        let why = |_| Error::Invalid {
            kernel: self.kernel,
            why: format!("a dimension of {n}: expected at most 2³² − 1"),
        };
        Ok(u32::try_from(n).map_err(why)?.into())
    }

    /// Starts an entry point of `kernels/`; nothing where the grid is empty.
    pub(crate) fn launch(&self, kernel: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        Ok(launch(self.driver(), kernel, grid, arguments)?)
    }

    /// Counters for a launch whose blocks hand work to each other.
    pub(crate) fn counters(&self) -> Argument {
        self.on.counters()
    }

    /// Working memory of `len` elements, freed in the order of launches when it is dropped.
    pub(crate) fn scratch(&self, dtype: DType, len: usize) -> Result<Scratch> {
        let bytes = len.checked_mul(dtype.size()).ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Scratch { memory: self.on.fixed(bytes)?, dtype })
    }
}

/// [`Call::launch`] on any driver.
pub(crate) fn launch(
    driver: &dyn Driver,
    kernel: &'static str,
    grid: Grid,
    arguments: &[Argument],
) -> crate::Result<()> {
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    let blocks = grid.blocks.map(u32::try_from);
    let [Ok(x), Ok(y), Ok(z)] = blocks else {
        return Err(crate::Error::Geometry { kernel, why: format!("a grid of {:?} blocks", grid.blocks) });
    };
    driver.launch(&Launch { kernel, grid: [x, y, z], block: [grid.threads, 1, 1], shared: grid.shared, arguments })
}

/// Working memory of a call.
pub(crate) struct Scratch {
    memory: DeviceMemory,
    dtype: DType,
}

impl Scratch {
    /// To read.
    pub(crate) fn input(&self) -> Argument {
        Argument::input(self.dtype, self.memory.address())
    }

    /// To write.
    pub(crate) fn output(&self) -> Argument {
        Argument::output(self.dtype, self.memory.address())
    }

    /// The address of an element.
    pub(crate) fn at(&self, element: usize) -> u64 {
        self.memory.address() + (element * self.dtype.size()) as u64
    }
}
