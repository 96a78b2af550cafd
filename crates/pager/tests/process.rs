//! A limit on the whole process, as the system counts it. One test: a process of its own, with no other beside it.

use rankfold_pager::{FileOptions, Limit, Options, Pager, ProcessLimit};

const PAGE: usize = 64 << 10;

/// The system's own figure: `VmRSS`.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn the_process_stays_within_its_limit_whatever_else_it_holds() {
    for direct in [false, true] {
        stays_within_its_limit(direct);
    }
}

/// With direct I/O or without.
fn stays_within_its_limit(direct: bool) {
    let limit = resident() + (64 << 20);
    let file = FileOptions { folder: std::env::temp_dir(), direct, capacity: u64::MAX };
    let options = Options::new(Limit::Process(ProcessLimit::new(limit, 8 << 20)), Some(file));
    let pager = match Pager::new(Options { page: PAGE, ..options }) {
        Err(why) if direct => return eprintln!("skipped: {why}"),
        pager => pager.unwrap(),
    };
    // Of whole blocks of 2 MiB, and of parts of them.
    let mut all: Vec<_> = (0..24).map(|i| pager.alloc((8 << 20) - i % 3 * PAGE).unwrap()).collect();
    let mut other = Vec::new();
    let mut capacity = usize::MAX;
    for round in 0..3 {
        for (i, allocation) in all.iter_mut().enumerate() {
            let bytes = allocation.bytes();
            let mut pin = allocation.pin_mut(0..bytes).unwrap();
            assert!(round == 0 || pin.iter().all(|byte| *byte == i as u8));
            pin.fill(i as u8);
            assert!(resident() <= limit, "{} of {limit}", resident());
        }
        // A reserve of 8 MiB covers what comes between two looks.
        other.push(vec![1u8; 6 << 20]);
        let now = pager.stats().capacity;
        assert!(now < capacity, "what others take is not there for pages");
        capacity = now;
    }
    assert!(pager.stats().evictions > 0);
    drop(other);
    assert!(pager.stats().capacity <= capacity, "what was needed once may be needed again");
}
