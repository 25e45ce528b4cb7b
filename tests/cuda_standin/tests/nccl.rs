//! The stand-in's NCCL behaves like the real one, and finds bugs.

use cuda_standin::{driver::*, error::*, nccl::*};
use std::{
    ffi::{CStr, c_int, c_void},
    mem::MaybeUninit,
    ptr::null,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

mod common;

const IN_PROGRESS: c_int = 7;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;

fn config(blocking: c_int) -> Config {
    const UNSET: c_int = c_int::MIN;
    Config {
        size: size_of::<Config>(),
        magic: 0xcafe_beef,
        version: 21_800,
        blocking,
        cga_cluster_size: UNSET,
        min_ctas: UNSET,
        max_ctas: UNSET,
        net_name: null(),
        split_share: UNSET,
    }
}

fn unique_id() -> UniqueId {
    let mut id = MaybeUninit::uninit();
    unsafe {
        assert_eq!(ncclGetUniqueId(id.as_mut_ptr()), 0);
        id.assume_init()
    }
}

fn state(comm: usize) -> c_int {
    let mut state = 0;
    assert_eq!(unsafe { ncclCommGetAsyncError(comm, &mut state) }, 0);
    state
}

/// Waits until a communicator is no longer in progress.
fn settled(comm: usize) -> c_int {
    let mut code = IN_PROGRESS;
    while code == IN_PROGRESS {
        code = state(comm);
    }
    code
}

/// Makes a device current on this thread and opens its memory to the others.
fn open(device: c_int) -> usize {
    let (a, _) = common::streams(device);
    let mut pool = 0;
    unsafe {
        assert_eq!(cuDeviceGetDefaultMemPool(&mut pool, device), SUCCESS);
        for other in (0..8).filter(|&other| other != device) {
            assert_eq!(cuMemPoolSetAccess(pool, &[1, other, 3], 1), SUCCESS);
        }
    }
    a
}

/// Runs ranks on devices. Tests that end in a device error, which is sticky, use devices 2 to 5.
fn ranks(devices: &[c_int], blocking: c_int, rank: impl Fn(c_int, usize, usize) + Sync) {
    let (id, world) = (unique_id(), devices.len() as c_int);
    thread::scope(|scope| {
        for (number, &device) in (0..).zip(devices) {
            let rank = &rank;
            scope.spawn(move || {
                let (stream, mut comm) = (open(device), 0);
                let code = unsafe { ncclCommInitRankConfig(&mut comm, world, id, number, &config(blocking)) };
                assert!(code == 0 || (blocking == 0 && code == IN_PROGRESS), "{code}");
                assert_eq!(settled(comm), 0);
                rank(number, comm, stream);
            });
        }
    });
}

fn floats(stream: usize, values: &[f32]) -> usize {
    let start = common::allocate(size_of_val(values), stream);
    let from = values.as_ptr().cast();
    assert_eq!(unsafe { cuMemcpyHtoDAsync_v2(start, from, size_of_val(values), stream) }, SUCCESS);
    start
}

fn read(stream: usize, from: usize, len: usize) -> Vec<f32> {
    let mut values = vec![0.0_f32; len];
    let to = values.as_mut_ptr().cast();
    assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(to, from, 4 * len, stream) }, SUCCESS);
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, SUCCESS);
    values
}

fn all_reduce(x: usize, len: usize, comm: usize, stream: usize) -> c_int {
    unsafe { ncclAllReduce(x as *const c_void, x as *mut c_void, len, 7, 0, comm, stream) }
}

fn found(text: &str) -> usize {
    reports().iter().filter(|report| report.contains(text)).count()
}

/// The handle of a split is stored once the parent is not in progress any more. It is null for a
/// rank without a color.
#[test]
fn a_split_returns_success_before_it_is_done() {
    ranks(&[0, 1], 0, |rank, comm, _| {
        let (color, mut part) = (if rank == 0 { 3 } else { -1 }, 77_usize);
        let out = &raw mut part;
        assert_eq!(unsafe { ncclCommSplit(comm, color, 0, out, &config(0)) }, 0);
        assert_eq!(unsafe { out.read_volatile() }, 0, "the part is not there yet");
        assert_eq!(state(comm), IN_PROGRESS);
        assert_eq!(settled(comm), 0);
        let part = unsafe { out.read_volatile() };
        assert_eq!(part == 0, rank == 1);
        if rank == 0 {
            assert_eq!(state(part), 0);
            assert_eq!(unsafe { ncclCommDestroy(part) }, 0);
        }
        assert_eq!(unsafe { ncclCommDestroy(comm) }, 0);
    });
}

#[test]
fn a_blocking_split_is_done_when_it_returns() {
    ranks(&[6, 7], 1, |_, comm, _| {
        let mut part = 0;
        assert_eq!(unsafe { ncclCommSplit(comm, 0, 0, &mut part, null()) }, 0);
        assert!(part != 0 && state(comm) == 0 && state(part) == 0);
    });
}

/// Destroyed or aborted.
#[test]
fn a_communicator_is_destroyed_when_all_ranks_have_ended_theirs() {
    for how in [ncclCommDestroy, ncclCommAbort] {
        let both = AtomicBool::new(false);
        ranks(&[6, 7], 1, |rank, comm, _| {
            if rank == 1 {
                thread::sleep(Duration::from_millis(100));
                both.store(true, SeqCst);
                assert_eq!(unsafe { how(comm) }, 0);
                return;
            }
            assert_eq!(unsafe { ncclCommDestroy(comm) }, 0);
            assert!(both.load(SeqCst), "it did not wait");
        });
    }
}

#[test]
fn an_abort_in_the_middle_of_a_group_is_found() {
    const WORDS: &str = "in the middle of a group";
    ranks(&[6, 7], 1, |_, comm, stream| {
        let x = floats(stream, &[1.0]);
        unsafe {
            assert_eq!(ncclGroupStart(), 0);
            assert_eq!(all_reduce(x, 1, comm, stream), 0);
            assert_eq!(ncclCommAbort(comm), 0);
        }
    });
    assert_eq!(found(WORDS), 2);
}

/// An event recorded before the launch has settled is too early: work that waits for it races with
/// the collective.
#[test]
fn a_launch_that_nobody_looked_at_has_not_reached_its_stream() {
    ranks(&[4, 5], 0, |rank, comm, stream| {
        let (_, compute) = common::streams(4 + rank);
        let (x, mut event) = (floats(stream, &[1.0; 5]), 0);
        unsafe {
            assert_eq!(all_reduce(x, 5, comm, stream), IN_PROGRESS);
            assert_eq!(cuStreamQuery(stream), SUCCESS, "nothing is on the stream");
            assert_eq!(cuEventCreate(&mut event, 2), SUCCESS);
            assert_eq!(cuEventRecord(event, stream), SUCCESS);
            assert_eq!(settled(comm), 0);
            assert_eq!(cuStreamWaitEvent(compute, event, 0), SUCCESS);
            assert_eq!(cuMemsetD8Async(x, 0, 20, compute), ILLEGAL_ADDRESS);
        }
    });
    assert_eq!(found("race: memset"), 2, "{:?}", reports());
}

#[test]
fn a_call_on_a_communicator_in_progress_is_refused() {
    ranks(&[6], 0, |_, comm, stream| {
        let (x, before) = (floats(stream, &[1.0; 5]), found("Attempt to use communicator"));
        assert_eq!(all_reduce(x, 5, comm, stream), IN_PROGRESS);
        assert_eq!(all_reduce(x, 5, comm, stream), INVALID_ARGUMENT);
        assert!(found("Attempt to use communicator") > before);
        assert_eq!(settled(comm), 0);
        assert_eq!(all_reduce(x, 5, comm, stream), IN_PROGRESS);
    });
    // Destroying a communicator in progress leaves its group open: later calls of the thread are
    // queued forever.
    ranks(&[6], 0, |_, comm, stream| {
        let x = floats(stream, &[1.0; 5]);
        assert_eq!(all_reduce(x, 5, comm, stream), IN_PROGRESS);
        assert_eq!(unsafe { ncclCommDestroy(comm) }, INVALID_ARGUMENT);
        assert_eq!(settled(comm), 0);
        assert_eq!(all_reduce(x, 5, comm, stream), 0, "queued");
        assert_eq!(settled(comm), 0);
    });
}

#[test]
fn a_communicator_that_has_ended_is_not_used() {
    ranks(&[7], 1, |_, comm, _| {
        assert_eq!(unsafe { ncclCommDestroy(comm) }, 0);
        let before = found("destroyed or aborted");
        assert_eq!(unsafe { ncclCommDestroy(comm) }, INVALID_ARGUMENT);
        let mut state = 0;
        assert_eq!(unsafe { ncclCommGetAsyncError(comm, &mut state) }, INVALID_ARGUMENT);
        assert_eq!(found("destroyed or aborted"), before + 2);
    });
}

/// The first call of each kind on a blocking communicator returns once the peers have made theirs,
/// or it is aborted.
#[test]
fn the_first_call_of_a_blocking_communicator_waits_for_the_peers() {
    ranks(&[0, 1], 1, |rank, comm, stream| {
        let x = floats(stream, &[1.0; 5]);
        let begin = Instant::now();
        if rank == 0 {
            thread::sleep(Duration::from_millis(40));
        }
        assert_eq!(all_reduce(x, 5, comm, stream), 0);
        assert!(begin.elapsed() >= Duration::from_millis(35), "it has not waited");
        assert_eq!(read(stream, x, 5), [2.0; 5]);
        if rank == 0 {
            return;
        }
        let breaker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(40));
            unsafe { ncclCommAbort(comm) }
        });
        let code = unsafe { ncclBroadcast(x as *const c_void, x as *mut c_void, 5, 7, 0, comm, stream) };
        assert_eq!((code, breaker.join().unwrap()), (3, 0));
    });
}

#[test]
fn a_configuration_is_checked() {
    open(7);
    let wrong: [fn(&mut Config); 4] = [
        |config| config.size = 40,
        |config| config.magic = 1,
        |config| config.version = 0,
        |config| config.blocking = 2,
    ];
    for wrong in wrong {
        let (mut config, mut comm) = (config(1), 0);
        wrong(&mut config);
        let code = unsafe { ncclCommInitRankConfig(&mut comm, 1, unique_id(), 0, &config) };
        assert_eq!((code, comm), (INVALID_ARGUMENT, 0));
    }
}

#[test]
fn two_ranks_on_one_device_are_refused() {
    let id = unique_id();
    thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let mut comm = 0;
                open(6);
                let code = unsafe { ncclCommInitRankConfig(&mut comm, 2, id, rank, &config(1)) };
                assert_eq!(code, INVALID_USAGE);
                let text = unsafe { CStr::from_ptr(ncclGetLastError(comm)) }.to_str().unwrap();
                assert_eq!(text, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 6");
            });
        }
    });
}

/// Ranks that start kernels of two communicators in different orders wait for each other. Every
/// rank's streams have to order them.
#[test]
fn kernels_of_two_communicators_have_to_be_ordered() {
    let id = unique_id();
    ranks(&[2, 3], 1, |rank, first, a| {
        let (mut second, mut event) = (0, 0);
        let code = unsafe { ncclCommInitRankConfig(&mut second, 2, id, rank, &config(1)) };
        assert_eq!(code, 0);
        let (_, b) = common::streams(2 + rank);
        let (x, y) = (floats(a, &[1.0; 5]), floats(b, &[2.0; 5]));
        unsafe {
            assert_eq!(all_reduce(x, 5, first, a), 0);
            assert_eq!(cuEventCreate(&mut event, 2), SUCCESS);
            assert_eq!(cuEventRecord(event, a), SUCCESS);
            assert_eq!(cuStreamWaitEvent(b, event, 0), SUCCESS);
        }
        assert_eq!(all_reduce(y, 5, second, b), 0);
        assert_eq!((read(a, x, 5), read(b, y, 5)), (vec![2.0; 5], vec![4.0; 5]));
        // Not ordered, and found whichever runs first.
        assert_eq!(all_reduce(x, 5, first, a), 0);
        assert_eq!(all_reduce(y, 5, second, b), 1);
    });
    assert_eq!(found("of two communicators of a rank are not ordered"), 2);
}

/// With three or more ranks a sum depends on the algorithm, as in the real library.
#[test]
fn sums_are_rounded_term_by_term_in_an_order_of_their_own() {
    let terms = [1.0_f32, 3e-8, 6e-8, -1.0];
    ranks(&[0, 1, 6, 7], 1, |rank, comm, stream| {
        let x = floats(stream, &[terms[rank as usize]; 4]);
        let y = floats(stream, &[terms[rank as usize]; 4]);
        let part = floats(stream, &[0.0]);
        assert_eq!(all_reduce(x, 4, comm, stream), 0);
        let scattered =
            unsafe { ncclReduceScatter(y as *const c_void, part as *mut c_void, 1, 7, 0, comm, stream) };
        assert_eq!(scattered, 0);
        let (all, own) = (read(stream, x, 4), read(stream, part, 1));
        assert!(all.iter().all(|value| *value == all[0]));
        assert!(rank != 2 || own[0] != all[0], "{own:?} and {all:?}");
        assert!(own[0].abs() < 2e-7);
    });
}
