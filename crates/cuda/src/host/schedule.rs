//! In which order a block's threads run.

use std::collections::VecDeque;

/// The order of threads between two barriers. A seed draws another one for every block of every launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Thread after thread, block after block.
    InOrder,
    /// Any thread that can run.
    Shuffled(u64),
    /// Warp after warp, each as far as it gets, in an order that is redrawn at every barrier: one warp is then
    /// often a whole stage ahead of another, which threads picked one by one never are.
    Warps(u64),
}

/// Threads of a warp.
pub(super) const WARP: usize = 32;

/// SplitMix64 (Steele et al. 2014).
#[derive(Clone, Copy, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// A number below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// The threads of a block that can run, in the order of a schedule.
#[derive(Debug)]
pub(super) struct Queue {
    schedule: Schedule,
    random: Random,
    ready: VecDeque<u32>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self { schedule: Schedule::InOrder, random: Random(0), ready: VecDeque::new() }
    }

    /// Begins block `block` of launch `launch`.
    pub(super) fn begin(&mut self, schedule: Schedule, launch: u64, block: u64) {
        let seed = match schedule {
            Schedule::InOrder => 0,
            Schedule::Shuffled(seed) | Schedule::Warps(seed) => seed,
        };
        let mut random = Random(seed ^ launch.rotate_left(32));
        random.0 = random.next() ^ block;
        (self.schedule, self.random) = (schedule, random);
        self.ready.clear();
    }

    /// A coin of the schedule's own.
    pub(super) fn coin(&mut self) -> bool {
        self.schedule == Schedule::InOrder || self.random.next() & 1 == 0
    }

    /// All threads can run: at the start, and after a barrier.
    pub(super) fn release(&mut self, threads: usize) {
        debug_assert!(self.ready.is_empty());
        if !matches!(self.schedule, Schedule::Warps(_)) {
            self.ready.extend(0..threads as u32);
            return;
        }
        let mut warps: Vec<usize> = (0..threads.div_ceil(WARP)).collect();
        for i in (1..warps.len()).rev() {
            warps.swap(i, self.random.below(i + 1));
        }
        for warp in warps {
            self.ready.extend((warp * WARP) as u32..threads.min((warp + 1) * WARP) as u32);
        }
    }

    /// Some threads of a warp can run again: before all others, but for a schedule that picks any.
    pub(super) fn release_lanes(&mut self, warp: usize, lanes: u32) {
        let lanes = (0..WARP as u32).filter(|lane| lanes >> lane & 1 == 1).map(|lane| (warp * WARP) as u32 + lane);
        if matches!(self.schedule, Schedule::Shuffled(_)) {
            self.ready.extend(lanes);
        } else {
            lanes.rev().for_each(|thread| self.ready.push_front(thread));
        }
    }

    /// The next to run.
    pub(super) fn next(&mut self) -> Option<usize> {
        let next = match self.schedule {
            Schedule::Shuffled(_) if self.ready.len() > 1 => {
                let picked = self.random.below(self.ready.len());
                self.ready.swap_remove_back(picked)
            }
            _ => self.ready.pop_front(),
        };
        next.map(|thread| thread as usize)
    }
}
