//! `CUDA_STANDIN_POOL=fresh`: memory is never reused, so that every use after free is found.

mod common;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};

#[test]
fn memory_is_not_given_out_twice() {
    // SAFETY: the only test of this process: nobody else reads the environment.
    unsafe { std::env::set_var("CUDA_STANDIN_POOL", "fresh") };
    let (a, _) = streams(0);
    let p = allocate(24, a);
    assert_eq!(unsafe { cuMemFreeAsync(p, a) }, SUCCESS);
    assert_ne!(allocate(24, a), p);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 24, a) }, ILLEGAL_ADDRESS);
}
