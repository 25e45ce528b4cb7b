//! The exported entry points of `libnccl`, between the threads of one process, and by [`crate::remote`] between processes.
//!
//! A call goes to its stream, and is done there when all ranks have come. As in the real one nothing is compared but what would
//! end in chaos here: ranks that disagree are reported, and wait until they are aborted.

use crate::{
    driver::{self, illegal, stream_now},
    error::{self, Code},
    memory::{self, Accessor},
    remote::{self, Line},
    stream::lock,
};
use half::{bf16, f16};
use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    ffi::{c_char, c_int, c_void},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

const SUCCESS: Code = 0;
const UNHANDLED: Code = 1;
const INVALID_ARGUMENT: Code = 4;
const INVALID_USAGE: Code = 5;
const REMOTE: Code = 6;
const IN_PROGRESS: Code = 7;
const NO_COLOR: c_int = -1;

type Handle = usize;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    AllReduce,
    AllGather,
    ReduceScatter,
    Reduce,
    Broadcast,
    Send,
    Recv,
}

impl Kind {
    pub fn of(number: u64) -> Self {
        const ALL: [Kind; 7] = [
            Kind::AllReduce,
            Kind::AllGather,
            Kind::ReduceScatter,
            Kind::Reduce,
            Kind::Broadcast,
            Kind::Send,
            Kind::Recv,
        ];
        ALL[number as usize % ALL.len()]
    }
}

/// One rank's call.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: Kind,
    pub send: usize,
    pub recv: usize,
    pub len: usize,
    pub dtype: c_int,
    /// The root, or the peer.
    pub root: c_int,
}

/// The ranks of a communicator, as they meet.
pub struct World {
    number: u64,
    size: usize,
    state: Mutex<State>,
    news: Condvar,
    /// The way to it, if it is in another process.
    line: Option<Arc<Line>>,
}

#[derive(Default)]
struct State {
    joined: usize,
    rounds: HashMap<u64, Round>,
    /// By sender and receiver.
    mail: HashMap<(usize, usize), Mail>,
    wishes: Vec<Option<(c_int, c_int)>>,
    /// How many divisions were done, and what became of the last: each rank's world and place in it.
    divisions: u64,
    parts: Vec<Option<(Arc<World>, usize)>>,
}

/// Letters on their way, and how many were sent and taken.
#[derive(Default)]
struct Mail {
    letters: VecDeque<Vec<u8>>,
    sent: u64,
    taken: u64,
}

/// What the ranks have come with, and how many have gone again.
struct Round {
    ops: Vec<Option<Op>>,
    done: bool,
    left: usize,
}

struct Comm {
    /// None until the division that it is a part of is done.
    place: OnceLock<(Arc<World>, usize)>,
    /// The parent's world and rank, and which division it is.
    parent: Option<(Arc<World>, usize, u64)>,
    rounds: AtomicU64,
    divisions: AtomicU64,
    aborted: Arc<AtomicBool>,
    fault: AtomicI32,
    /// Communicators that a division will make.
    children: Mutex<Vec<Arc<Comm>>>,
}

fn worlds() -> &'static Mutex<HashMap<Vec<u8>, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<Vec<u8>, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Mutex::default)
}

/// A rank is there.
pub fn join(world: &World, _rank: usize) {
    lock(&world.state).joined += 1;
    world.news.notify_all();
}

/// One rank's wish for a division, which is its `count`-th: waits for the part that it gets.
pub fn wish(
    world: &World,
    rank: usize,
    (count, color, key): (i64, c_int, c_int),
) -> Option<(Arc<World>, usize)> {
    world.divide(rank, color, key);
    let never = AtomicBool::new(false);
    world.wait(&never, |state| (state.divisions > count as u64).then(|| state.parts[rank].clone())).flatten()
}

impl World {
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, None)
    }

    fn with(size: usize, line: Option<Arc<Line>>) -> Arc<Self> {
        // Above what ids count to.
        static NEXT: AtomicU64 = AtomicU64::new(1 << 32);
        let state = State { wishes: vec![None; size], ..State::default() };
        let number = NEXT.fetch_add(1, SeqCst);
        Arc::new(Self { number, size, state: Mutex::new(state), news: Condvar::new(), line })
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn wait_until_joined(&self, aborted: &AtomicBool) {
        self.wait(aborted, |state| (state.joined >= self.size).then_some(()));
    }

    /// One rank's wish for a division; the last to wish divides.
    fn divide(&self, rank: usize, color: c_int, key: c_int) {
        let mut state = lock(&self.state);
        state.wishes[rank] = Some((color, key));
        let all: Option<Vec<_>> = state.wishes.iter().copied().collect();
        let Some(all) = all else { return };
        let mut parts = vec![None; all.len()];
        for color in all.iter().map(|wish| wish.0).filter(|&color| color != NO_COLOR) {
            if all.iter().zip(&parts).any(|(wish, part)| wish.0 == color && part.is_some()) {
                continue;
            }
            let mut members: Vec<_> = (0..all.len()).filter(|&rank| all[rank].0 == color).collect();
            members.sort_by_key(|&rank| (all[rank].1, rank));
            let part = Self::new(members.len());
            lock(&part.state).joined = members.len();
            for (place, rank) in members.into_iter().enumerate() {
                parts[rank] = Some((Arc::clone(&part), place));
            }
        }
        state.parts = parts;
        state.divisions += 1;
        state.wishes.fill(None);
        self.news.notify_all();
    }

    /// Waits until `done`; none if this rank aborts.
    fn wait<R>(&self, aborted: &AtomicBool, mut done: impl FnMut(&mut State) -> Option<R>) -> Option<R> {
        let mut state = lock(&self.state);
        loop {
            if let Some(result) = done(&mut state) {
                return Some(result);
            }
            if aborted.load(SeqCst) {
                return None;
            }
            state = match self.news.wait_timeout(state, Duration::from_millis(20)) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// One collective of this rank: it is done by the last to come, and nobody leaves before.
    fn meet(&self, rank: usize, number: u64, op: Op, aborted: &AtomicBool) {
        {
            let mut state = lock(&self.state);
            let round = state.rounds.entry(number).or_insert_with(|| Round {
                ops: vec![None; self.size],
                done: false,
                left: 0,
            });
            round.ops[rank] = Some(op);
            let all: Option<Vec<Op>> = round.ops.iter().copied().collect();
            if let Some(all) = all {
                let agree = |other: &Op| {
                    (other.kind, other.len, other.dtype, other.root) == (op.kind, op.len, op.dtype, op.root)
                };
                match all.iter().all(agree) {
                    true => {
                        // SAFETY: every rank's memory was judged, and is lent until its call is done, as none is yet.
                        unsafe { perform(&all) };
                        round.done = true;
                    }
                    false => error::report(format!("NCCL: the ranks call different things: {all:?}")),
                }
                self.news.notify_all();
            }
        }
        let done = self.wait(aborted, |state| {
            let round = state.rounds.get_mut(&number)?;
            round.done.then_some(())?;
            round.left += 1;
            if round.left == self.size {
                state.rounds.remove(&number);
            }
            Some(())
        });
        if done.is_none() {
            // Who aborts takes its memory along: nobody will use it any more.
            if let Some(round) = lock(&self.state).rounds.get_mut(&number) {
                round.ops[rank] = None;
            }
        }
    }
}

pub fn width(dtype: c_int) -> Option<usize> {
    match dtype {
        6 | 9 => Some(2),
        7 => Some(4),
        8 => Some(8),
        _ => None,
    }
}

unsafe fn load(at: usize, index: usize, dtype: c_int) -> f64 {
    // SAFETY: the element was judged to be memory of the device.
    unsafe {
        match dtype {
            6 => f64::from((*(at as *const f16).add(index)).to_f32()),
            7 => f64::from(*(at as *const f32).add(index)),
            8 => *(at as *const f64).add(index),
            _ => f64::from((*(at as *const bf16).add(index)).to_f32()),
        }
    }
}

unsafe fn store(at: usize, index: usize, dtype: c_int, value: f64) {
    // SAFETY: as in `load`.
    unsafe {
        match dtype {
            6 => *(at as *mut f16).add(index) = f16::from_f32(value as f32),
            7 => *(at as *mut f32).add(index) = value as f32,
            8 => *(at as *mut f64).add(index) = value,
            _ => *(at as *mut bf16).add(index) = bf16::from_f32(value as f32),
        }
    }
}

/// Sums from the last rank to the first, and in f64: another order and rounding than shardwise's own.
unsafe fn sum(ops: &[Op], len: usize) -> Vec<f64> {
    // SAFETY: see `load`.
    (0..len).map(|at| ops.iter().rev().map(|op| unsafe { load(op.send, at, op.dtype) }).sum()).collect()
}

unsafe fn fill(op: &Op, values: &[f64]) {
    for (at, value) in values.iter().enumerate() {
        // SAFETY: see `load`.
        unsafe { store(op.recv, at, op.dtype, *value) };
    }
}

unsafe fn bytes(at: usize, len: usize) -> Vec<u8> {
    if len == 0 {
        return Vec::new();
    }
    // SAFETY: see `load`.
    unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
}

unsafe fn write(bytes: &[u8], at: usize) {
    // SAFETY: see `load`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

unsafe fn perform(ops: &[Op]) {
    let first = ops[0];
    let size = first.len * width(first.dtype).unwrap_or(0);
    // SAFETY: see `meet`.
    unsafe {
        match first.kind {
            Kind::AllReduce => {
                let sums = sum(ops, first.len);
                ops.iter().for_each(|op| fill(op, &sums));
            }
            Kind::Reduce => fill(&ops[first.root as usize], &sum(ops, first.len)),
            Kind::ReduceScatter => {
                let sums = sum(ops, first.len * ops.len());
                ops.iter().zip(sums.chunks(first.len.max(1))).for_each(|(op, sums)| fill(op, sums));
            }
            Kind::AllGather => {
                let all: Vec<u8> = ops.iter().flat_map(|op| bytes(op.send, size)).collect();
                ops.iter().for_each(|op| write(&all, op.recv));
            }
            Kind::Broadcast => {
                let data = bytes(ops[first.root as usize].send, size);
                ops.iter().for_each(|op| write(&data, op.recv));
            }
            Kind::Send | Kind::Recv => {}
        }
    }
}

impl Comm {
    fn new(place: Option<(Arc<World>, usize)>, parent: Option<(Arc<World>, usize, u64)>) -> Arc<Self> {
        let cell = OnceLock::new();
        if let Some(place) = place {
            let _ = cell.set(place);
        }
        Arc::new(Self {
            place: cell,
            parent,
            rounds: AtomicU64::new(0),
            divisions: AtomicU64::new(0),
            aborted: Arc::default(),
            fault: AtomicI32::new(0),
            children: Mutex::default(),
        })
    }

    /// Takes its place, if the division that it waits for is done. Whether it has one.
    fn settle(&self) -> bool {
        if let (None, Some((world, rank, number))) = (self.place.get(), &self.parent) {
            let state = lock(&world.state);
            if state.divisions > *number
                && let Some(part) = state.parts.get(*rank).cloned().flatten()
            {
                let _ = self.place.set(part);
            }
        }
        self.place.get().is_some()
    }

    fn is_ready(&self) -> bool {
        let children = lock(&self.children);
        let all_joined = |world: &World| match &world.line {
            Some(line) => line.has_joined(),
            None => lock(&world.state).joined >= world.size,
        };
        self.settle()
            && self.place.get().is_some_and(|(world, _)| all_joined(world))
            && children.iter().all(|child| child.settle() || child.is_of_nobody())
    }

    /// Whether the division has left this one without a place.
    fn is_of_nobody(&self) -> bool {
        self.parent.as_ref().is_some_and(|(world, rank, number)| {
            let state = lock(&world.state);
            state.divisions > *number && state.parts.get(*rank).is_some_and(Option::is_none)
        })
    }
}

/// The communicator of a handle, which is an `Arc` that `destroy` or `abort` takes back.
unsafe fn comm(handle: Handle) -> Result<Arc<Comm>, Code> {
    if handle == 0 {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: handles are what `hand_out` made of an `Arc`, which they hold.
    unsafe {
        Arc::increment_strong_count(handle as *const Comm);
        Ok(Arc::from_raw(handle as *const Comm))
    }
}

fn hand_out(comm: Arc<Comm>) -> Handle {
    Arc::into_raw(comm) as Handle
}

/// How many groups are open, and the calls in them: communicator, operation and stream.
type Grouped = (usize, Vec<(Handle, Op, Handle)>);

thread_local! {
    static GROUP: RefCell<Grouped> = const { RefCell::new((0, Vec::new())) };
}

/// Hands calls of one communicator to their stream.
fn go(handle: Handle, ops: Vec<Op>, on: driver::Handle) -> Result<(), Code> {
    // SAFETY: the caller's handle.
    let comm = unsafe { comm(handle)? };
    let (world, rank) = comm.place.get().cloned().ok_or(INVALID_USAGE)?;
    let ranks = world.size;
    for op in &ops {
        let peers = matches!(op.kind, Kind::Broadcast | Kind::Reduce | Kind::Send | Kind::Recv);
        if width(op.dtype).is_none() || (peers && !(0..ranks as c_int).contains(&op.root)) {
            return Err(INVALID_ARGUMENT);
        }
    }
    // Collectives are not captured here, as a real NCCL's may be.
    let stream = stream_now(on).map_err(|_| UNHANDLED)?;
    let judged = ops.clone();
    // Ranks of one process reach into each other's memory directly.
    let near = world.line.is_none() && !remote::serves();
    let direct = ranks > 1 && near && !driver::is_open(stream.device);
    let judge = move |who: &Accessor| {
        if direct {
            return Err(format!(
                "NCCL: the memory of device {} is not open to the other ranks' devices",
                who.device
            ));
        }
        judged.iter().try_for_each(|op| {
            let size = op.len * width(op.dtype).unwrap_or(0);
            let (sent, received) = match op.kind {
                Kind::AllReduce => (size, size),
                Kind::AllGather => (size, size * ranks),
                Kind::ReduceScatter => (size * ranks, size),
                Kind::Reduce => (size, if op.root as usize == rank { size } else { 0 }),
                Kind::Broadcast => (if op.root as usize == rank { size } else { 0 }, size),
                Kind::Send => (size, 0),
                Kind::Recv => (0, size),
            };
            let what = format!("NCCL {:?}", op.kind);
            memory::access(who, op.send, sent, false, &what)?;
            memory::access(who, op.recv, received, true, &what)
        })
    };
    // Each collective is a meeting of its own, in the order of the calls.
    let collectives = ops.iter().filter(|op| !matches!(op.kind, Kind::Send | Kind::Recv)).count() as u64;
    let first = comm.rounds.fetch_add(collectives, SeqCst);
    let work = move || match &world.line {
        Some(line) => {
            if line.run(rank, world.size, &ops).is_err() && !comm.aborted.load(SeqCst) {
                // The other end is gone. As with the real one what was asked for is never done.
                comm.fault.store(REMOTE, SeqCst);
                let _: Option<()> = world.wait(&comm.aborted, |_| None);
            }
        }
        None => {
            do_ops(&world, rank, first, &ops, &comm.aborted);
        }
    };
    illegal(stream.device, stream.push(ranks > 1, judge, work)).map(drop).map_err(|_| UNHANDLED)
}

/// Does a rank's calls in its own process; returns the number of the collective after them.
pub fn do_ops(world: &World, rank: usize, first: u64, ops: &[Op], aborted: &AtomicBool) -> u64 {
    let letters = |kind| ops.iter().filter(move |op| op.kind == kind);
    let mut sent = Vec::new();
    for op in letters(Kind::Send) {
        // SAFETY: the memory was judged, or is the caller's own.
        let data = unsafe { bytes(op.send, op.len * width(op.dtype).unwrap_or(0)) };
        let (way, mut state) = ((rank, op.root as usize), lock(&world.state));
        let mail = state.mail.entry(way).or_default();
        mail.letters.push_back(data);
        mail.sent += 1;
        sent.push((way, mail.sent));
        world.news.notify_all();
    }
    for op in letters(Kind::Recv) {
        let size = op.len * width(op.dtype).unwrap_or(0);
        let letter = world.wait(aborted, |state| {
            let mail = state.mail.get_mut(&(op.root as usize, rank))?;
            let letter = mail.letters.pop_front()?;
            mail.taken += 1;
            Some(letter)
        });
        world.news.notify_all();
        match letter {
            // SAFETY: as above.
            Some(data) if data.len() == size => unsafe { write(&data, op.recv) },
            Some(data) => error::report(format!("NCCL: {} bytes were sent, {size} are expected", data.len())),
            None => return first,
        }
    }
    // As the real one does with what is too large for its buffers, a send ends when it was received.
    let taken = |state: &State, way, number| state.mail.get(way).is_some_and(|mail| mail.taken >= number);
    for (way, number) in &sent {
        if world.wait(aborted, |state| taken(state, way, *number).then_some(())).is_none() {
            return first;
        }
    }
    let collectives = ops.iter().filter(|op| !matches!(op.kind, Kind::Send | Kind::Recv));
    let mut next = first;
    for op in collectives {
        world.meet(rank, next, *op, aborted);
        next += 1;
    }
    next
}

fn enqueue(handle: Handle, op: Op, on: driver::Handle) -> Result<(), Code> {
    let grouped = GROUP.with_borrow_mut(|(depth, ops)| {
        if *depth > 0 {
            ops.push((handle, op, on));
        }
        *depth > 0
    });
    if grouped { Ok(()) } else { go(handle, vec![op], on) }
}

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; 128]);

type Const = *const c_void;
type Mut = *mut c_void;

macro_rules! exports {
    ($(fn $name:ident($($a:ident: $t:ty),* $(,)?) $body:block)*) => {$(
        /// # Safety
        /// As NCCL's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($a: $t),*) -> Code {
            let run = || -> Result<Code, Code> { $body };
            run().unwrap_or_else(|code| code)
        }
    )*};
}

fn op(kind: Kind, send: Const, recv: Mut, len: usize, dtype: c_int, root: c_int) -> Op {
    Op { kind, send: send as usize, recv: recv as usize, len, dtype, root }
}

exports! {
    fn ncclGetVersion(version: *mut c_int) { unsafe { *version = 22_800 }; Ok(SUCCESS) }
    fn ncclGetUniqueId(id: *mut UniqueId) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Bits that are NaN as numbers: they have to arrive as they are.
        let mut bytes = [0xff; 128];
        bytes[..8].copy_from_slice(&NEXT.fetch_add(1, SeqCst).to_le_bytes());
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        remote::listen();
        unsafe { *id = UniqueId(bytes) };
        Ok(SUCCESS)
    }
    fn ncclCommInitRankConfig(out: *mut Handle, size: c_int, id: UniqueId, rank: c_int, _config: Mut) {
        if out.is_null() || size < 1 || !(0..size).contains(&rank) { return Err(INVALID_ARGUMENT); }
        let number = u64::from_le_bytes(std::array::from_fn(|at| id.0[at]));
        let process = u32::from_le_bytes(std::array::from_fn(|at| id.0[8 + at]));
        let (rank, size) = (rank as usize, size as usize);
        let world = if process == std::process::id() {
            let known = Arc::clone(lock(worlds()).entry(id.0.to_vec()).or_insert_with(|| {
                remote::world(number, size)
            }));
            if known.size != size { return Err(INVALID_ARGUMENT); }
            join(&known, rank);
            known
        } else {
            World::with(size, Some(Line::join(process, number, rank, size).map_err(|_| UNHANDLED)?))
        };
        unsafe { *out = hand_out(Comm::new(Some((world, rank)), None)) };
        Ok(IN_PROGRESS)
    }
    fn ncclCommSplit(handle: Handle, color: c_int, key: c_int, out: *mut Handle, _config: Mut) {
        let parent = unsafe { comm(handle)? };
        let (world_of_parent, rank) = parent.place.get().cloned().ok_or(INVALID_USAGE)?;
        let number = parent.divisions.fetch_add(1, SeqCst);
        let child = Comm::new(None, Some((Arc::clone(&world_of_parent), rank, number)));
        match &world_of_parent.line {
            None => world_of_parent.divide(rank, color, key),
            Some(line) => {
                let (line, child) = (Arc::clone(line), Arc::clone(&child));
                let parent = Arc::clone(&world_of_parent);
                std::thread::spawn(move || {
                    let Ok(part) = line.split(color, key) else { return };
                    if let Some((line, size, place)) = part {
                        let _ = child.place.set((World::with(size, Some(line)), place));
                    }
                    // The division is over, whatever this rank got of it.
                    let mut state = lock(&parent.state);
                    state.parts = vec![None; parent.size];
                    state.divisions = number + 1;
                });
            }
        }
        lock(&parent.children).push(Arc::clone(&child));
        if color != NO_COLOR && !out.is_null() {
            unsafe { *out = hand_out(child) };
        }
        Ok(IN_PROGRESS)
    }
    fn ncclCommDestroy(handle: Handle) { unsafe { drop(Arc::from_raw(handle as *const Comm)) }; Ok(SUCCESS) }
    fn ncclCommAbort(handle: Handle) {
        let comm = unsafe { Arc::from_raw(handle as *const Comm) };
        comm.aborted.store(true, SeqCst);
        if let Some((world, _)) = comm.place.get() {
            if let Some(line) = &world.line { line.cut(); }
            world.news.notify_all();
        }
        Ok(SUCCESS)
    }
    fn ncclCommGetAsyncError(handle: Handle, out: *mut c_int) {
        let comm = unsafe { comm(handle)? };
        let fault = comm.fault.load(SeqCst);
        unsafe { *out = if fault != 0 { fault } else if comm.is_ready() { SUCCESS } else { IN_PROGRESS } };
        Ok(SUCCESS)
    }
    // A fault for tests: what `ncclCommGetAsyncError` says from now on.
    fn cuda_standin_nccl_fault(handle: Handle, code: c_int) { unsafe { comm(handle)? }.fault.store(code, SeqCst); Ok(SUCCESS) }
    fn ncclGroupStart() { GROUP.with_borrow_mut(|group| group.0 += 1); Ok(SUCCESS) }
    fn ncclGroupEnd() {
        let calls = GROUP.with_borrow_mut(|(depth, calls)| {
            *depth = depth.checked_sub(1).ok_or(INVALID_USAGE)?;
            Ok::<_, Code>(if *depth == 0 { std::mem::take(calls) } else { Vec::new() })
        })?;
        let mut batches: Vec<((Handle, Handle), Vec<Op>)> = Vec::new();
        for (handle, op, on) in calls {
            match batches.iter_mut().find(|(place, _)| *place == (handle, on)) {
                Some((_, ops)) => ops.push(op),
                None => batches.push(((handle, on), vec![op])),
            }
        }
        batches.into_iter().try_for_each(|((handle, on), ops)| go(handle, ops, on))?;
        Ok(SUCCESS)
    }
    fn ncclAllReduce(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::AllReduce, s, r, n, t, 0), on).map(|()| SUCCESS)
    }
    fn ncclAllGather(s: Const, r: Mut, n: usize, t: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::AllGather, s, r, n, t, 0), on).map(|()| SUCCESS)
    }
    fn ncclReduceScatter(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::ReduceScatter, s, r, n, t, 0), on).map(|()| SUCCESS)
    }
    fn ncclReduce(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, root: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::Reduce, s, r, n, t, root), on).map(|()| SUCCESS)
    }
    fn ncclBroadcast(s: Const, r: Mut, n: usize, t: c_int, root: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Broadcast, s, r, n, t, root), on).map(|()| SUCCESS)
    }
    fn ncclSend(s: Const, n: usize, t: c_int, peer: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Send, s, std::ptr::null_mut(), n, t, peer), on).map(|()| SUCCESS)
    }
    fn ncclRecv(r: Mut, n: usize, t: c_int, peer: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Recv, std::ptr::null(), r, n, t, peer), on).map(|()| SUCCESS)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let text = match code {
        SUCCESS => c"no error",
        UNHANDLED => c"unhandled cuda error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: Handle) -> *const c_char {
    c"".as_ptr()
}
