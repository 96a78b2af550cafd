//! Device → host → file.

use super::{PAGE, byte};
use crate::{Access, Error, FileOptions, Limit, OnHost, Options, Pager, Simulated};
use proptest::prelude::*;
use std::time::Duration;

/// A device of so many pages over a host of so many, over a file.
fn tiers(device: usize, host: usize) -> Pager<OnHost<Simulated>> {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
    let options = Options { page: PAGE, look_ahead: 4 * PAGE, ..Options::new(Limit::Pages(host * PAGE), Some(file)) };
    let host = Pager::new(options).unwrap();
    // Two device pages are a page of the simulated link's; a little latency lets moves overlap.
    let simulated = Simulated::new(device * PAGE, PAGE, 20e9, Duration::from_micros(5));
    Pager::over(OnHost::new(simulated, host, PAGE), PAGE, Limit::Pages(device * PAGE), 4 * PAGE).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Kernels on the device see what earlier kernels wrote, wherever it was meanwhile.
    #[test]
    fn a_device_with_two_tiers_below_is_a_map_of_bytes(
        turns in prop::collection::vec((0usize..8, 0usize..3, any::<u64>(), any::<bool>()), 1..120),
    ) {
        let pager = tiers(4, 6);
        let allocations: Vec<_> = (0..8).map(|_| pager.alloc(3 * PAGE).unwrap()).collect();
        let device = pager.memory().device();
        let mut known = vec![[None; 3]; 8];
        for (i, page, seed, write) in turns {
            let range = page * PAGE..(page + 1) * PAGE;
            let access = if write { Access::Write } else { Access::Read };
            let hold = allocations[i].hold(range.clone(), access).unwrap();
            let mut wrong = None;
            device.run(allocations[i].region().device(), range, |_, frame| {
                if let Some(known) = known[i][page] {
                    wrong = frame.iter().enumerate().position(|(at, found)| *found != byte(known, at));
                }
                if write {
                    frame.iter_mut().enumerate().for_each(|(at, to)| *to = byte(seed, at));
                    known[i][page] = Some(seed);
                }
            });
            prop_assert_eq!(wrong, None);
            drop(hold);
        }
        prop_assert!(pager.stats().resident <= 4 * PAGE);
        prop_assert!(pager.memory().host().stats().resident <= 6 * PAGE);
        drop(allocations);
        prop_assert_eq!(pager.memory().host().stats().allocated, 0);
    }
}

#[test]
fn what_leaves_a_full_device_and_a_full_host_lies_in_the_file() {
    let pager = tiers(2, 3);
    let allocations: Vec<_> = (0..12).map(|_| pager.alloc(PAGE).unwrap()).collect();
    for allocation in &allocations {
        let _hold = allocation.hold(0..PAGE, Access::Write).unwrap();
        pager.memory().device().run(allocation.region().device(), 0..PAGE, |_, frame| frame.fill(3));
    }
    let (device, host) = (pager.stats(), pager.memory().host().stats());
    assert_eq!((device.resident, host.resident), (2 * PAGE, 3 * PAGE));
    assert!(host.away >= 6 * PAGE, "{host:?}");
}

#[test]
fn a_device_that_has_less_than_its_limit_says_so() {
    let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
    let host = Pager::new(Options { page: PAGE, ..Options::new(Limit::Pages(4 * PAGE), Some(file)) }).unwrap();
    let device = Simulated::new(PAGE, PAGE, f64::INFINITY, Duration::ZERO);
    let pager = Pager::over(OnHost::new(device, host, PAGE), PAGE, Limit::Pages(2 * PAGE), 0).unwrap();
    let allocation = pager.alloc(2 * PAGE).unwrap();
    let error = allocation.hold(0..2 * PAGE, Access::Write).unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
    drop(allocation.hold(0..PAGE, Access::Write).unwrap());
}
