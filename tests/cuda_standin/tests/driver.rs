//! Correct programs pass under delays; planted bugs are found. Each test has its own device,
//! because errors are sticky.

mod common;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};

/// Writes on one stream, reads on another, with or without the wait between them.
fn handover(a: usize, b: usize, wait: bool) -> (Code, [u8; 64]) {
    let (p, mut event, mut got) = (allocate(64, a), 0, [0; 64]);
    unsafe {
        assert_eq!(cuMemsetD8Async(p, 7, 64, a), SUCCESS);
        assert_eq!((cuEventCreate(&mut event, 0), cuEventRecord(event, a)), (SUCCESS, SUCCESS));
        if wait {
            assert_eq!(cuStreamWaitEvent(b, event, 0), SUCCESS);
        }
        (cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), p, 64, b), got)
    }
}

#[test]
fn ordered_streams_raise_no_alarm() {
    let (a, b) = streams(0);
    for _ in 0..200 {
        assert_eq!(handover(a, b, true), (SUCCESS, [7; 64]));
    }
}

#[test]
fn a_missing_wait_is_a_race() {
    let (a, b) = streams(1);
    assert_eq!(handover(a, b, false).0, ILLEGAL_ADDRESS);
    assert_eq!(unsafe { cuCtxSynchronize() }, ILLEGAL_ADDRESS, "the error is sticky");
    assert!(reports().iter().any(|r| r.starts_with("race: copy to host")));
}

#[test]
fn a_freed_buffer_is_found() {
    let (a, _) = streams(2);
    let p = allocate(64, a);
    assert_eq!(unsafe { cuMemFreeAsync(p, a) }, SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 64, a) }, ILLEGAL_ADDRESS);
}

#[test]
fn one_byte_too_many_is_found() {
    let (a, _) = streams(3);
    let p = allocate(64, a);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 64, a) }, SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p + 1, 0, 64, a) }, ILLEGAL_ADDRESS);
}

#[test]
fn memory_ends_and_fresh_memory_is_nan() {
    let (a, _) = streams(4);
    let (mut p, mut got) = (0, [0u8; 8]);
    assert_eq!(unsafe { cuMemAllocAsync(&mut p, (1 << 30) + 1, a) }, OUT_OF_MEMORY);
    let p = allocate(8, a);
    assert_eq!(
        unsafe { cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), p, 8, a) },
        SUCCESS,
        "running out is not sticky"
    );
    assert!(f64::from_ne_bytes(got).is_nan());
}

#[test]
fn memory_of_another_device_is_refused() {
    let (a, _) = streams(5);
    let p = allocate(8, a);
    let (b, _) = streams(6);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 8, b) }, ILLEGAL_ADDRESS);
}
