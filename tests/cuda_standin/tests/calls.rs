//! Calls that only query or count.

mod common;

use common::{allocate, streams};
use cuda_standin::{
    counts::{COUNTS, Count, cuda_standin_counts},
    driver::*,
    error::*,
};
use std::ffi::c_int;

fn counts(device: c_int) -> [u64; COUNTS] {
    let mut counts = [0; COUNTS];
    assert_eq!(unsafe { cuda_standin_counts(device, counts.as_mut_ptr(), COUNTS) }, COUNTS);
    counts
}

#[test]
fn calls_are_counted_for_a_thread_and_for_a_device() {
    let (a, b) = streams(0);
    let mut event = 0;
    let before = [counts(-1), counts(0)];
    let p = allocate(8, a);
    unsafe {
        assert_eq!(cuMemsetD8Async(p, 1, 8, a), SUCCESS);
        assert_eq!(cuMemcpyHtoDAsync_v2(p, [2; 8].as_ptr(), 8, a), SUCCESS);
        assert_eq!(cuMemcpyDtoHAsync_v2([0; 8].as_mut_ptr(), p, 8, a), SUCCESS);
        assert_eq!((cuEventCreate(&mut event, 2), cuEventRecord(event, a)), (SUCCESS, SUCCESS));
        assert_eq!((cuEventRecord(event, a), cuStreamWaitEvent(b, event, 0)), (SUCCESS, SUCCESS));
        assert_eq!(cuMemFreeAsync(p, b), SUCCESS);
    }
    let known = [
        (Count::Allocation, 1),
        (Count::Memset, 1),
        (Count::Upload, 1),
        (Count::Download, 1),
        (Count::HostWait, 1),
        (Count::Event, 1),
        (Count::Record, 2),
        (Count::StreamWait, 1),
        (Count::Free, 1),
    ];
    for (now, before) in [counts(-1), counts(0)].into_iter().zip(before) {
        let mut want = [0; COUNTS];
        known.iter().for_each(|(count, times)| want[*count as usize] = *times);
        assert_eq!(std::array::from_fn(|at| now[at] - before[at]), want);
    }
    let other = std::thread::spawn(|| counts(-1)).join();
    assert_eq!(other.ok(), Some([0; COUNTS]), "another thread has called nothing");
}

#[test]
fn an_event_is_of_one_device_and_only_some_keep_the_time() {
    let (a, _) = streams(1);
    let (mut timed, mut other, mut ms) = (0, 0, -1.0);
    unsafe {
        assert_eq!((cuEventCreate(&mut timed, 0), cuEventCreate(&mut other, 2)), (SUCCESS, SUCCESS));
        assert_eq!(cuEventElapsedTime(&mut ms, timed, timed), INVALID_HANDLE, "it was never recorded");
        assert_eq!((cuEventRecord(timed, a), cuEventRecord(other, a)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamSynchronize(a), SUCCESS);
        assert_eq!(cuEventElapsedTime(&mut ms, timed, timed), SUCCESS);
        assert_eq!((ms, cuEventElapsedTime_v2(&mut ms, timed, other)), (0.0, INVALID_HANDLE));
    }
    let (b, _) = streams(2);
    assert_eq!(unsafe { cuEventRecord(timed, b) }, INVALID_HANDLE);
    assert_eq!(unsafe { cuStreamWaitEvent(b, timed, 0) }, SUCCESS, "but streams of all devices may wait");
}

#[test]
fn priorities_are_clamped_to_the_range() {
    streams(3);
    let (mut least, mut greatest, mut stream, mut priority) = (1, 1, 0, 1);
    unsafe {
        assert_eq!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest), SUCCESS);
        assert!(greatest < least && least == 0);
        assert_eq!(cuStreamCreateWithPriority(&mut stream, 1, greatest - 1), SUCCESS);
        assert_eq!(cuStreamGetPriority(stream, &mut priority), SUCCESS);
        assert_eq!(priority, greatest);
        assert_eq!(cuModuleGetLoadingMode(&mut priority), SUCCESS);
        assert!([1, 2].contains(&priority));
    }
}
