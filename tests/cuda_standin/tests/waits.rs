//! Calls that wait for all work of a device deadlock with work that waits for a peer, which is
//! reported.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/kernels.rs"]
mod kernels;

use common::streams;
use cuda_standin::{driver::*, error::*};
use held::block;
use std::{
    ffi::{CString, c_int},
    sync::Once,
    thread,
    time::{Duration, Instant},
};

/// Shortens the limit of ten seconds for the tests.
fn hurry() {
    static ONCE: Once = Once::new();
    // SAFETY: every test calls this first, and no other thread reads the environment before it has.
    ONCE.call_once(|| unsafe { std::env::set_var("CUDA_STANDIN_WAIT", "0.3") });
}

fn image() -> CString {
    kernels::image("extern \"C\" __global__ void nothing(float* x) {}").unwrap()
}

/// Checks that a call during work that does not end is reported together with that work.
fn is_found(device: c_int, name: &str, call: impl FnOnce() -> Code) {
    let (stream, _) = streams(device);
    let held = block(stream);
    assert_eq!(call(), TIMEOUT);
    let begin = format!("deadlock: {name} waits for the work of device {device}, which does not end: a coll");
    assert!(reports().iter().any(|report| report.starts_with(&begin)), "{:?}", reports());
    drop(held);
    assert_eq!(unsafe { cuCtxSynchronize() }, TIMEOUT, "the error is sticky");
}

fn pin() -> Code {
    unsafe { cuMemAllocHost_v2(&mut 0, 64) }
}

#[test]
fn a_module_loaded_during_a_collective_is_a_deadlock() {
    hurry();
    let image = image();
    is_found(0, "cuModuleLoadData", || unsafe { cuModuleLoadData(&mut 0, image.as_ptr()) });
}

#[test]
fn a_module_unloaded_during_a_collective_is_a_deadlock() {
    hurry();
    streams(1);
    let module = kernels::load(&image());
    is_found(1, "cuModuleUnload", || unsafe { cuModuleUnload(module) });
}

#[test]
fn pinned_memory_made_or_freed_during_a_collective_is_a_deadlock() {
    hurry();
    is_found(2, "cuMemAllocHost", pin);
    streams(3);
    let mut start = 0;
    assert_eq!(unsafe { cuMemAllocHost_v2(&mut start, 64) }, SUCCESS);
    is_found(3, "cuMemFreeHost", || unsafe { cuMemFreeHost(start) });
}

#[test]
fn a_kernel_loaded_during_a_collective_is_a_deadlock() {
    hurry();
    let (stream, _) = streams(4);
    let image = image();
    let (known, other) = (kernels::load(&image), kernels::load(&image));
    let (known, other) = (kernels::function(known, c"nothing"), kernels::find(other, c"nothing"));
    let held = block(stream);
    // It was loaded before.
    assert_eq!(unsafe { cuFuncLoad(known) }, SUCCESS);
    drop(held);
    is_found(4, "cuFuncLoad", || unsafe { cuFuncLoad(other) });
}

#[test]
fn a_kernel_first_launched_during_a_collective_is_a_deadlock() {
    hurry();
    let (_, other) = streams(7);
    let function = kernels::find(kernels::load(&image()), c"nothing");
    is_found(7, "cuLaunchKernel", || kernels::launch(function, other, [1, 1, 0], &mut [0]));
}

#[test]
fn the_calls_wait_no_longer_than_the_work() {
    hurry();
    let (stream, _) = streams(5);
    let (held, begin) = (block(stream), Instant::now());
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(60));
            drop(held);
        });
        assert_eq!(pin(), SUCCESS);
    });
    assert!(begin.elapsed() >= Duration::from_millis(60), "it did not wait");
}

/// The context ends with its last user, and its modules with it.
#[test]
fn a_module_does_not_outlive_its_context() {
    hurry();
    let (stream, _) = streams(6);
    let function = kernels::function(kernels::load(&image()), c"nothing");
    assert_eq!(kernels::launch(function, stream, [1, 1, 0], &mut [0]), SUCCESS);
    let mut context = 0;
    unsafe {
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, 6), SUCCESS);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(6), SUCCESS, "another user is left");
        assert_eq!(cuStreamSynchronize(stream), SUCCESS);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(6), SUCCESS);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(6), INVALID_CONTEXT);
        assert_eq!(cuCtxSynchronize(), CONTEXT_IS_DESTROYED);
    }
    let (stream, _) = streams(6);
    assert_eq!(kernels::launch(function, stream, [1, 1, 0], &mut [0]), INVALID_HANDLE);
    assert!(reports().iter().any(|report| report.starts_with("kernel nothing is used, but its module")));
}
