//! What moved between memory and what lies below it, and how long a run waited for that.
//!
//! Who moves it is not the trainer's to know: a run is given a function that reads the figures.

use serde::Serialize;
use std::ops::AddAssign;

/// What was paged: in all so far, or within a step, whose line has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Bytes that came back into memory,
    pub paged_in: u64,
    /// and that left it.
    pub paged_out: u64,
    /// Seconds of waiting for pages to come or to leave.
    pub stall_seconds: f64,
}

impl Traffic {
    /// What came to it after `before`.
    fn since(self, before: Self) -> Self {
        Self {
            paged_in: self.paged_in.saturating_sub(before.paged_in),
            paged_out: self.paged_out.saturating_sub(before.paged_out),
            stall_seconds: (self.stall_seconds - before.stall_seconds).max(0.0),
        }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.paged_in += other.paged_in;
        self.paged_out += other.paged_out;
        self.stall_seconds += other.stall_seconds;
    }
}

/// Reads what was paged in all so far.
pub type Gauge<'a> = &'a dyn Fn() -> Traffic;

/// The traffic of some parts of a run, where there is any.
pub(crate) struct Tally<'a> {
    gauge: Option<Gauge<'a>>,
    sum: Traffic,
}

impl<'a> Tally<'a> {
    pub(crate) fn new(gauge: Option<Gauge<'a>>) -> Self {
        Self { gauge, sum: Traffic::default() }
    }

    /// Do a part, which counts.
    pub(crate) fn over<T>(&mut self, part: impl FnOnce() -> T) -> T {
        let Some(gauge) = self.gauge else { return part() };
        let before = gauge();
        let done = part();
        self.sum += gauge().since(before);
        done
    }

    /// What moved meanwhile; none where nothing is paged.
    pub(crate) fn sum(&self) -> Option<Traffic> {
        self.gauge.map(|_| self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn what_moves_within_the_parts_is_counted_and_nothing_else() {
        let now = Cell::new(Traffic::default());
        let go_on = |paged_in, paged_out, stall_seconds| {
            let mut sum = now.get();
            sum += Traffic { paged_in, paged_out, stall_seconds };
            now.set(sum);
        };
        go_on(7, 7, 7.0);
        let gauge = || now.get();
        let mut tally = Tally::new(Some(&gauge));
        tally.over(|| go_on(1, 2, 0.5));
        go_on(100, 100, 100.0);
        assert_eq!(tally.over(|| (go_on(10, 20, 0.25), 3).1), 3);
        assert_eq!(tally.sum(), Some(Traffic { paged_in: 11, paged_out: 22, stall_seconds: 0.75 }));
        assert_eq!(Tally::new(None).sum(), None);
    }
}
