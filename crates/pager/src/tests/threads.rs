//! Several threads at once.

use super::{PAGE, byte, pager};
use crate::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

#[test]
fn threads_that_page_at_once_read_what_they_wrote() {
    let pager = pager(12);
    let refused = AtomicU64::new(0);
    thread::scope(|scope| {
        for number in 0..4u64 {
            let (pager, refused) = (pager.clone(), &refused);
            scope.spawn(move || {
                let mut mine: Vec<_> = (0..6).map(|_| (pager.alloc(3 * PAGE).unwrap(), 0u64)).collect();
                for turn in 1..60u64 {
                    let i = (byte(number, turn as usize) % 6) as usize;
                    let (allocation, seed) = &mut mine[i];
                    match allocation.pin_mut(0..3 * PAGE) {
                        Ok(mut pin) => {
                            let right =
                                |(at, found): (usize, &u8)| *found == if *seed == 0 { 0 } else { byte(*seed, at) };
                            assert!(pin.iter().enumerate().all(right), "thread {number}, turn {turn}");
                            *seed = turn * 4 + number;
                            pin.iter_mut().enumerate().for_each(|(at, to)| *to = byte(*seed, at));
                        }
                        // Four callers of three pages each may hold all there is.
                        Err(Error::Full { .. }) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert_eq!(pager.stats().allocated, 0);
    assert!(refused.into_inner() < 4 * 59, "some of them got through");
}

#[test]
fn readers_of_one_page_are_there_together() {
    let pager = pager(4);
    let mut shared = pager.alloc(PAGE).unwrap();
    shared.pin_mut(0..PAGE).unwrap().fill(9);
    let others: Vec<_> = (0..8).map(|_| pager.alloc(PAGE).unwrap()).collect();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for other in &others {
                    assert!(shared.pin(0..PAGE).unwrap().iter().all(|byte| *byte == 9));
                    // Three hold one page each and one in common at the most: there is room for all.
                    drop(other.pin(0..PAGE).unwrap());
                }
            });
        }
    });
}
