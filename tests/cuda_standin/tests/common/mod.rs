//! Streams and memory on a device.

use cuda_standin::{driver::*, error::*};
use std::ffi::c_int;

pub fn streams(device: c_int) -> (usize, usize) {
    let (mut context, mut a, mut b) = (0, 0, 0);
    unsafe {
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, device), SUCCESS);
        assert_eq!(cuCtxSetCurrent(context), SUCCESS);
        assert_eq!((cuStreamCreate(&mut a, 1), cuStreamCreate(&mut b, 1)), (SUCCESS, SUCCESS));
    }
    (a, b)
}

// Not every test allocates.
#[allow(dead_code)]
pub fn allocate(size: usize, stream: usize) -> usize {
    let mut start = 0;
    assert_eq!(unsafe { cuMemAllocAsync(&mut start, size, stream) }, SUCCESS);
    start
}
