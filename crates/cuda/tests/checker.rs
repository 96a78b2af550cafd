//! What the checker finds in kernels that have one fault each (`faults/faults.cu`), and that it finds nothing in the
//! same kernels without it. Every finding names the file and the line.

use rankfold_backend::DType;
use rankfold_cuda::host::{HostDriver, Options, Schedule};
use rankfold_cuda::{Argument, Driver, Error, Launch, Place};

/// A driver that watches, with threads in this order.
fn driver(schedule: Schedule) -> HostDriver {
    HostDriver::new(Options { schedule, ..Options::watched() }).unwrap()
}

/// In order, and ten seeds of either kind.
fn schedules() -> impl Iterator<Item = Schedule> {
    let seeds = (0..10).flat_map(|seed| [Schedule::Shuffled(seed), Schedule::Warps(seed)]);
    [Schedule::InOrder].into_iter().chain(seeds)
}

struct Buffers {
    x: u64,
    out: u64,
}

/// 256 input elements below 16, and 256 written output elements.
fn buffers(on: &HostDriver) -> Buffers {
    let bytes: Vec<u8> = (0..256u32).flat_map(|i| (i * i % 16).to_ne_bytes()).collect();
    let (x, out) = (on.alloc(1024).unwrap(), on.alloc(1024).unwrap());
    on.upload(&bytes, x).unwrap();
    on.upload(&[0; 1024], out).unwrap();
    Buffers { x, out }
}

fn input(address: u64) -> Argument {
    Argument::input(DType::U32, address)
}

fn output(address: u64) -> Argument {
    Argument::output(DType::U32, address)
}

fn launch(
    on: &HostDriver,
    kernel: &'static str,
    blocks: u32,
    threads: u32,
    arguments: &[Argument],
) -> Result<(), Error> {
    on.launch(&Launch { kernel, grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0, arguments })
}

/// The line of `faults.cu` that holds `text`.
fn line(text: &str) -> u32 {
    let source = include_str!("faults/faults.cu");
    let line = source.lines().position(|line| line.contains(text)).expect("the line is in the file");
    line as u32 + 1
}

/// That a kernel (x, out, fault) is found out on every schedule, by a finding that `expected` accepts, and that nothing
/// is found without the fault.
fn found_out(kernel: &'static str, blocks: u32, threads: u32, fault: u32, expected: impl Fn(&Error) -> bool) {
    for schedule in schedules() {
        let on = driver(schedule);
        let Buffers { x, out } = buffers(&on);
        let call = |fault: u32| launch(&on, kernel, blocks, threads, &[input(x), output(out), fault.into()]);
        call(0).unwrap_or_else(|error| panic!("{kernel}, {schedule:?}: {error}"));
        let error = call(fault).expect_err(kernel);
        assert!(expected(&error), "{kernel}, {schedule:?}: {error}");
    }
}

/// Whether a finding is a read of this shared array before its writer is done: of what is not there yet, or that races.
fn reads_too_early(error: &Error, array: &str, text: &str) -> bool {
    let (place, access) = match error {
        Error::Uninitialised { place, access, .. } => (place, access),
        Error::Race { place, first, second, .. } if first.thread != second.thread => {
            (place, if second.write { first } else { second })
        }
        _ => return false,
    };
    let here = access.site.file == "faults.cu" && access.site.line == line(text);
    matches!(place, Place::Shared { array: found, .. } if found == array) && here && !access.write
}

#[test]
fn a_barrier_that_is_missing_is_a_race_on_a_named_array() {
    let read = "out[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];";
    found_out("neighbour", 1, 256, 1, |error| reads_too_early(error, "tile", read));
}

#[test]
fn lanes_that_do_not_meet_race() {
    let read = "out[threadIdx.x] = tile[threadIdx.x / WARP * WARP + (threadIdx.x + 1) % WARP];";
    found_out("neighbour_lane", 1, 64, 1, |error| reads_too_early(error, "tile", read));
}

#[test]
fn what_is_still_read_must_not_be_overwritten() {
    found_out(
        "overwrite",
        1,
        64,
        1,
        |error| matches!(error, Error::Race { second, first, .. } if second.write != first.write),
    );
}

#[test]
fn an_update_without_an_atomic_is_a_race_of_threads_and_of_blocks() {
    found_out("count", 1, 64, 1, |error| matches!(error, Error::Race { place: Place::Global { .. }, .. }));
    found_out("count", 4, 32, 1, |error| matches!(error, Error::Race { .. }));
}

#[test]
fn what_other_blocks_count_is_not_read_without_an_atomic() {
    for schedule in schedules() {
        let on = driver(schedule);
        let Buffers { x, out } = buffers(&on);
        let call = |fault: u32| launch(&on, "census", 3, 64, &[output(x), output(out), fault.into()]);
        call(0).unwrap();
        let error = call(1).unwrap_err();
        let Error::Race { first, second, .. } = &error else { panic!("{error}") };
        assert!(first.block != second.block && first.write != second.write, "{error}");
    }
}

#[test]
fn blocks_that_write_one_element_race() {
    for (fault, races) in [(0u32, false), (1, true)] {
        let on = driver(Schedule::InOrder);
        let Buffers { out, .. } = buffers(&on);
        let outcome = launch(&on, "overlap", 2, 32, &[output(out), fault.into()]);
        assert_eq!(outcome.is_err(), races);
        let Err(Error::Race { first, second, .. }) = outcome else { continue };
        assert_eq!((first.block, second.block), (0, 1));
    }
}

#[test]
fn a_tail_that_is_off_by_one_is_out_of_bounds() {
    let on = driver(Schedule::InOrder);
    let Buffers { x, .. } = buffers(&on);
    let out = on.alloc(100 * 4).unwrap();
    let call = |n: u32, fault: u32| launch(&on, "twice", 1, 128, &[input(x), output(out), n.into(), fault.into()]);
    call(100, 0).unwrap();
    let error = call(100, 1).unwrap_err();
    let Error::OutOfBounds { place: Place::Global { bytes: 400, byte: 400, .. }, access, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((access.thread, access.write, access.site.line), (100, true, line("if (i < n + fault)")));
}

#[test]
fn what_was_never_written_is_not_read() {
    let on = driver(Schedule::InOrder);
    let Buffers { out, .. } = buffers(&on);
    let call = |element: u32| launch(&on, "shared_element", 1, 64, &[output(out), element.into()]);
    call(31).unwrap();
    let error = call(32).unwrap_err();
    assert!(
        matches!(&error, Error::Uninitialised { place: Place::Shared { array, byte: 128 }, .. } if array == "small"),
        "{error}"
    );
    let error = call(40).unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { place: Place::SharedGap, .. }), "{error}");

    let fresh = on.alloc(1024).unwrap();
    let error = launch(&on, "neighbour", 1, 64, &[input(fresh), output(out), 0u32.into()]).unwrap_err();
    assert!(matches!(error, Error::Uninitialised { place: Place::Global { bytes: 1024, byte: 0, .. }, .. }), "{error}");
}

#[test]
fn what_was_freed_and_what_is_the_hosts_is_out_of_reach() {
    let on = driver(Schedule::InOrder);
    let Buffers { x, out } = buffers(&on);
    let mine = [0u32; 256];
    let error = launch(&on, "neighbour", 1, 64, &[input(mine.as_ptr() as u64), output(out), 0u32.into()]).unwrap_err();
    assert!(matches!(error, Error::HostPointer { .. }), "{error}");
    on.free(x);
    let error = launch(&on, "neighbour", 1, 64, &[input(x), output(out), 0u32.into()]).unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
}

#[test]
fn threads_that_wait_in_vain_are_named() {
    for schedule in schedules() {
        let on = driver(schedule);
        let Buffers { out, .. } = buffers(&on);
        for (kernel, waits, returned) in [
            (
                "half_barrier",
                "32 threads from 0 to 31: wait at the barrier at faults.cu",
                "32 threads from 32 to 63: have returned",
            ),
            ("missing_lane", "wait for lanes 0xffffffff at faults.cu", "2 threads from 5 to 37: have returned"),
        ] {
            launch(&on, kernel, 1, 64, &[output(out), 0u32.into()]).unwrap();
            let error = launch(&on, kernel, 1, 64, &[output(out), 1u32.into()]).unwrap_err();
            let Error::Divergence { waiting, .. } = &error else { panic!("{error}") };
            assert!(waiting.contains(waits) && waiting.contains(returned), "{waiting}");
        }
    }
}

#[test]
fn an_asynchronous_copy_is_not_read_before_it_has_landed() {
    let read = "out[threadIdx.x] = tile[(4 * threadIdx.x + 4) % (4 * blockDim.x)];";
    found_out("fetch", 1, 64, 1, |error| reads_too_early(error, "tile", read));
    found_out("fetch", 1, 64, 2, |error| reads_too_early(error, "tile", read));
}

#[test]
fn arguments_and_geometry_are_checked_before_anything_runs() {
    let on = driver(Schedule::InOrder);
    let Buffers { x, out } = buffers(&on);
    let error = launch(&on, "neighbour", 1, 64, &[output(out), input(x), 0u32.into()]).unwrap_err();
    let Error::Arguments { expected, found, .. } = &error else { panic!("{error}") };
    assert_eq!((expected.as_str(), found.as_str()), ("&u*uu", "*u&uu"));
    for (blocks, threads) in [(1, 0), (1, 33), (1, 2048), (0, 32)] {
        let error = launch(&on, "neighbour", blocks, threads, &[input(x), output(out), 0u32.into()]).unwrap_err();
        assert!(matches!(error, Error::Geometry { .. }), "{error}");
    }
    let error = launch(&on, "nothing", 1, 32, &[]).unwrap_err();
    assert!(matches!(error, Error::UnknownKernel { .. }), "{error}");
}
