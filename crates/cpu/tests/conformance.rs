//! The conformance suite on every instruction set of this machine, with one thread and, to the same bits, with two; and
//! on the fastest, with every buffer on a pager that lets go of all it can all the time, to the bits of two threads in
//! the system's memory.

use rankfold_cpu::CpuBackend;
use rankfold_cpu::simd::Isa;
use rankfold_pager::{FileOptions, Limit, Options, Pager};
use rankfold_reference::ReferenceBackend;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

/// On the machine's n-th fastest instruction set, of which the portable one is the last.
fn on(n: usize, threads: usize) -> Option<CpuBackend> {
    Some(CpuBackend::with_isa(*Isa::available().get(n)?, Some(threads)))
}

macro_rules! suites {
    ($($name:ident => $n:expr;)*) => {
        $(mod $name {
            rankfold_backend::conformance!(
                // Where the machine has fewer, the last of these tests have nothing to run.
                candidate: match super::on($n, 1) {
                    Some(backend) => backend,
                    None => return,
                },
                oracle: super::ReferenceBackend::new(),
                twin: super::on($n, 2).unwrap(),
            );
        })*
    };
}

suites! {
    fastest => 0;
    second => 1;
    third => 2;
    fourth => 3;
    fifth => 4;
}

/// A pager whose pages are driven out to its file whenever nobody holds them: a kernel that touched what it does not hold
/// would find zeros.
fn restless() -> Pager {
    static PAGER: OnceLock<Pager> = OnceLock::new();
    let make = || {
        let file = FileOptions { folder: std::env::temp_dir(), direct: false, capacity: u64::MAX };
        let options = Options::new(Limit::Pages(1 << 30), Some(file));
        let pager = Pager::new(Options { page: 64 << 10, ..options }).unwrap();
        let driven = pager.clone();
        thread::spawn(move || {
            loop {
                driven.vacate().unwrap();
                thread::sleep(Duration::from_micros(50));
            }
        });
        pager
    };
    PAGER.get_or_init(make).clone()
}

mod paged {
    rankfold_backend::conformance!(
        candidate: super::on(0, 1).unwrap().on_pager_from(super::restless(), 1),
        oracle: super::ReferenceBackend::new(),
        twin: super::on(0, 2).unwrap(),
    );
}
