//! NCCL between threads, on host memory: for the crate's own tests.
//!
//! Every call goes on in the background, as a non-blocking communicator's may, until all ranks have made theirs. As in the
//! real one nothing is compared but what would end in chaos here: a group whose ranks disagree waits until it is aborted.

// One argument for every block here: addresses are those that `raw.rs` has checked and lends until the call is done, which it
// is not before the thread that uses them is; handles are boxes that `new_comm` made and `destroy` or `abort` take back.
#![allow(unsafe_code, clippy::undocumented_unsafe_blocks)]

use super::api::{Api, Config, Handle, IN_PROGRESS, NO_COLOR, SUCCESS, UniqueId};
use half::{bf16, f16};
use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    ffi::{c_char, c_int, c_void},
    ptr::null_mut,
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    AllReduce,
    AllGather,
    ReduceScatter,
    Reduce,
    Broadcast,
    Send,
    Recv,
    Split,
}

/// One rank's call. Addresses are numbers: they cross threads.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    send: usize,
    recv: usize,
    len: usize,
    dtype: c_int,
    /// The root, the peer, or the color.
    root: c_int,
    key: c_int,
}

struct World {
    size: usize,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    joined: usize,
    rounds: HashMap<u64, Vec<Option<Op>>>,
    done: HashMap<u64, Vec<Option<(Arc<World>, usize)>>>,
    mail: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
    broken: bool,
}

struct Comm {
    world: Arc<World>,
    rank: usize,
    rounds: Arc<AtomicU64>,
    busy: Arc<AtomicUsize>,
    aborted: Arc<AtomicBool>,
}

fn worlds() -> &'static Mutex<HashMap<u64, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<u64, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Default::default)
}

fn world(size: usize) -> Arc<World> {
    Arc::new(World { size, state: Mutex::default(), news: Condvar::new() })
}

impl World {
    /// Waits until `done`; none if the communicator is aborted.
    fn wait<R>(&self, aborted: &AtomicBool, mut done: impl FnMut(&mut State) -> Option<R>) -> Option<R> {
        let mut state = self.state.lock().unwrap();
        loop {
            if aborted.load(Ordering::SeqCst) {
                return None;
            }
            if let (false, Some(result)) = (state.broken, done(&mut state)) {
                return Some(result);
            }
            state = self.news.wait_timeout(state, Duration::from_millis(1)).unwrap().0;
        }
    }

    fn meet(&self, rank: usize, round: u64, op: Op, aborted: &AtomicBool) -> Option<(Arc<World>, usize)> {
        let mut state = self.state.lock().unwrap();
        let ops = state.rounds.entry(round).or_insert_with(|| vec![None; self.size]);
        ops[rank] = Some(op);
        let all: Option<Vec<Op>> = ops.iter().copied().collect();
        if let (Some(all), false) = (all, state.broken) {
            let agree = |other: &Op| {
                (other.kind, other.len, other.dtype) == (op.kind, op.len, op.dtype)
                    && (op.kind == Kind::Split || other.root == op.root)
            };
            if all.iter().all(agree) {
                // SAFETY: every rank's memory is lent to NCCL until its call is done, and none is before this.
                let parts = unsafe { perform(&all) };
                state.done.insert(round, parts);
                self.news.notify_all();
            }
        }
        drop(state);
        self.wait(aborted, |state| state.done.get(&round).map(|parts| parts[rank].clone()))?
    }
}

unsafe fn load(at: usize, index: usize, dtype: c_int) -> f64 {
    unsafe {
        match dtype {
            6 => (*(at as *const f16).add(index)).to_f64(),
            7 => *(at as *const f32).add(index) as f64,
            8 => *(at as *const f64).add(index),
            _ => (*(at as *const bf16).add(index)).to_f64(),
        }
    }
}

unsafe fn store(at: usize, index: usize, dtype: c_int, value: f64) {
    unsafe {
        match dtype {
            6 => *(at as *mut f16).add(index) = f16::from_f64(value),
            7 => *(at as *mut f32).add(index) = value as f32,
            8 => *(at as *mut f64).add(index) = value,
            _ => *(at as *mut bf16).add(index) = bf16::from_f64(value),
        }
    }
}

fn width(dtype: c_int) -> usize {
    match dtype {
        7 => 4,
        8 => 8,
        _ => 2,
    }
}

/// Sums from the last rank to the first: another order than the ranks'.
unsafe fn sum(ops: &[Op], start: usize, len: usize) -> Vec<f64> {
    let at = |index| ops.iter().rev().map(|op| unsafe { load(op.send, index, op.dtype) }).sum();
    (start..start + len).map(at).collect()
}

unsafe fn fill(op: &Op, start: usize, values: &[f64]) {
    for (index, value) in values.iter().enumerate() {
        unsafe { store(op.recv, start + index, op.dtype, *value) };
    }
}

unsafe fn bytes(at: usize, len: usize) -> Vec<u8> {
    unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
}

unsafe fn put(bytes: &[u8], at: usize) {
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

unsafe fn perform(ops: &[Op]) -> Vec<Option<(Arc<World>, usize)>> {
    let (first, mut parts) = (ops[0], vec![None; ops.len()]);
    let size = first.len * width(first.dtype);
    unsafe {
        match first.kind {
            Kind::AllReduce => {
                let sums = sum(ops, 0, first.len);
                ops.iter().for_each(|op| fill(op, 0, &sums));
            }
            Kind::Reduce => fill(&ops[first.root as usize], 0, &sum(ops, 0, first.len)),
            Kind::ReduceScatter => {
                let sums = sum(ops, 0, first.len * ops.len());
                ops.iter().zip(sums.chunks(first.len.max(1))).for_each(|(op, sums)| fill(op, 0, sums));
            }
            Kind::AllGather => {
                let all: Vec<u8> = ops.iter().flat_map(|op| bytes(op.send, size)).collect();
                ops.iter().for_each(|op| put(&all, op.recv));
            }
            Kind::Broadcast => {
                let data = bytes(ops[first.root as usize].send, size);
                ops.iter().for_each(|op| put(&data, op.recv));
            }
            Kind::Split => {
                for color in ops.iter().map(|op| op.root).filter(|&color| color != NO_COLOR) {
                    let mut members: Vec<_> =
                        (0..ops.len()).filter(|&rank| ops[rank].root == color).collect();
                    members.sort_by_key(|&rank| (ops[rank].key, rank));
                    let part = world(members.len());
                    for (place, rank) in members.into_iter().enumerate() {
                        parts[rank] = Some((part.clone(), place));
                    }
                }
            }
            Kind::Send | Kind::Recv => {}
        }
    }
    parts
}

thread_local! {
    static GROUP: RefCell<Option<Vec<(usize, Op)>>> = const { RefCell::new(None) };
}

/// Does calls of one communicator in the background.
fn go(comm: &Comm, ops: Vec<Op>, split: usize) -> c_int {
    let (world, rank, rounds) = (comm.world.clone(), comm.rank, comm.rounds.clone());
    let (busy, aborted) = (comm.busy.clone(), comm.aborted.clone());
    busy.fetch_add(1, Ordering::SeqCst);
    thread::spawn(move || {
        let letters = |kind| ops.iter().filter(move |op| op.kind == kind);
        for op in letters(Kind::Send) {
            let data = unsafe { bytes(op.send, op.len * width(op.dtype)) };
            let mut state = world.state.lock().unwrap();
            state.mail.entry((rank, op.root as usize)).or_default().push_back(data);
            world.news.notify_all();
        }
        for op in letters(Kind::Recv) {
            let mail = world.wait(&aborted, |state| {
                state.mail.get_mut(&(op.root as usize, rank)).and_then(VecDeque::pop_front)
            });
            let Some(data) = mail else { return };
            unsafe { put(&data, op.recv) };
        }
        for op in ops.iter().filter(|op| !matches!(op.kind, Kind::Send | Kind::Recv)) {
            let part = world.meet(rank, rounds.fetch_add(1, Ordering::SeqCst), *op, &aborted);
            if aborted.load(Ordering::SeqCst) {
                return;
            }
            if let (Some((world, place)), Kind::Split) = (part, op.kind) {
                unsafe { *(split as *mut Handle) = new_comm(world, place) };
            }
        }
        busy.fetch_sub(1, Ordering::SeqCst);
    });
    IN_PROGRESS
}

fn new_comm(world: Arc<World>, rank: usize) -> Handle {
    let (rounds, busy, aborted) = Default::default();
    Box::into_raw(Box::new(Comm { world, rank, rounds, busy, aborted })).cast()
}

unsafe fn comm<'a>(handle: Handle) -> &'a Comm {
    unsafe { &*handle.cast::<Comm>() }
}

fn enqueue(handle: Handle, op: Op) -> c_int {
    GROUP.with_borrow_mut(|group| match group {
        Some(ops) => {
            ops.push((handle as usize, op));
            SUCCESS
        }
        None => go(unsafe { comm(handle) }, vec![op], 0),
    })
}

fn op(kind: Kind, send: *const c_void, recv: *mut c_void, len: usize, dtype: c_int, root: c_int) -> Op {
    Op { kind, send: send as usize, recv: recv as usize, len, dtype, root, key: 0 }
}

type Const = *const c_void;
type Mut = *mut c_void;

unsafe extern "C" fn version(to: *mut c_int) -> c_int {
    unsafe { *to = 21_800 };
    SUCCESS
}
unsafe extern "C" fn unique_id(to: *mut UniqueId) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Bits that are NaN as numbers: they have to arrive as they are.
    let mut id = [0xff; 128];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::SeqCst).to_le_bytes());
    unsafe { *to = UniqueId(id) };
    SUCCESS
}
unsafe extern "C" fn init(to: *mut Handle, size: c_int, id: UniqueId, rank: c_int, _: *mut Config) -> c_int {
    assert!(id.0[8..].iter().all(|byte| *byte == 0xff), "the id was changed on its way");
    let key = u64::from_le_bytes(std::array::from_fn(|at| id.0[at]));
    let world = worlds().lock().unwrap().entry(key).or_insert_with(|| world(size as usize)).clone();
    let handle = new_comm(world, rank as usize);
    unsafe { *to = handle };
    let comm = unsafe { comm(handle) };
    let (world, busy, aborted) = (comm.world.clone(), comm.busy.clone(), comm.aborted.clone());
    busy.fetch_add(1, Ordering::SeqCst);
    thread::spawn(move || {
        world.state.lock().unwrap().joined += 1;
        if world.wait(&aborted, |state| (state.joined == world.size).then_some(())).is_some() {
            busy.fetch_sub(1, Ordering::SeqCst);
        }
    });
    IN_PROGRESS
}
unsafe extern "C" fn split(
    handle: Handle,
    color: c_int,
    key: c_int,
    to: *mut Handle,
    _: *mut Config,
) -> c_int {
    let wish = Op { key, ..op(Kind::Split, null_mut(), null_mut(), 0, 0, color) };
    go(unsafe { comm(handle) }, vec![wish], to as usize)
}
unsafe extern "C" fn destroy(handle: Handle) -> c_int {
    let comm = unsafe { Box::from_raw(handle.cast::<Comm>()) };
    assert_eq!(comm.busy.load(Ordering::SeqCst), 0, "a communicator is destroyed at work");
    SUCCESS
}
unsafe extern "C" fn abort(handle: Handle) -> c_int {
    let comm = unsafe { Box::from_raw(handle.cast::<Comm>()) };
    let mut state = comm.world.state.lock().unwrap();
    comm.aborted.store(true, Ordering::SeqCst);
    state.broken = true;
    drop(state);
    SUCCESS
}
unsafe extern "C" fn async_error(handle: Handle, to: *mut c_int) -> c_int {
    let busy = unsafe { comm(handle) }.busy.load(Ordering::SeqCst) > 0;
    unsafe { *to = if busy { IN_PROGRESS } else { SUCCESS } };
    SUCCESS
}
unsafe extern "C" fn group_start() -> c_int {
    GROUP.with_borrow_mut(|group| assert!(group.replace(Vec::new()).is_none(), "groups are not nested here"));
    SUCCESS
}
unsafe extern "C" fn group_end() -> c_int {
    let ops = GROUP.take().expect("a group was begun");
    let Some(&(handle, _)) = ops.first() else { return SUCCESS };
    assert!(ops.iter().all(|(other, _)| *other == handle));
    go(unsafe { comm(handle as Handle) }, ops.into_iter().map(|(_, op)| op).collect(), 0)
}
unsafe extern "C" fn all_reduce(
    s: Const,
    r: Mut,
    n: usize,
    t: c_int,
    op_: c_int,
    c: Handle,
    _: Mut,
) -> c_int {
    assert_eq!(op_, 0);
    enqueue(c, op(Kind::AllReduce, s, r, n, t, 0))
}
unsafe extern "C" fn all_gather(s: Const, r: Mut, n: usize, t: c_int, c: Handle, _: Mut) -> c_int {
    enqueue(c, op(Kind::AllGather, s, r, n, t, 0))
}
unsafe extern "C" fn reduce_scatter(
    s: Const,
    r: Mut,
    n: usize,
    t: c_int,
    _: c_int,
    c: Handle,
    _: Mut,
) -> c_int {
    enqueue(c, op(Kind::ReduceScatter, s, r, n, t, 0))
}
unsafe extern "C" fn reduce(
    s: Const,
    r: Mut,
    n: usize,
    t: c_int,
    _: c_int,
    root: c_int,
    c: Handle,
    _: Mut,
) -> c_int {
    enqueue(c, op(Kind::Reduce, s, r, n, t, root))
}
unsafe extern "C" fn broadcast(
    s: Const,
    r: Mut,
    n: usize,
    t: c_int,
    root: c_int,
    c: Handle,
    _: Mut,
) -> c_int {
    enqueue(c, op(Kind::Broadcast, s, r, n, t, root))
}
unsafe extern "C" fn send(s: Const, n: usize, t: c_int, peer: c_int, c: Handle, _: Mut) -> c_int {
    enqueue(c, op(Kind::Send, s, null_mut(), n, t, peer))
}
unsafe extern "C" fn recv(r: Mut, n: usize, t: c_int, peer: c_int, c: Handle, _: Mut) -> c_int {
    enqueue(c, op(Kind::Recv, null_mut(), r, n, t, peer))
}
unsafe extern "C" fn error_string(_: c_int) -> *const c_char {
    c"an error".as_ptr()
}
unsafe extern "C" fn last_error(_: Handle) -> *const c_char {
    c"".as_ptr()
}

pub(super) fn api() -> Api {
    Api {
        version,
        unique_id,
        init,
        split,
        destroy,
        abort,
        async_error,
        group_start,
        group_end,
        all_reduce,
        all_gather,
        reduce_scatter,
        reduce,
        broadcast,
        send,
        recv,
        error_string,
        last_error,
    }
}
