//! Launches that a device rejects.

mod common;
#[path = "common/kernels.rs"]
mod kernels;

use common::streams;
use cuda_standin::{driver::*, error::*};
use kernels::{function, launch};
use std::ffi::c_int;

const KERNELS: &str = r#"
template <int N> __device__ float keep(float x) {
  __shared__ float kept[N];
  kept[threadIdx.x] = x;
  __syncthreads();
  return kept[0];
}
extern "C" __global__ void plain(float* x) { x[0] = 1; }
extern "C" __global__ void keeps(float* x) { x[0] = keep<1024>(2) + keep<64>(1); }
extern "C" __global__ void keeps_less(float* x) { x[0] = keep<64>(1); }
extern "C" __global__ void __launch_bounds__(64 * (1 + 1), 2) bounded(float* x) { x[0] = 1; }
"#;

const SHARED: c_int = 1;
const DYNAMIC: c_int = 8;

fn attribute(function: usize, which: c_int) -> c_int {
    let mut value = -1;
    assert_eq!(unsafe { cuFuncGetAttribute(&mut value, which, function) }, SUCCESS);
    value
}

#[test]
fn shared_memory_is_there_for_those_who_ask() {
    let (stream, _) = streams(0);
    let module = kernels::load(&kernels::image(KERNELS).unwrap());
    let x = common::allocate(4, stream) as u64;
    let [plain, keeps, less] = [c"plain", c"keeps", c"keeps_less"].map(|name| function(module, name));
    assert_eq!([plain, keeps, less].map(|f| attribute(f, SHARED)), [0, 4096 + 256, 256]);
    let run = |function, shared| launch(function, stream, [1, 32, shared], &mut [x]);
    // By default 48 KiB, including the memory that the kernel declares.
    assert_eq!((run(plain, 49_152), run(plain, 49_153)), (SUCCESS, INVALID_VALUE));
    assert_eq!((run(keeps, 49_152 - 4352), run(keeps, 49_152 - 4351)), (SUCCESS, INVALID_VALUE));
    unsafe {
        assert_eq!(cuFuncSetAttribute(plain, DYNAMIC, 232_449), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(plain, DYNAMIC, 232_448), SUCCESS);
        assert_eq!(cuFuncSetAttribute(keeps, DYNAMIC, 232_448 - 4351), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(keeps, DYNAMIC, 100_000), SUCCESS);
    }
    assert_eq!(run(plain, 232_448), SUCCESS);
    assert_eq!((run(keeps, 100_000), run(keeps, 100_001)), (SUCCESS, INVALID_VALUE));
    assert_eq!(unsafe { cuCtxSynchronize() }, SUCCESS, "a refused launch is not sticky");
}

#[test]
fn threads_and_blocks_are_limited() {
    let (stream, _) = streams(1);
    let module = kernels::load(&kernels::image(KERNELS).unwrap());
    let x = common::allocate(4, stream) as u64;
    let [plain, bounded] = [c"plain", c"bounded"].map(|name| function(module, name));
    let run = |function, threads| launch(function, stream, [1, threads, 0], &mut [x]);
    assert_eq!([1024, 1025, 0].map(|threads| run(plain, threads)), [SUCCESS, INVALID_VALUE, INVALID_VALUE]);
    assert_eq!([128, 129].map(|threads| run(bounded, threads)), [SUCCESS, INVALID_VALUE]);
    assert_eq!(attribute(bounded, 0), 128);
    let (other, _) = streams(2);
    assert_eq!(launch(plain, other, [1, 1, 0], &mut [0]), INVALID_HANDLE, "it is of another device");
}
