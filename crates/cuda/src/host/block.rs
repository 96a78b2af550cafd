//! A block's threads as fibres: each runs until it waits, and the block is done when all have returned.
//!
//! ```text
//! until every thread has returned:
//!     resume the next ready thread
//!     it returns, or waits: at a barrier (all threads), or with lanes of its warp
//!     who arrives last releases those that waited
//! nobody is ready: a divergent barrier, told with who waits where
//! ```
//!
//! A fibre calls into Rust through [`super::calls`], which finds its block here, by [`running`].

use super::calls::{Op, RawSite, SharedArray};
use super::checker::Checker;
use super::copies::Copies;
use super::schedule::{Queue, Schedule, WARP};
use super::shared::SharedMemory;
use crate::kernels::Entry;
use crate::{Error, Result};
use corosensei::stack::{DefaultStack, Stack};
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr;

/// A fibre's stack: a kernel's arrays and a few calls.
const STACK: usize = 64 << 10;

/// The most threads a block has.
pub(super) const MOST_THREADS: usize = 1024;

/// What every block of a launch has in common.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) kernel: &'static str,
    pub(super) entry: &'static Entry,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared: usize,
    pub(super) shared_memory: usize,
    /// A pointer to each argument, and behind them the arguments.
    pub(super) arguments: &'a [u64],
    pub(super) schedule: Schedule,
    /// The number of the launch, from 1.
    pub(super) launch: u64,
    /// A barrier that is passed over: for tests that want to see it missed.
    pub(super) left_out: Option<&'a crate::Site>,
}

/// `struct RfThread`: who the running thread is.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Indices {
    thread: [u32; 3],
    block: [u32; 3],
    block_dim: [u32; 3],
    grid_dim: [u32; 3],
}

unsafe extern "C" {
    fn rf_this_thread() -> *mut Indices;
}

/// What a thread waits for.
#[derive(Clone, Copy)]
enum State {
    Ready,
    Barrier(RawSite),
    Warp { mask: u32, op: Option<Op>, slot: *mut c_void, site: RawSite },
    Returned,
}

type Fibre = Coroutine<(), (), (), DefaultStack>;

struct Thread {
    state: State,
    /// The addresses of its stack.
    stack: Range<usize>,
    yielder: *const Yielder<(), ()>,
    copies: Copies,
}

/// What stopped a block.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// What the checker saw.
    Checked(super::checker::Finding),
    /// Shared arrays that no device has room for.
    SharedMemory,
}

/// The running block of an OS thread, and what it keeps from block to block.
pub(super) struct Block {
    threads: Vec<Thread>,
    /// A fibre a thread; the one that runs is not among them.
    fibres: Vec<Option<Fibre>>,
    stacks: Vec<DefaultStack>,
    queue: Queue,
    pub(super) shared: SharedMemory,
    indices: *mut Indices,
    /// How many threads the block has, the one that runs, how many wait at a barrier, how many have returned.
    count: usize,
    pub(super) current: usize,
    at_barrier: usize,
    returned: usize,
    left_out: Option<crate::Site>,
    fault: Option<Fault>,
    pub(super) checker: *mut Checker,
}

thread_local! {
    static RUNNING: Cell<*mut Block> = const { Cell::new(ptr::null_mut()) };
}

/// The block whose fibre makes the call; null outside of one.
pub(super) fn running() -> *mut Block {
    RUNNING.get()
}

/// Where this OS thread keeps who the running thread is.
pub(super) fn indices_address() -> usize {
    // SAFETY: it only takes an address.
    unsafe { rf_this_thread() as usize }
}

/// Lets the scheduler go on until the running thread of `block` is resumed.
///
/// # Safety
/// Called on a fibre of `block`, which no reference is held to.
pub(super) unsafe fn suspend(block: *mut Block) {
    // SAFETY: the yielder lives on the fibre's own stack as long as the fibre.
    unsafe {
        let yielder = (&(*block).threads)[(*block).current].yielder;
        (*yielder).suspend(());
    }
}

impl Block {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            threads: Vec::new(),
            fibres: Vec::new(),
            stacks: Vec::new(),
            queue: Queue::new(),
            shared: SharedMemory::new()?,
            // SAFETY: the address of a variable of this OS thread, on which the block stays.
            indices: unsafe { rf_this_thread() },
            count: 0,
            current: 0,
            at_barrier: 0,
            returned: 0,
            left_out: None,
            fault: None,
            checker: ptr::null_mut(),
        })
    }

    /// Runs the block of this index to its end.
    pub(super) fn run(&mut self, work: &Work, index: u32, checker: Option<&mut Checker>) -> Result<()> {
        self.begin(work, index, checker)?;
        // From here on fibres reach the block through this pointer: nothing is borrowed from it while one runs.
        let block = ptr::from_mut(self);
        // SAFETY: this OS thread's own block, of which `self` is not used until its fibres are gone.
        unsafe {
            let outcome = Self::spawn(block, work).and_then(|()| Self::schedule(block, work, index));
            (*block).end();
            outcome
        }
    }

    /// A fibre for each thread.
    ///
    /// # Safety
    /// `block` outlives its fibres.
    unsafe fn spawn(block: *mut Self, work: &Work) -> Result<()> {
        // SAFETY: the caller's block, which no fibre runs on yet.
        let this = unsafe { &mut *block };
        for thread in 0..this.count {
            let (stack, arguments, entry) = (this.stack()?, work.arguments.as_ptr().cast_mut(), work.entry);
            this.threads[thread].stack = stack.limit().get()..stack.base().get();
            this.fibres.push(Some(Coroutine::with_stack(stack, move |yielder, ()| {
                // SAFETY: the block outlives its fibres, and one runs while nobody else uses it; the launch has checked
                // the arguments against the kernel's types.
                unsafe {
                    (&mut (*block).threads)[thread].yielder = yielder;
                    entry.call(arguments.cast());
                }
            })));
        }
        Ok(())
    }

    fn begin(&mut self, work: &Work, index: u32, checker: Option<&mut Checker>) -> Result<()> {
        self.count = work.block.iter().map(|n| *n as usize).product();
        while self.threads.len() < self.count {
            let copies = Copies::default();
            self.threads.push(Thread { state: State::Ready, stack: 0..0, yielder: ptr::null(), copies });
        }
        for thread in &mut self.threads[..self.count] {
            thread.state = State::Ready;
            thread.copies.begin();
        }
        (self.current, self.at_barrier, self.returned, self.fault) = (0, 0, 0, None);
        self.left_out = work.left_out.cloned();
        self.queue.begin(work.schedule, work.launch, index.into());
        self.shared.begin(work.shared, work.shared_memory);
        self.checker = ptr::null_mut();
        if let Some(checker) = checker {
            checker.begin_block(index, self.shared.start(), work.shared, work.arguments.as_ptr_range());
            self.checker = checker;
        }
        let [x, y, _] = work.grid;
        let block = [index % x, index / x % y, index / x / y];
        // SAFETY: this OS thread's variable.
        unsafe { *self.indices = Indices { thread: [0; 3], block, block_dim: work.block, grid_dim: work.grid } };
        Ok(())
    }

    fn stack(&mut self) -> Result<DefaultStack> {
        let fresh = || DefaultStack::new(STACK).map_err(|why| Error::Missing(format!("a fibre's stack: {why}")));
        self.stacks.pop().map_or_else(fresh, Ok)
    }

    /// Resumes fibres until all have returned, or nobody can go on.
    ///
    /// # Safety
    /// `block` is this OS thread's own, with its fibres, and nothing is borrowed from it.
    unsafe fn schedule(block: *mut Self, work: &Work, index: u32) -> Result<()> {
        let [x, y, _] = work.block.map(|n| n as usize);
        // SAFETY: each borrow ends before a fibre runs, and a fibre's before it waits.
        unsafe {
            (*block).queue.release((*block).count);
            let outer = RUNNING.replace(block);
            while let Some(thread) = (*block).queue.next() {
                (*block).current = thread;
                (*(*block).indices).thread = [thread % x, thread / x % y, thread / x / y].map(|i| i as u32);
                let taken = (&mut (*block).fibres)[thread].take();
                let mut fibre = taken.expect("a thread that can run has a fibre");
                if let CoroutineResult::Return(()) = fibre.resume(()) {
                    (&mut (*block).threads)[thread].state = State::Returned;
                    (*block).returned += 1;
                }
                (&mut (*block).fibres)[thread] = Some(fibre);
                if (*block).fault.is_some() {
                    break;
                }
            }
            RUNNING.set(outer);
            (*block).outcome(work, index)
        }
    }

    /// What became of it.
    fn outcome(&mut self, work: &Work, index: u32) -> Result<()> {
        let kernel = work.kernel;
        match self.fault.take() {
            // SAFETY: the checker that the block began with; nobody else holds it while the block runs.
            Some(Fault::Checked(finding)) => Err(unsafe { (*self.checker).explain(kernel, &finding, &self.shared) }),
            Some(Fault::SharedMemory) => {
                let most = work.shared_memory;
                let why = format!("its shared arrays take more than 48 KiB, or {most} bytes with the dynamic one");
                Err(Error::Geometry { kernel, why })
            }
            None if self.returned < self.count => {
                Err(Error::Divergence { kernel, block: index, waiting: self.waiting() })
            }
            None => Ok(()),
        }
    }

    /// Takes the stacks back.
    fn end(&mut self) {
        for mut fibre in self.fibres.drain(..).flatten() {
            if !fibre.done() {
                // SAFETY: a suspended kernel holds nothing that wants to be dropped: its frames are plain C++ ones, and
                // the calls that suspend (`calls.rs`) hold pointers and numbers.
                unsafe { fibre.force_reset() };
            }
            self.stacks.push(fibre.into_stack());
        }
    }

    /// Who waits where.
    fn waiting(&self) -> String {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (thread, state) in self.threads[..self.count].iter().map(|thread| thread.state).enumerate() {
            let place = match state {
                State::Barrier(site) => format!("wait at the barrier at {}", site.resolve()),
                State::Warp { mask, site, .. } => format!("wait for lanes {mask:#010x} at {}", site.resolve()),
                State::Returned => "have returned".into(),
                State::Ready => "are ready".into(),
            };
            groups.entry(place).or_default().push(thread);
        }
        let group = |(place, threads): (&String, &Vec<usize>)| match threads[..] {
            [one] => format!("thread {one}: {place}"),
            _ => format!("{} threads from {} to {}: {place}", threads.len(), threads[0], threads[threads.len() - 1]),
        };
        groups.iter().map(group).collect::<Vec<_>>().join("; ")
    }

    /// The running thread reaches a barrier; whether it has to wait there.
    pub(super) fn barrier(&mut self, site: RawSite) -> bool {
        if self.is_left_out(site) {
            return false;
        }
        self.threads[self.current].state = State::Barrier(site);
        self.at_barrier += 1;
        let together = || self.threads[..self.count].iter().all(|t| matches!(t.state, State::Barrier(s) if s == site));
        if self.at_barrier == self.count && together() {
            self.at_barrier = 0;
            self.threads[..self.count].iter_mut().for_each(|thread| thread.state = State::Ready);
            self.queue.release(self.count);
            // SAFETY: the checker that the block began with, if any; used from this OS thread alone.
            if let Some(checker) = unsafe { self.checker.as_mut() } {
                checker.barrier();
            }
        }
        true
    }

    fn is_left_out(&self, site: RawSite) -> bool {
        self.left_out.as_ref().is_some_and(|left_out| site.resolve() == *left_out)
    }

    /// The running thread lays down its slot for `op` among the lanes of `mask`, or, without one, waits for them;
    /// whether it has to wait.
    pub(super) fn meet(&mut self, mask: u32, op: Option<Op>, slot: *mut c_void, site: RawSite) -> bool {
        if op.is_none() && self.is_left_out(site) {
            return false;
        }
        let (warp, lane) = (self.current / WARP, self.current % WARP);
        self.threads[self.current].state = State::Warp { mask, op, slot, site };
        let lanes = warp * WARP..self.count.min((warp + 1) * WARP);
        let mut slots = [ptr::null_mut(); WARP];
        if mask >> lane & 1 == 0 {
            return true;
        }
        for other in (0..WARP).filter(|other| mask >> other & 1 == 1) {
            match self.threads[..lanes.end].get(lanes.start + other).map(|thread| thread.state) {
                Some(State::Warp { mask: m, op: o, slot, site: s })
                    if m == mask && s == site && o.map(|o| o as usize) == op.map(|op| op as usize) =>
                {
                    slots[other] = slot;
                }
                _ => return true,
            }
        }
        if let Some(op) = op {
            // SAFETY: each slot is the one that its lane, still waiting, laid down for this very operation.
            unsafe { op(slots.as_mut_ptr(), mask) };
        // SAFETY: the checker that the block began with, if any; used from this OS thread alone.
        } else if let Some(checker) = unsafe { self.checker.as_mut() } {
            checker.meeting(warp, mask);
        }
        for other in (0..WARP).filter(|other| mask >> other & 1 == 1) {
            self.threads[lanes.start + other].state = State::Ready;
        }
        self.queue.release_lanes(warp, mask);
        true
    }

    /// The place of a shared array, or nothing where the block has to stop.
    pub(super) fn place(&mut self, array: *const SharedArray) -> Option<*mut u8> {
        let Some((start, new)) = self.shared.place(array) else {
            self.fault = Some(Fault::SharedMemory);
            return None;
        };
        // SAFETY: the checker that the block began with, if any; used from this OS thread alone.
        if let (Some((offset, bytes)), Some(checker)) = (new, unsafe { self.checker.as_mut() }) {
            checker.shared_array(offset, bytes);
        }
        Some(start)
    }

    /// The copies of the running thread, and a coin for when they land.
    pub(super) fn copies(&mut self) -> (&mut Copies, bool) {
        let coin = self.queue.coin();
        (&mut self.threads[self.current].copies, coin)
    }

    /// Stops the block.
    pub(super) fn fail(&mut self, fault: Fault) {
        self.fault = Some(fault);
    }

    /// Whether an address lies on the running fibre's own stack.
    pub(super) fn owns_stack(&self, address: usize) -> bool {
        self.threads[self.current].stack.contains(&address)
    }
}
