//! Freed memory is reused as in a real pool, and wrong uses of it are still found.

mod common;
#[path = "common/held.rs"]
mod held;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};
use held::block;
use std::ffi::c_int;

const INTERNAL: c_int = 3;

fn free(start: usize, stream: usize) {
    assert_eq!(unsafe { cuMemFreeAsync(start, stream) }, SUCCESS);
}

fn set(device: c_int, attribute: c_int, value: u32) {
    let (mut pool, mut value) = (0, value);
    unsafe {
        assert_eq!(cuDeviceGetDefaultMemPool(&mut pool, device), SUCCESS);
        assert_eq!(cuMemPoolSetAttribute(pool, attribute, (&raw mut value).cast()), SUCCESS);
        let mut now = 9_u32;
        assert_eq!(cuMemPoolGetAttribute(pool, attribute, (&raw mut now).cast()), SUCCESS);
        assert_eq!(now, value);
        assert_eq!(cuMemPoolSetAttribute(pool, 99, (&raw mut value).cast()), INVALID_VALUE);
    }
}

#[test]
fn a_stream_gets_what_it_has_freed_and_reads_nan() {
    let (a, _) = streams(0);
    let blocked = block(a);
    let p = allocate(24, a);
    assert_eq!(unsafe { cuMemsetD8Async(p, 7, 24, a) }, SUCCESS);
    free(p, a);
    let q = allocate(100, a);
    assert_eq!(q, p, "also while nothing of it is done");
    assert_eq!(allocate(100, a) % 512, 0);
    drop(blocked);
    let mut got = [0; 100];
    assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), q, 100, a) }, SUCCESS);
    assert_eq!(got, [0xff; 100]);
    // Addresses need not be page-aligned.
    let places: Vec<_> = [1, 513, 4096].iter().map(|size| allocate(*size, a) % 4096).collect();
    assert_eq!(places, [3584, 3072, 0]);
}

#[test]
fn freed_memory_is_found_until_it_is_given_out_again() {
    let (a, _) = streams(1);
    let p = allocate(24, a);
    free(p, a);
    assert_eq!(unsafe { cuMemsetD8Async(p, 7, 24, a) }, ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("memset: use after free")));
}

#[test]
fn memory_that_was_given_out_again_is_a_race_for_who_still_uses_it() {
    let (a, b) = streams(2);
    let p = allocate(24, a);
    let mut event = 0;
    unsafe {
        assert_eq!((cuEventCreate(&mut event, 2), cuEventRecord(event, a)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamWaitEvent(b, event, 0), SUCCESS);
    }
    free(p, a);
    assert_eq!(allocate(24, a), p);
    assert_eq!(unsafe { cuMemsetD8Async(p, 7, 24, b) }, ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("race: memset of stream")));
}

/// By default a stream waits for another stream's memory without an explicit wait.
#[test]
fn the_pool_orders_streams_unless_it_is_forbidden_to() {
    let (a, b) = streams(3);
    let p = allocate(24, a);
    let blocked = block(a);
    free(p, a);
    assert_eq!(allocate(24, b), p);
    assert_eq!(unsafe { cuStreamQuery(b) }, NOT_READY, "it waits for the other");
    drop(blocked);
    assert_eq!(unsafe { (cuStreamSynchronize(b), cuStreamSynchronize(a)) }, (SUCCESS, SUCCESS));
    free(p, b);

    set(3, INTERNAL, 0);
    let q = allocate(24, b);
    let blocked = block(b);
    free(q, b);
    let other = allocate(24, a);
    assert_ne!(other, q);
    assert_eq!(unsafe { cuStreamQuery(a) }, SUCCESS, "nothing was inserted");
    drop(blocked);
    // Memory that is already free may be reused in any case.
    assert_eq!(unsafe { cuStreamSynchronize(b) }, SUCCESS);
    assert_eq!(allocate(24, a), q);
}

/// The pool's order does not order the program: without a wait it would be a race.
#[test]
fn an_order_that_the_pool_has_made_hides_no_race() {
    let (a, b) = streams(4);
    let (p, data) = (allocate(24, a), allocate(8, a));
    let blocked = block(a);
    assert_eq!(unsafe { cuMemsetD8Async(data, 7, 8, a) }, SUCCESS);
    free(p, a);
    assert_eq!(allocate(24, b), p);
    let mut got = [0; 8];
    assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), data, 8, b) }, ILLEGAL_ADDRESS);
    drop(blocked);
}
