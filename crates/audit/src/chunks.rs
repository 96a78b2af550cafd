//! Work on fixed chunks of a tensor, on any number of threads, with one result.
//!
//! A chunk is 65536 elements, a whole number of blocks of every size. Results come back in the order of the chunks,
//! so that what is summed from them has the same bits whoever computed which chunk.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements a chunk: a multiple of the largest block.
pub(crate) const CHUNK: usize = 1 << 16;

/// `work` on every chunk of `0..len`, in the chunks' order.
pub(crate) fn map<T: Send>(threads: usize, len: usize, work: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let chunks = len.div_ceil(CHUNK);
    let next = AtomicUsize::new(0);
    let take = || {
        let mut done = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return done;
            }
            done.push((chunk, work(chunk * CHUNK..len.min((chunk + 1) * CHUNK))));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(chunks)).map(|_| scope.spawn(take)).collect();
        let mut all = take();
        for helper in helpers {
            match helper.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_unstable_by_key(|(chunk, _)| *chunk);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_once_in_order_at_any_thread_count() {
        for len in [0, 1, CHUNK, 5 * CHUNK + 7] {
            for threads in [1, 2, 9] {
                let ranges = map(threads, len, |range| range);
                let covered: Vec<usize> = ranges.iter().flat_map(|range| [range.start, range.end]).collect();
                let edges: Vec<usize> = (0..len).step_by(CHUNK).flat_map(|i| [i, len.min(i + CHUNK)]).collect();
                assert_eq!(covered, edges, "{len} on {threads}");
            }
        }
    }
}
