//! Kernels claim exactly what they read and write: two halves of a buffer do not race, overlapping
//! ranges do.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/kernels.rs"]
mod kernels;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};
use held::block;
use kernels::{function, launch};
use std::ffi::{CStr, c_int};

const KERNELS: &str = r#"
struct __align__(16) Pack { float of[4]; };
extern "C" __global__ void fill(float* to, long long from, long long count) {
  for (long long at = threadIdx.x; at < count; at += blockDim.x) to[from + at] = 1;
}
// Copies packs of four with loads of 16 bytes.
extern "C" __global__ void copy(const Pack* from, Pack* to, long long first, long long count) {
  for (long long at = threadIdx.x; at < count; at += blockDim.x) to[first + at] = from[first + at];
}
// Copies to shared memory asynchronously, without waiting.
extern "C" __global__ void fetch(const float* from, float* to) {
  alignas(16) __shared__ float kept[128];
  __standin_copy_async(kept + 4 * threadIdx.x, from + 4 * threadIdx.x);
  __standin_await_copies();
  __syncthreads();
  to[threadIdx.x] = kept[127 - threadIdx.x];
}
"#;

fn on(device: c_int, name: &CStr) -> (usize, usize, usize) {
    let (a, b) = streams(device);
    (a, b, function(kernels::load(&kernels::image(KERNELS).unwrap()), name))
}

/// Orders later work of `b` after the work of `a`.
fn follow(a: usize, b: usize) {
    let mut event = 0;
    unsafe {
        assert_eq!((cuEventCreate(&mut event, 2), cuEventRecord(event, a)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamWaitEvent(b, event, 0), SUCCESS);
    }
}

fn is_reported(begin: &str) {
    assert!(reports().iter().any(|report| report.starts_with(begin)), "{begin}: {:?}", reports());
}

/// Fills two ranges of a buffer on two streams that are not ordered. Returns the error of the
/// second, at once or later.
fn two_ranges(device: c_int, queued: bool, ranges: [[u64; 2]; 2]) -> Code {
    let (a, b, fill) = on(device, c"fill");
    let p = allocate(400, a);
    follow(a, b);
    let gates = queued.then(|| (block(a), block(b)));
    for (stream, [from, count]) in [a, b].into_iter().zip(ranges) {
        let code = launch(fill, stream, [1, 32, 0], &mut [p as u64, from, count]);
        assert!(!queued || code == SUCCESS);
    }
    drop(gates);
    unsafe { (cuStreamSynchronize(b), cuStreamSynchronize(a)).1 }
}

#[test]
fn two_halves_are_no_race() {
    assert_eq!(two_ranges(0, false, [[0, 50], [50, 50]]), SUCCESS);
    assert_eq!(two_ranges(0, true, [[50, 50], [0, 50]]), SUCCESS);
}

#[test]
fn ranges_that_overlap_are_a_race() {
    assert_eq!(two_ranges(1, false, [[0, 51], [50, 50]]), ILLEGAL_ADDRESS);
    is_reported("race: kernel fill of stream");
}

#[test]
fn ranges_that_overlap_are_a_race_also_if_both_run_later() {
    let before = reports().len();
    assert_eq!(two_ranges(2, true, [[50, 50], [0, 51]]), ILLEGAL_ADDRESS);
    assert!(reports().len() > before);
}

/// The other access came later. Another stream has waited for it and overwritten it before the
/// kernel ran.
#[test]
fn a_late_kernel_is_judged_by_all_that_was_done_meanwhile() {
    let (a, b, fill) = on(3, c"fill");
    let p = allocate(400, a);
    follow(a, b);
    let gate = block(a);
    assert_eq!(launch(fill, a, [1, 32, 0], &mut [p as u64, 0, 10]), SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 40, b) }, SUCCESS, "the kernel may not use this part");
    follow(b, a);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 400, a) }, SUCCESS);
    drop(gate);
    assert_eq!(unsafe { cuStreamSynchronize(a) }, ILLEGAL_ADDRESS);
    is_reported("race: kernel fill of stream");
}

#[test]
fn memory_may_be_freed_and_given_out_again_behind_a_kernel_that_has_not_run() {
    let (a, b, fill) = on(4, c"fill");
    let p = allocate(400, a);
    follow(a, b);
    let gate = block(a);
    assert_eq!(launch(fill, a, [1, 32, 0], &mut [p as u64, 0, 100]), SUCCESS);
    assert_eq!(unsafe { cuMemFreeAsync(p, a) }, SUCCESS);
    assert_eq!(allocate(300, a), p - 300usize.next_multiple_of(512) + 512);
    drop(gate);
    assert_eq!(unsafe { cuStreamSynchronize(a) }, SUCCESS);
    // Not without an order.
    let p = allocate(400, a);
    follow(a, b);
    let gate = block(a);
    assert_eq!(launch(fill, a, [1, 32, 0], &mut [p as u64, 0, 100]), SUCCESS);
    assert_eq!(unsafe { cuMemFreeAsync(p, b) }, ILLEGAL_ADDRESS);
    is_reported("race: free of stream");
    drop(gate);
}

#[test]
fn packs_and_late_copies_are_seen_in_full() {
    let (a, b, copy) = on(5, c"copy");
    let (p, q) = (allocate(512, a), allocate(512, a));
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 512, a) }, SUCCESS);
    follow(a, b);
    // Packs 0 to 15 are 256 bytes.
    assert_eq!(launch(copy, a, [1, 8, 0], &mut [p as u64, q as u64, 0, 16]), SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p + 256, 1, 256, b) }, SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(q + 256, 1, 256, b) }, SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p + 255, 1, 1, b) }, ILLEGAL_ADDRESS);
    is_reported("race: memset of stream");

    let (a, b, fetch) = on(6, c"fetch");
    let (p, q) = (allocate(512, a), allocate(512, a));
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 512, a) }, SUCCESS);
    follow(a, b);
    assert_eq!(launch(fetch, a, [1, 32, 0], &mut [p as u64, q as u64]), SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(q + 128, 1, 128, b) }, SUCCESS, "32 numbers were written");
    assert_eq!(unsafe { cuMemsetD8Async(p + 511, 1, 1, b) }, ILLEGAL_ADDRESS, "all was read");
}

#[test]
fn a_read_next_to_the_memory_is_found() {
    let (a, _, copy) = on(7, c"copy");
    let (p, q) = (allocate(500, a), allocate(512, a));
    assert_eq!(launch(copy, a, [1, 32, 0], &mut [p as u64, q as u64, 0, 31]), SUCCESS);
    assert_eq!(launch(copy, a, [1, 32, 0], &mut [p as u64, q as u64, 0, 32]), ILLEGAL_ADDRESS);
    is_reported("kernel copy: out of bounds: it reads");
}
