//! Threads: one crew a backend, work in numbered tasks.
//!
//! A kernel cuts its work into tasks, and every sum stays within one task or is finished in the order of tasks whose
//! bounds depend on the shapes alone. Which thread takes which task is decided at run time, so a
//! slow core holds nobody up, and still the bits never depend on the number of threads.

use crate::crew::Crew;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The threads of a backend: the caller's own and `count() − 1` of a crew.
#[derive(Debug)]
pub struct Threads {
    crew: Option<Crew>,
}

impl Threads {
    /// `count` threads, all available cores where it is `None`. Where the system grants no more, those that it granted
    /// do the work.
    pub fn new(count: Option<usize>) -> Self {
        let count = count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        Self { crew: (count > 1).then(|| Crew::new(count - 1)).filter(|crew| crew.count() > 0) }
    }

    /// How many threads work at once.
    pub fn count(&self) -> usize {
        1 + self.crew.as_ref().map_or(0, Crew::count)
    }

    /// `f(0)`, …, `f(tasks − 1)`, each once, in no fixed order, on all threads; returns when all are done. Within a task,
    /// and beside another call, on the caller's thread alone.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        let Some(crew) = self.crew.as_ref().filter(|_| tasks > 1) else { return (0..tasks).for_each(f) };
        let next = AtomicUsize::new(0);
        crew.join(tasks - 1, &|| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                f(task);
            }
        });
    }

    /// `f` on consecutive ranges of at most `chunk` indices that cover 0 … `len`.
    pub fn run_chunks(&self, len: usize, chunk: usize, f: impl Fn(Range<usize>) + Sync) {
        self.run(len.div_ceil(chunk), |task| f(task * chunk..len.min((task + 1) * chunk)));
    }

    /// The results of `f(0)`, …, `f(tasks − 1)`, in this order.
    pub fn map<T: Copy + Default + Send>(&self, tasks: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results = vec![T::default(); tasks];
        let shared = Disjoint::new(&mut results);
        // SAFETY: task i alone writes entry i.
        self.run(tasks, |task| unsafe { shared.get(task..task + 1)[0] = f(task) });
        results
    }
}

/// A slice that tasks write in parts which do not overlap.
#[derive(Clone, Copy)]
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is only a slice; `get` leaves to its callers that no two parts overlap.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// The whole slice, to be handed out in parts.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// One part.
    ///
    /// # Panics
    /// Where the range is not within the slice.
    ///
    /// # Safety
    /// While the part lives, no other part overlaps it.
    #[allow(clippy::mut_from_ref)] // the point of the type; see its safety condition
    pub unsafe fn get(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part beyond its slice");
        // SAFETY: within the slice, which is borrowed for 'a; the caller keeps the parts apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_at_any_number_of_threads() {
        for count in [1, 2, 3, 8] {
            let threads = Threads::new(Some(count));
            assert_eq!(threads.count(), count);
            for tasks in [0, 1, 2, 7, 1000] {
                assert_eq!(threads.map(tasks, |i| i + 1), (1..=tasks).collect::<Vec<_>>());
            }
            let covered = AtomicUsize::new(0);
            threads.run_chunks(1001, 64, |range| {
                assert!(range.len() <= 64);
                covered.fetch_add(range.len(), Ordering::Relaxed);
            });
            assert_eq!(covered.into_inner(), 1001);
        }
    }

    #[test]
    fn a_task_may_run_tasks_of_its_own() {
        let threads = Threads::new(Some(3));
        let sums = threads.map(5, |i| threads.map(4, |j| i * j).into_iter().sum::<usize>());
        assert_eq!(sums, [0, 6, 12, 18, 24]);
    }
}
