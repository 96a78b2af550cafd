//! The checker: what every byte of a device's memory has been through, and what may not happen to it.
//!
//! Watched kernels call [`Checker::access`] before every load and store (the compiler's thread sanitiser puts the
//! calls in; its run-time is not linked). A byte knows whether it is allocated, written, or on its way
//! (`cp.async`), and its last write and read: by which thread, at which line, in which epoch.
//!
//! **Order.** Blocks run one after another here, and an epoch ends at every barrier of a block, so that two accesses
//! lie
//! - in different launches: in order;
//! - in one launch and different blocks: in no order, unless both are atomic;
//! - in one block and different epochs: in order, a barrier is between;
//! - in one epoch: in order where one thread made both, or where the second's thread has met the first's at a
//!   `__syncwarp` since. A warp counts its meetings; an access remembers the count, and a lane the last meeting with
//!   every other.
//!
//! Two accesses without order, one of them a write, are a race, whether or not this schedule let them come out
//! right. Order is not carried over a third thread: the rule is stricter than the hardware's.

use super::block::MOST_THREADS;
use super::calls::RawSite;
use super::memory::{Memory, Pages};
use super::schedule::WARP;
use super::shared::{ARENA, SharedMemory};
use crate::{Access, Error, Place, Result, Site};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Reads, and may write.
    Atomic,
    AtomicWrite,
    /// An asynchronous copy sets off to these bytes.
    Fly,
    /// It has been waited for.
    Land,
}

/// Where an access is made: known by its line, or by the address that a hook returns to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Where {
    Line(RawSite),
    Code(usize),
}

/// A shadow byte's flags.
const ALLOCATED: u8 = 1;
const WRITTEN: u8 = 2;
const IN_FLIGHT: u8 = 4;
/// Written atomically last.
const ATOMIC: u8 = 8;
/// The read stands for several lanes of a warp in its epoch; for threads of several warps; and so does the write, of
/// atomic ones.
const READ_BY_LANES: u8 = 16;
const READ_BY_WARPS: u8 = 32;
const WRITTEN_BY_MANY: u8 = 64;

/// An access, as a byte remembers it. Epoch 0 is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Stamp {
    epoch: u32,
    /// An index into the checker's places.
    place: u32,
    thread: u32,
    /// The meetings of the warp before it.
    meeting: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    write: Stamp,
    read: Stamp,
}

/// Whose access of an epoch a stamp stands for: its thread's, those of several lanes of its warp, or of several warps.
#[derive(Clone, Copy, Debug)]
enum Whose {
    Thread,
    Lanes,
    Warps,
}

/// Flags and cells of a range of memory.
struct Shadow {
    flags: Pages,
    cells: Pages,
    bytes: usize,
}

impl Shadow {
    fn new(bytes: usize) -> Result<Self> {
        Ok(Self { flags: Pages::reserve(bytes)?, cells: Pages::reserve(bytes * size_of::<Cell>())?, bytes })
    }

    fn flag(&mut self, at: usize) -> &mut u8 {
        assert!(at < self.bytes);
        // SAFETY: within the mapping, whose pages are zero when new; borrowed with self.
        unsafe { &mut *self.flags.start().add(at) }
    }

    fn cell(&mut self, at: usize) -> &mut Cell {
        assert!(at < self.bytes);
        // SAFETY: within the mapping, aligned to a page at its start; all-zero bytes are a cell.
        unsafe { &mut *self.cells.start().cast::<Cell>().add(at) }
    }

    fn mark(&mut self, range: Range<usize>, flags: u8) {
        assert!(range.start <= range.end && range.end <= self.bytes);
        // SAFETY: within the mapping; borrowed with self.
        unsafe { self.flags.start().add(range.start).write_bytes(flags, range.len()) };
    }
}

/// What is wrong with an access, before it is put into words.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    fault: Wrong,
    address: usize,
    second: (u32, u32, bool, Where),
}

#[derive(Clone, Copy, Debug)]
enum Wrong {
    Race { first: Stamp, wrote: bool },
    OutOfBounds,
    Uninitialised,
    Host,
}

/// The shadow of one device.
pub(super) struct Checker {
    memory: Arc<Memory>,
    global: Shadow,
    shared: Shadow,
    /// Where shared memory lies, and the arguments of the launch, which a kernel's entry reads.
    shared_start: usize,
    arguments: Range<usize>,
    image: Vec<Range<usize>>,
    epoch: u32,
    launch_epoch: u32,
    block_epoch: u32,
    block: u32,
    /// The first epoch of every block of the launch.
    blocks: Vec<(u32, u32)>,
    /// Meetings of each warp, and of each pair of its lanes the last.
    meetings: Vec<u32>,
    met: Vec<u32>,
    /// Code addresses and lines that stamps refer to, cleared at a launch.
    places: Vec<Where>,
    place_of: HashMap<usize, u32>,
}

impl Checker {
    pub(super) fn new(memory: Arc<Memory>) -> Result<Self> {
        Ok(Self {
            global: Shadow::new(memory.addresses())?,
            shared: Shadow::new(ARENA)?,
            memory,
            shared_start: 0,
            arguments: 0..0,
            image: image(),
            epoch: 0,
            launch_epoch: 0,
            block_epoch: 0,
            block: 0,
            blocks: Vec::new(),
            meetings: vec![0; MOST_THREADS / WARP],
            met: vec![0; MOST_THREADS * WARP],
            places: Vec::new(),
            place_of: HashMap::new(),
        })
    }

    /// Memory was handed out, or put behind addresses: of unspecified value.
    pub(super) fn allocated(&mut self, address: u64, bytes: usize) {
        self.mark_global(address, bytes, ALLOCATED);
    }

    /// Memory was taken back.
    pub(super) fn freed(&mut self, address: u64, bytes: usize) {
        self.mark_global(address, bytes, 0);
    }

    /// The host wrote.
    pub(super) fn uploaded(&mut self, address: u64, bytes: usize) {
        self.mark_global(address, bytes, ALLOCATED | WRITTEN);
    }

    /// Bytes were copied, written or not.
    pub(super) fn copied(&mut self, from: u64, to: u64, bytes: usize) {
        let (Some(from), Some(to)) = (self.memory.offset(from), self.memory.offset(to)) else { return };
        for i in 0..bytes {
            *self.global.flag(to + i) = *self.global.flag(from + i);
        }
    }

    fn mark_global(&mut self, address: u64, bytes: usize, flags: u8) {
        if let Some(offset) = self.memory.offset(address) {
            self.global.mark(offset..offset + bytes, flags);
        }
    }

    /// A launch begins.
    pub(super) fn begin_launch(&mut self) {
        self.next_epoch();
        self.launch_epoch = self.epoch;
        self.blocks.clear();
        self.places.clear();
        self.place_of.clear();
    }

    /// A block begins, with new shared memory.
    pub(super) fn begin_block(&mut self, block: u32, shared: usize, dynamic: usize, arguments: Range<*const u64>) {
        self.next_epoch();
        (self.block, self.block_epoch, self.shared_start) = (block, self.epoch, shared);
        self.arguments = arguments.start as usize..arguments.end as usize;
        self.blocks.push((self.epoch, block));
        self.met.fill(0);
        self.meetings.fill(0);
        self.shared.flags.forget(0, ARENA);
        self.shared_array(0, dynamic);
    }

    /// A shared array gets its place, where the arrays of blocks before have left no trace.
    pub(super) fn shared_array(&mut self, offset: usize, bytes: usize) {
        self.shared.mark(offset..offset + bytes, ALLOCATED);
        (offset..offset + bytes).for_each(|at| *self.shared.cell(at) = Cell::default());
    }

    /// All threads of the block have met.
    pub(super) fn barrier(&mut self) {
        self.next_epoch();
    }

    fn next_epoch(&mut self) {
        self.epoch += 1;
        if self.epoch == u32::MAX {
            // Four thousand million barriers on, what a byte went through before is forgotten.
            self.global.cells.forget(0, self.global.bytes * size_of::<Cell>());
            self.shared.cells.forget(0, ARENA * size_of::<Cell>());
            (self.epoch, self.launch_epoch, self.block_epoch) = (3, 1, 2);
        }
    }

    /// The lanes of `mask` have met at a `__syncwarp`.
    pub(super) fn meeting(&mut self, warp: usize, mask: u32) {
        self.meetings[warp] += 1;
        let lanes = || (0..WARP).filter(|lane| mask >> lane & 1 == 1);
        for (a, b) in lanes().flat_map(|a| lanes().map(move |b| (a, b))) {
            self.met[(warp * WARP + a) * WARP + b] = self.meetings[warp];
        }
    }

    /// An access by `thread`; what is wrong with it.
    pub(super) fn access(
        &mut self,
        thread: usize,
        address: usize,
        bytes: usize,
        kind: Kind,
        site: Where,
        own_stack: impl Fn(usize) -> bool,
    ) -> Result<(), Finding> {
        let write = kind != Kind::Read;
        let block = self.block;
        let finding = move |fault, address| Finding { fault, address, second: (block, thread as u32, write, site) };
        let (shared, offset) = match self.memory.offset(address as u64) {
            Some(offset) => (false, offset),
            None => {
                let offset = address.wrapping_sub(self.shared_start);
                if offset >= ARENA {
                    let constant = !write && self.image.iter().any(|range| range.contains(&address));
                    let mine = constant || own_stack(address) || self.arguments.contains(&address);
                    return if mine || this_thread(address) { Ok(()) } else { Err(finding(Wrong::Host, address)) };
                }
                (true, offset)
            }
        };
        let place = self.place(site);
        let warp = thread / WARP;
        let now = Stamp { epoch: self.epoch, place, thread: thread as u32, meeting: self.meetings[warp] };
        let limit = if shared { ARENA } else { self.memory.addresses() };
        for at in offset..offset + bytes {
            let address = address + at - offset;
            if at >= limit {
                return Err(finding(Wrong::OutOfBounds, address));
            }
            let shadow = if shared { &mut self.shared } else { &mut self.global };
            let (flags, cell) = (*shadow.flag(at), *shadow.cell(at));
            if flags & ALLOCATED == 0 {
                return Err(finding(Wrong::OutOfBounds, address));
            }
            if flags & IN_FLIGHT != 0 && kind != Kind::Land {
                return Err(finding(Wrong::Race { first: cell.write, wrote: true }, address));
            }
            if flags & WRITTEN == 0 && matches!(kind, Kind::Read | Kind::Atomic) {
                return Err(finding(Wrong::Uninitialised, address));
            }
            let atomic = matches!(kind, Kind::Atomic | Kind::AtomicWrite);
            let both_atomic = atomic && flags & ATOMIC != 0;
            let writers = if flags & WRITTEN_BY_MANY != 0 { Whose::Warps } else { Whose::Thread };
            if !both_atomic && !self.ordered(cell.write, now, writers) {
                return Err(finding(Wrong::Race { first: cell.write, wrote: true }, address));
            }
            let readers = match flags & (READ_BY_LANES | READ_BY_WARPS) {
                0 => Whose::Thread,
                READ_BY_LANES => Whose::Lanes,
                _ => Whose::Warps,
            };
            if write && !self.ordered(cell.read, now, readers) {
                return Err(finding(Wrong::Race { first: cell.read, wrote: false }, address));
            }
            self.remember(shared, at, now, kind, flags, cell);
        }
        Ok(())
    }

    /// Whether an access, made by whom it says, came before one that is made now.
    fn ordered(&self, before: Stamp, now: Stamp, whose: Whose) -> bool {
        if before.epoch < self.launch_epoch {
            return true;
        }
        if before.epoch < self.block_epoch {
            return false;
        }
        if before.epoch < now.epoch {
            return true;
        }
        let (other, me) = (before.thread as usize, now.thread as usize);
        let met = |lane: usize| self.met[me * WARP + lane] > before.meeting;
        let same_warp = other / WARP == me / WARP;
        match whose {
            Whose::Thread => same_warp && (other == me || met(other % WARP)),
            Whose::Lanes => same_warp && (0..WARP).all(|lane| lane == me % WARP || met(lane)),
            Whose::Warps => false,
        }
    }

    fn remember(&mut self, shared: bool, at: usize, now: Stamp, kind: Kind, flags: u8, cell: Cell) {
        let (launch, block) = (self.launch_epoch, self.block_epoch);
        let shadow = if shared { &mut self.shared } else { &mut self.global };
        let same_epoch = |stamp: Stamp| stamp.epoch == now.epoch && stamp.thread != now.thread;
        // An access by another block of this launch is in no order with any of this one: it stays.
        let elsewhere = |stamp: Stamp| (launch..block).contains(&stamp.epoch);
        match kind {
            Kind::Read if elsewhere(cell.read) => {}
            Kind::Read => {
                let before = if cell.read.epoch == now.epoch { flags & (READ_BY_LANES | READ_BY_WARPS) } else { 0 };
                let more = match same_epoch(cell.read) {
                    true if cell.read.thread as usize / WARP == now.thread as usize / WARP => READ_BY_LANES,
                    true => READ_BY_WARPS,
                    false => 0,
                };
                shadow.cell(at).read = now;
                *shadow.flag(at) = flags & !(READ_BY_LANES | READ_BY_WARPS) | before | more;
            }
            Kind::Atomic | Kind::AtomicWrite => {
                let atomic = flags & ATOMIC != 0;
                let many =
                    atomic && (same_epoch(cell.write) || cell.write.epoch == now.epoch && flags & WRITTEN_BY_MANY != 0);
                let write = if atomic && elsewhere(cell.write) { cell.write } else { now };
                *shadow.cell(at) = Cell { write, read: Stamp::default() };
                *shadow.flag(at) = ALLOCATED | WRITTEN | ATOMIC | if many { WRITTEN_BY_MANY } else { 0 };
            }
            Kind::Write | Kind::Land | Kind::Fly => {
                *shadow.cell(at) = Cell { write: now, read: Stamp::default() };
                *shadow.flag(at) = ALLOCATED | WRITTEN | if kind == Kind::Fly { IN_FLIGHT } else { 0 };
            }
        }
    }

    fn place(&mut self, site: Where) -> u32 {
        let key = match site {
            Where::Code(address) => address,
            Where::Line(site) => site.key(),
        };
        *self.place_of.entry(key).or_insert_with(|| {
            self.places.push(site);
            self.places.len() as u32 - 1
        })
    }

    /// A finding in words. Not on a fibre: it needs a deep stack.
    pub(super) fn explain(&self, kernel: &'static str, finding: &Finding, shared: &SharedMemory) -> Error {
        let (block, thread, write, site) = finding.second;
        let access = Box::new(Access { block, thread, write, site: resolve(site) });
        let offset = finding.address.wrapping_sub(self.shared_start);
        let place = if offset < ARENA {
            shared.named(offset).map_or(Place::SharedGap, |(array, byte)| Place::Shared { array, byte })
        } else {
            let global = self.memory.offset(finding.address as u64).unwrap_or(0);
            let (start, bytes) = self.memory.allocation(global).unwrap_or((global, 0));
            let allocation = finding.address - (global - start);
            Place::Global { allocation, bytes, byte: (global - start) as isize }
        };
        match finding.fault {
            Wrong::Race { first, wrote } => {
                let block = self.blocks.iter().rev().find(|(epoch, _)| *epoch <= first.epoch);
                let first = Access {
                    block: block.map_or(self.block, |(_, block)| *block),
                    thread: first.thread,
                    write: wrote,
                    site: self.places.get(first.place as usize).map_or_else(unknown, |site| resolve(*site)),
                };
                Error::Race { kernel, place, second: access, first: Box::new(first) }
            }
            Wrong::OutOfBounds => Error::OutOfBounds { kernel, place, access },
            Wrong::Uninitialised => Error::Uninitialised { kernel, place, access },
            Wrong::Host => Error::HostPointer { kernel, address: finding.address, access },
        }
    }
}

fn unknown() -> Site {
    Site { file: "?".into(), line: 0 }
}

/// The line of a kernel that an access stands in: of the calls that were inlined into one, the innermost outside of
/// the shim.
fn resolve(site: Where) -> Site {
    let address = match site {
        Where::Line(site) => return site.resolve(),
        Where::Code(address) => address - 1,
    };
    let mut found = None;
    backtrace::resolve(address as *mut _, |symbol| {
        let (Some(path), Some(line)) = (symbol.filename(), symbol.lineno()) else { return };
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if found.is_none() && !matches!(&*file, "shim.h" | "collectives.h" | "thunk.h") {
            found = Some(Site { file, line });
        }
    });
    found.unwrap_or_else(unknown)
}

/// Whether an address is one of this OS thread's indices.
fn this_thread(address: usize) -> bool {
    let start = super::block::indices_address();
    (start..start + size_of::<super::block::Indices>()).contains(&address)
}

/// Where the program's own constants lie: a kernel may read them.
fn image() -> Vec<Range<usize>> {
    unsafe extern "C" fn add(info: *mut libc::dl_phdr_info, _: usize, ranges: *mut libc::c_void) -> libc::c_int {
        // SAFETY: both are given by the call below: the system's description of a loaded object, and the vector.
        unsafe {
            let (info, ranges) = (&*info, &mut *ranges.cast::<Vec<Range<usize>>>());
            for i in 0..usize::from(info.dlpi_phnum) {
                let header = &*info.dlpi_phdr.add(i);
                let start = info.dlpi_addr as usize + header.p_vaddr as usize;
                if header.p_type == libc::PT_LOAD {
                    ranges.push(start..start + header.p_memsz as usize);
                }
            }
        }
        // The first object is the program; no other.
        1
    }
    let mut ranges: Vec<Range<usize>> = Vec::new();
    // SAFETY: `add` is called with the vector's address while it lives.
    unsafe { libc::dl_iterate_phdr(Some(add), std::ptr::from_mut(&mut ranges).cast()) };
    ranges
}
