//! Graphs: captured work does not run before a launch and is checked at each one. Illegal calls end
//! the capture with their errors.

mod common;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};
use std::{
    ffi::c_int,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

/// Serializes the tests: a capture may forbid calls of other threads, which would fail in
/// concurrent tests.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn event() -> usize {
    let mut event = 0;
    assert_eq!(unsafe { cuEventCreate(&mut event, 2) }, SUCCESS);
    event
}

fn begin(stream: usize, mode: u32) {
    assert_eq!(unsafe { cuStreamBeginCapture_v2(stream, mode) }, SUCCESS);
    assert_eq!(status(stream), 1);
}

fn status(stream: usize) -> c_int {
    let mut status = 9;
    assert_eq!(unsafe { cuStreamIsCapturing(stream, &mut status) }, SUCCESS);
    status
}

/// Ends the capture and instantiates the graph.
fn executable(stream: usize) -> usize {
    let (mut graph, mut executable) = (0, 0);
    unsafe {
        assert_eq!(cuStreamEndCapture(stream, &mut graph), SUCCESS);
        assert_eq!(cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
        assert_eq!(cuGraphDestroy(graph), SUCCESS);
        assert_eq!(cuGraphDestroy(graph), INVALID_HANDLE);
    }
    executable
}

/// The error with which a capture ends.
fn failed(stream: usize) -> Code {
    let mut graph = 1;
    let code = unsafe { cuStreamEndCapture(stream, &mut graph) };
    assert_eq!((graph, status(stream)), (0, 0), "there is no graph, and nothing is captured any more");
    code
}

fn bytes(start: usize, stream: usize) -> [u8; 8] {
    let mut got = [0; 8];
    assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), start, 8, stream) }, SUCCESS);
    got
}

/// Orders later work of `to` after the work of `from`.
fn follow(from: usize, to: usize) -> Code {
    let event = event();
    assert_eq!(unsafe { cuEventRecord(event, from) }, SUCCESS);
    unsafe { cuStreamWaitEvent(to, event, 0) }
}

#[test]
fn a_graph_is_done_at_each_launch() {
    let _turn = alone();
    let (a, b) = streams(0);
    let (p, q, mut host) = (allocate(8, a), allocate(8, a), [1_u8; 8]);
    begin(a, THREAD_LOCAL);
    unsafe {
        // Copies the host memory of the time of the launch, and the copy again on another stream;
        // then the streams join.
        assert_eq!(cuMemcpyHtoDAsync_v2(p, host.as_ptr(), 8, a), SUCCESS);
        assert_eq!(follow(a, b), SUCCESS);
        assert_eq!(status(b), 1, "it captures too");
        assert_eq!(cuMemcpyDtoDAsync_v2(q, p, 8, b), SUCCESS);
        assert_eq!(follow(b, a), SUCCESS);
        assert_eq!(cuMemsetD8Async(p, 9, 4, a), SUCCESS);
    }
    let graph = executable(a);
    assert_eq!((status(a), status(b)), (0, 0));
    assert_eq!(bytes(q, a), [0xff; 8], "nothing was done");
    for value in [2, 3] {
        host = [value; 8];
        assert_eq!(unsafe { cuGraphLaunch(graph, a) }, SUCCESS);
        assert_eq!(bytes(q, a), host);
        assert_eq!(bytes(p, a), [9, 9, 9, 9, value, value, value, value]);
    }
    // On another stream, ordered by an event.
    assert_eq!(follow(a, b), SUCCESS);
    assert_eq!(unsafe { cuGraphLaunch(graph, b) }, SUCCESS);
    assert_eq!(bytes(q, b), host);
    assert_eq!(
        (unsafe { cuGraphExecDestroy(graph) }, unsafe { cuGraphLaunch(graph, b) }),
        (SUCCESS, INVALID_HANDLE)
    );
}

#[test]
fn a_graph_launched_after_its_buffer_was_freed_is_found() {
    let _turn = alone();
    let (a, _) = streams(1);
    let p = allocate(8, a);
    begin(a, THREAD_LOCAL);
    assert_eq!(unsafe { cuMemsetD8Async(p, 5, 8, a) }, SUCCESS);
    let graph = executable(a);
    assert_eq!(unsafe { cuGraphLaunch(graph, a) }, SUCCESS);
    assert_eq!(bytes(p, a), [5; 8]);
    assert_eq!(unsafe { cuMemFreeAsync(p, a) }, SUCCESS);
    assert_eq!(unsafe { cuGraphLaunch(graph, a) }, ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("memset: use after free")));
}

#[test]
fn a_wait_that_is_missing_inside_of_a_graph_is_a_race() {
    let _turn = alone();
    let (a, b) = streams(2);
    let (p, q) = (allocate(8, a), allocate(8, a));
    begin(a, THREAD_LOCAL);
    unsafe {
        assert_eq!(follow(a, b), SUCCESS);
        assert_eq!(cuMemsetD8Async(p, 5, 8, a), SUCCESS);
        assert_eq!(cuMemcpyDtoDAsync_v2(q, p, 8, b), SUCCESS);
        assert_eq!(follow(b, a), SUCCESS);
    }
    let graph = executable(a);
    assert_eq!(unsafe { cuGraphLaunch(graph, a) }, ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("race: copy (source)")));
}

#[test]
fn a_launch_that_is_not_ordered_with_what_others_do_is_a_race() {
    let _turn = alone();
    let (a, b) = streams(3);
    let p = allocate(8, a);
    begin(a, THREAD_LOCAL);
    assert_eq!(unsafe { cuMemsetD8Async(p, 5, 8, a) }, SUCCESS);
    let graph = executable(a);
    assert_eq!(unsafe { cuGraphLaunch(graph, a) }, SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p, 6, 8, b) }, ILLEGAL_ADDRESS);
}

#[test]
fn memory_of_a_graph_lives_from_launch_to_free() {
    let _turn = alone();
    let (a, _) = streams(4);
    let (p, foreign) = (allocate(8, a), allocate(8, a));
    begin(a, THREAD_LOCAL);
    let inner = allocate(8, a);
    unsafe {
        assert_eq!(cuMemsetD8Async(inner, 3, 8, a), SUCCESS);
        assert_eq!(cuMemcpyDtoDAsync_v2(p, inner, 8, a), SUCCESS);
        assert_eq!(cuMemFreeAsync(inner, a), SUCCESS);
    }
    let graph = executable(a);
    for _ in 0..3 {
        assert_eq!(unsafe { cuGraphLaunch(graph, a) }, SUCCESS);
        assert_eq!(bytes(p, a), [3; 8]);
    }
    // Memory that outlives the launch must be freed before the next launch.
    begin(a, THREAD_LOCAL);
    let outer = allocate(8, a);
    let graph = executable(a);
    for _ in 0..3 {
        assert_eq!(unsafe { cuGraphLaunch(graph, a) }, SUCCESS);
        assert_eq!(bytes(outer, a), [0xff; 8]);
        assert_eq!(unsafe { cuGraphLaunch(graph, a) }, INVALID_VALUE);
        assert_eq!(unsafe { cuMemFreeAsync(outer, a) }, SUCCESS);
    }
    // A graph may not free memory from outside.
    begin(a, THREAD_LOCAL);
    assert_eq!(unsafe { cuMemFreeAsync(foreign, a) }, INVALID_VALUE);
    assert_eq!(failed(a), CAPTURE_INVALIDATED);
    assert_eq!(bytes(foreign, a), [0xff; 8]);
    // More than the device has.
    begin(a, THREAD_LOCAL);
    let (_first, _second) = (allocate(1 << 29, a), allocate((1 << 29) + 1, a));
    let graph = executable(a);
    assert_eq!(unsafe { cuGraphLaunch(graph, a) }, OUT_OF_MEMORY);
    // Before any launch, the graph's memory does not exist.
    assert_eq!(unsafe { cuMemsetD8Async(outer, 0, 8, a) }, ILLEGAL_ADDRESS);
}

#[test]
fn illegal_calls_end_a_capture() {
    let _turn = alone();
    let (a, b) = streams(5);
    let (p, mut byte, captured, outside) = (allocate(8, a), 0, event(), event());
    assert_eq!(unsafe { cuEventRecord(outside, b) }, SUCCESS);
    let mut context = 0;
    assert_eq!(unsafe { cuDevicePrimaryCtxRetain(&mut context, 5) }, SUCCESS);
    let calls: [(&str, Code, &mut dyn FnMut() -> Code); 9] = [
        ("synchronize", CAPTURE_UNSUPPORTED, &mut || unsafe { cuStreamSynchronize(a) }),
        ("query", CAPTURE_UNSUPPORTED, &mut || unsafe { cuStreamQuery(a) }),
        ("context", CAPTURE_UNSUPPORTED, &mut || unsafe { cuCtxSynchronize() }),
        ("event query", CAPTURED_EVENT, &mut || unsafe { cuEventQuery(captured) }),
        ("event synchronize", CAPTURED_EVENT, &mut || unsafe { cuEventSynchronize(captured) }),
        ("an event from outside", CAPTURE_ISOLATION, &mut || unsafe { cuStreamWaitEvent(a, outside, 0) }),
        ("copy", CAPTURE_UNSUPPORTED, &mut || unsafe { cuMemcpyDtoH_v2(&mut byte, p, 1) }),
        ("allocate", CAPTURE_UNSUPPORTED, &mut || unsafe { cuMemAlloc_v2(&mut 0, 8) }),
        ("twice", ILLEGAL_STATE, &mut || unsafe { cuStreamBeginCapture_v2(a, 0) }),
    ];
    for (what, code, call) in calls {
        // Calls that may wait are checked in another mode than queries of captured events.
        let mode = if code == CAPTURED_EVENT { RELAXED } else { THREAD_LOCAL };
        begin(a, mode);
        assert_eq!(unsafe { cuEventRecord(captured, a) }, SUCCESS);
        assert_eq!(call(), code, "{what}");
        if what == "twice" {
            executable(a);
            continue;
        }
        assert_eq!(status(a), 2, "{what}");
        assert_eq!(unsafe { cuMemsetD8Async(p, 0, 8, a) }, CAPTURE_INVALIDATED, "{what}");
        assert_eq!(failed(a), CAPTURE_INVALIDATED, "{what}");
        assert_eq!(unsafe { cuStreamWaitEvent(b, captured, 0) }, CAPTURED_EVENT, "its capture is over");
    }
    assert_eq!(unsafe { cuStreamSynchronize(a) }, SUCCESS, "the stream is none the worse");
    assert_eq!(failed(a), ILLEGAL_STATE, "nothing was begun");
    assert_eq!(unsafe { cuStreamBeginCapture_v2(0, 0) }, CAPTURE_UNSUPPORTED, "the legacy stream");
    assert_eq!(unsafe { cuStreamBeginCapture_v2(a, 3) }, INVALID_VALUE);
}

#[test]
fn forks_have_to_be_joined() {
    let _turn = alone();
    let (a, b) = streams(6);
    let p = allocate(8, a);
    begin(a, THREAD_LOCAL);
    assert_eq!(follow(a, b), SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 8, b) }, SUCCESS);
    let mut graph = 0;
    assert_eq!(unsafe { cuStreamEndCapture(b, &mut graph) }, CAPTURE_UNMATCHED, "it began on the other");
    assert_eq!(failed(a), CAPTURE_INVALIDATED);
    begin(a, THREAD_LOCAL);
    assert_eq!(follow(a, b), SUCCESS);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 8, b) }, SUCCESS);
    assert_eq!(failed(a), CAPTURE_UNJOINED);
    assert_eq!(status(b), 0);
    // Two captures cannot be merged.
    begin(a, THREAD_LOCAL);
    begin(b, THREAD_LOCAL);
    assert_eq!(follow(a, b), CAPTURE_MERGE);
    assert_eq!((failed(a), failed(b)), (CAPTURE_INVALIDATED, CAPTURE_INVALIDATED));
}

#[test]
fn modes_say_who_may_wait() {
    let _turn = alone();
    let (a, b) = streams(7);
    let event = event();
    assert_eq!(unsafe { (cuEventRecord(event, b), cuStreamSynchronize(b)) }, (SUCCESS, SUCCESS));
    let query = || unsafe { cuEventQuery(event) };
    let elsewhere = || thread::scope(|scope| scope.spawn(query).join().unwrap());
    for (mode, here, there) in [
        (GLOBAL, CAPTURE_UNSUPPORTED, CAPTURE_UNSUPPORTED),
        (THREAD_LOCAL, CAPTURE_UNSUPPORTED, SUCCESS),
        (RELAXED, SUCCESS, SUCCESS),
    ] {
        for (code, ask) in [(there, &elsewhere as &dyn Fn() -> Code), (here, &query)] {
            begin(a, mode);
            assert_eq!(ask(), code, "mode {mode}");
            if code == SUCCESS {
                executable(a);
            } else {
                assert_eq!(failed(a), CAPTURE_INVALIDATED);
            }
        }
        // Another thread may only end a relaxed capture.
        begin(a, mode);
        let end = || {
            streams(7);
            let mut graph = 0;
            unsafe { cuStreamEndCapture(a, &mut graph) }
        };
        let code = thread::scope(|scope| scope.spawn(end).join().unwrap());
        assert_eq!(code, if mode == RELAXED { SUCCESS } else { CAPTURE_WRONG_THREAD });
        if mode != RELAXED {
            executable(a);
        }
    }
    // The legacy stream waits for blocking streams.
    let mut tied = 0;
    assert_eq!(unsafe { cuStreamCreate(&mut tied, 0) }, SUCCESS);
    let p = allocate(8, a);
    begin(a, RELAXED);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 0, 0) }, SUCCESS);
    executable(a);
    begin(tied, RELAXED);
    assert_eq!(unsafe { cuMemsetD8Async(p, 0, 0, 0) }, CAPTURE_IMPLICIT);
    assert_eq!(failed(tied), CAPTURE_INVALIDATED);
}
