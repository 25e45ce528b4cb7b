//! The exported entry points of `libnccl`, between the threads of one process, and through
//! [`crate::remote`] between processes.
//!
//! A call is enqueued on its stream, and runs there once all ranks have reached it. As in the real
//! library, calls are not compared, except that disagreeing ranks are reported here; they wait
//! until they are aborted.
//!
//! Calls on a non-blocking communicator complete in the background, as late as in the real library:
//!
//! * A launch reaches its stream at the second query of the communicator's state, not before.
//! * A split returns success, and its thread stores the new handle a while later.
//! * Every other call on a communicator that is in progress is rejected.
//!
//! Calls on a blocking communicator wait: for all ranks at its creation and at a split, and for the
//! peers at the first call of each kind, when the real library sets up connections.
//!
//! Destroying a communicator of either kind waits until all ranks have destroyed or aborted theirs.

use crate::{
    driver::{self, illegal, stream_now},
    error::{self, Code},
    memory::{self, Accessor},
    remote::{self, Connection},
    stream::lock,
};
use half::{bf16, f16};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    ffi::{CString, c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

const SUCCESS: Code = 0;
const UNHANDLED: Code = 1;
const INTERNAL: Code = 3;
const INVALID_ARGUMENT: Code = 4;
const INVALID_USAGE: Code = 5;
const REMOTE: Code = 6;
const IN_PROGRESS: Code = 7;
const NO_COLOR: c_int = -1;

type Handle = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// The ranks of a communicator and their shared state.
pub struct World {
    number: u64,
    size: usize,
    state: Mutex<State>,
    news: Condvar,
    /// The connection to it, if it is in another process.
    connection: Option<Arc<Connection>>,
    /// Whether ranks of other processes have joined it.
    has_remote_ranks: AtomicBool,
}

#[derive(Default)]
struct State {
    joined: usize,
    /// The device of each rank.
    devices: Vec<Option<c_int>>,
    /// The kinds of calls that a rank has made, with its peer if it has one.
    announced: HashSet<(usize, Kind, c_int)>,
    ended: usize,
    rounds: HashMap<u64, Round>,
    /// By sender and receiver.
    mail: HashMap<(usize, usize), Mail>,
    requests: Vec<Option<(c_int, c_int)>>,
    /// The number of finished splits, and the result of the last: each rank's new world and its
    /// rank there.
    splits: u64,
    parts: Vec<Option<(Arc<World>, usize)>>,
}

/// Messages in flight, and the numbers of sent and received ones.
#[derive(Default)]
struct Mail {
    messages: VecDeque<Vec<u8>>,
    sent: u64,
    taken: u64,
}

/// The calls of the ranks in one collective, and the number of ranks that have left it.
struct Round {
    ops: Vec<Option<Op>>,
    done: bool,
    left: usize,
}

struct Comm {
    world: Arc<World>,
    rank: usize,
    blocking: bool,
    rounds: AtomicU64,
    aborted: Arc<AtomicBool>,
    fault: Arc<AtomicI32>,
    /// The number of calls on streams that are not done.
    in_flight: Arc<AtomicUsize>,
    /// The number of its calls in open groups.
    grouped: AtomicUsize,
    /// The rest of a call, which runs in the background.
    background: Mutex<Background>,
}

/// What is still to be done of a call that has returned.
enum Background {
    Nothing,
    Joining,
    Split,
    /// A launch, and the number of state queries since the call.
    Launch(u32, Vec<Launch>),
}

/// A rank's calls that are to be launched on a stream.
struct Launch {
    ops: Vec<Op>,
    go: Box<dyn FnOnce() -> Code + Send>,
}

fn worlds() -> &'static Mutex<HashMap<Vec<u8>, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<Vec<u8>, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Mutex::default)
}

/// Adds a rank with its device.
pub fn join(world: &World, rank: usize, device: c_int) {
    let mut state = lock(&world.state);
    state.joined += 1;
    state.devices[rank] = Some(device);
    world.news.notify_all();
}

/// Requests a split, which is the `count`-th of this rank, and waits for the result.
pub fn request(
    world: &World,
    rank: usize,
    (count, color, key): (i64, c_int, c_int),
    aborted: &AtomicBool,
) -> Option<(Arc<World>, usize)> {
    world.request_split(rank, color, key);
    world.wait(aborted, |state| (state.splits > count as u64).then(|| state.parts[rank].clone())).flatten()
}

impl World {
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, None)
    }

    fn with(size: usize, connection: Option<Arc<Connection>>) -> Arc<Self> {
        // Above the numbers of ids.
        static NEXT: AtomicU64 = AtomicU64::new(1 << 32);
        let state = State { requests: vec![None; size], devices: vec![None; size], ..State::default() };
        let (number, state) = (NEXT.fetch_add(1, SeqCst), Mutex::new(state));
        Arc::new(Self {
            number,
            size,
            state,
            news: Condvar::new(),
            connection,
            has_remote_ranks: AtomicBool::new(false),
        })
    }

    /// Records that ranks of other processes have joined.
    pub fn set_remote(&self) {
        self.has_remote_ranks.store(true, SeqCst);
    }

    /// Returns two ranks on one device. Only later versions allow that, if a variable is set.
    pub fn duplicate(&self) -> Option<(usize, usize, c_int)> {
        if version() >= 23_000 && std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1")
        {
            return None;
        }
        let state = lock(&self.state);
        let pairs = (0..self.size).flat_map(|b| (0..b).map(move |a| (a, b)));
        let same =
            |&(a, b): &(usize, usize)| state.devices[a].is_some() && state.devices[a] == state.devices[b];
        pairs.into_iter().find(same).map(|(a, b)| (a, b, state.devices[a].unwrap_or(-1)))
    }

    /// The common result once all ranks have joined: success, or the error of the real library.
    fn met(&self) -> Option<Code> {
        let outcome = match &self.connection {
            Some(connection) => connection.joined()?,
            None if lock(&self.state).joined < self.size => return None,
            None => self.duplicate().is_none(),
        };
        if outcome {
            return Some(SUCCESS);
        }
        let text = self.duplicate().map_or("Duplicate GPU detected".to_string(), |(a, b, device)| {
            format!("Duplicate GPU detected : rank {b} and rank {a} both on CUDA device {device}")
        });
        say(text);
        Some(INVALID_USAGE)
    }

    /// Whether all peers of a rank's calls have made a matching call before: connections are set up
    /// then.
    fn is_connected(&self, rank: usize, ops: &[Op]) -> bool {
        if self.connection.is_some() || self.has_remote_ranks.load(SeqCst) {
            return true;
        }
        let state = lock(&self.state);
        let has = |rank, kind, peer| state.announced.contains(&(rank, kind, peer));
        ops.iter().all(|op| match op.kind {
            Kind::Send => has(op.root as usize, Kind::Recv, rank as c_int),
            Kind::Recv => has(op.root as usize, Kind::Send, rank as c_int),
            kind => (0..self.size).all(|rank| has(rank, kind, -1)),
        })
    }

    /// Announces a rank's calls, so that its peers can connect.
    fn announce(&self, rank: usize, ops: &[Op]) {
        let mut state = lock(&self.state);
        for op in ops {
            let peer = if matches!(op.kind, Kind::Send | Kind::Recv) { op.root } else { -1 };
            state.announced.insert((rank, op.kind, peer));
        }
        drop(state);
        self.news.notify_all();
    }

    /// Ends a rank's communicator; the last rank frees the shared state.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.ended += 1;
        let is_last = state.ended == self.size;
        if is_last {
            (state.rounds, state.mail) = Default::default();
        }
        drop(state);
        self.news.notify_all();
        if is_last {
            lock(worlds()).retain(|_, world| world.number != self.number);
        }
    }

    /// Waits until all ranks have ended their communicators.
    pub fn wait_until_ended(&self) {
        let never = AtomicBool::new(false);
        self.wait(&never, |state| (state.ended >= self.size).then_some(()));
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

    /// Records one rank's request for a split; the last request performs it.
    fn request_split(&self, rank: usize, color: c_int, key: c_int) {
        let mut state = lock(&self.state);
        state.requests[rank] = Some((color, key));
        let all: Option<Vec<_>> = state.requests.iter().copied().collect();
        let Some(all) = all else { return };
        let mut parts = vec![None; all.len()];
        for color in all.iter().map(|request| request.0).filter(|&color| color != NO_COLOR) {
            if all.iter().zip(&parts).any(|(request, part)| request.0 == color && part.is_some()) {
                continue;
            }
            let mut members: Vec<_> = (0..all.len()).filter(|&rank| all[rank].0 == color).collect();
            members.sort_by_key(|&rank| (all[rank].1, rank));
            let part = Self::new(members.len());
            part.has_remote_ranks.store(self.has_remote_ranks.load(SeqCst), SeqCst);
            let mut new = lock(&part.state);
            new.joined = members.len();
            new.devices = members.iter().map(|&rank| state.devices[rank]).collect();
            drop(new);
            for (place, rank) in members.into_iter().enumerate() {
                parts[rank] = Some((Arc::clone(&part), place));
            }
        }
        state.parts = parts;
        state.splits += 1;
        state.requests.fill(None);
        self.news.notify_all();
    }

    /// Waits until `done` returns a value; `None` if this rank aborts.
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

    /// Runs one collective of this rank. The last rank to arrive performs it, and no rank leaves
    /// before.
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
                if all.iter().all(agree) {
                    // SAFETY: every rank's memory was judged, and is lent until its call is
                    // done, as none is yet.
                    unsafe { perform(&all) };
                    round.done = true;
                } else {
                    error::report(format!("NCCL: the ranks call different things: {all:?}"))
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
            // An aborting rank withdraws its memory, which nobody may use any more.
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

/// A value after it was stored in the element type.
fn rounded(value: f64, dtype: c_int) -> f64 {
    match dtype {
        6 => f64::from(f16::from_f32(value as f32).to_f32()),
        7 => f64::from(value as f32),
        8 => value,
        _ => f64::from(bf16::from_f32(value as f32).to_f32()),
    }
}

/// Up to this many bytes an all-reduce uses a tree.
const TREE: usize = 256;

/// Sums term by term, each rounded to the element type, in an order that depends on the operation
/// and the size: along a tree, or around a ring that each segment enters after its own rank.
unsafe fn sum(ops: &[Op], len: usize) -> Vec<f64> {
    let (first, ranks) = (ops[0], ops.len());
    let tree = first.kind == Kind::AllReduce && len * width(first.dtype).unwrap_or(1) <= TREE;
    let part = len.div_ceil(ranks).max(1);
    let ring = |at: usize, step: usize| match first.kind {
        Kind::Reduce => (first.root as usize + 1 + step) % ranks,
        _ => (at / part + 1 + step) % ranks,
    };
    let order = |at, step| if tree { ranks - 1 - step } else { ring(at, step) };
    let term = |at, step| {
        let op = &ops[order(at, step)];
        // SAFETY: see `load`.
        unsafe { load(op.send, at, op.dtype) }
    };
    let total = |at| (1..ranks).fold(term(at, 0), |sum, step| rounded(sum + term(at, step), first.dtype));
    (0..len).map(total).collect()
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
    fn new(world: Arc<World>, rank: usize, blocking: bool, background: Background) -> Arc<Self> {
        Arc::new(Self {
            world,
            rank,
            blocking,
            rounds: AtomicU64::new(0),
            aborted: Arc::default(),
            fault: Arc::default(),
            in_flight: Arc::default(),
            grouped: AtomicUsize::new(0),
            background: Mutex::new(background),
        })
    }

    /// Queries the communicator's state, which also advances the background work.
    fn poll(&self) -> Code {
        let fault = self.fault.load(SeqCst);
        if fault != SUCCESS {
            return fault;
        }
        let mut background = lock(&self.background);
        let code = match &mut *background {
            Background::Nothing => SUCCESS,
            Background::Joining => self.world.met().unwrap_or(IN_PROGRESS),
            Background::Split => IN_PROGRESS,
            Background::Launch(polls, launches) => {
                *polls += 1;
                let connected = launches.iter().all(|launch| self.world.is_connected(self.rank, &launch.ops));
                if *polls < 2 || !connected {
                    IN_PROGRESS
                } else {
                    let launches = std::mem::take(launches).into_iter();
                    launches.map(|launch| (launch.go)()).find(|&code| code != SUCCESS).unwrap_or(SUCCESS)
                }
            }
        };
        if code != IN_PROGRESS {
            *background = Background::Nothing;
        }
        if code != IN_PROGRESS && code != SUCCESS {
            self.fault.store(code, SeqCst);
        }
        code
    }

    fn is_in_progress(&self) -> bool {
        !matches!(*lock(&self.background), Background::Nothing)
    }

    /// Launches the calls, or leaves them to the background.
    fn start(&self, launches: Vec<Launch>) -> Code {
        launches.iter().for_each(|launch| self.world.announce(self.rank, &launch.ops));
        if !self.blocking {
            *lock(&self.background) = Background::Launch(0, launches);
            return IN_PROGRESS;
        }
        for launch in launches {
            while !self.world.is_connected(self.rank, &launch.ops) {
                if self.is_aborted() {
                    return INTERNAL;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            match (launch.go)() {
                SUCCESS => {}
                code => return code,
            }
        }
        SUCCESS
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(SeqCst)
    }
}

/// Sets the message that the real library would log and return as the last error.
fn say(text: String) {
    SAID.set(CString::new(text).unwrap_or_default());
}

/// The version: `CUDA_STANDIN_NCCL`, such as 22809, the default.
fn version() -> c_int {
    std::env::var("CUDA_STANDIN_NCCL").ok().and_then(|v| v.parse().ok()).unwrap_or(22_809)
}

/// The communicators by handle, and the last handle; handles are not reused.
type Comms = (Handle, Option<HashMap<Handle, Arc<Comm>>>);

static COMMS: Mutex<Comms> = Mutex::new((0, None));

/// Looks up the communicator of a handle.
fn comm(handle: Handle) -> Result<Arc<Comm>, Code> {
    let comms = lock(&COMMS);
    let found = comms.1.as_ref().and_then(|comms| comms.get(&handle)).cloned();
    if found.is_none() && handle != 0 && handle <= comms.0 {
        error::report("NCCL: a communicator is used that was destroyed or aborted".into());
    }
    found.ok_or(INVALID_ARGUMENT)
}

/// The same, for a call that cannot be made while another is in progress.
fn ready(handle: Handle) -> Result<Arc<Comm>, Code> {
    let comm = comm(handle)?;
    if comm.is_in_progress() {
        const TEXT: &str = "Attempt to use communicator before the previous operation returned ncclSuccess";
        error::report(format!("NCCL: {TEXT}"));
        say(TEXT.into());
        return Err(INVALID_ARGUMENT);
    }
    Ok(comm)
}

fn hand_out(comm: Arc<Comm>) -> Handle {
    let mut comms = lock(&COMMS);
    comms.0 += 1;
    let handle = comms.0;
    comms.1.get_or_insert_default().insert(handle, comm);
    handle
}

fn take_back(handle: Handle) {
    if let Some(comm) = lock(&COMMS).1.as_mut().and_then(|comms| comms.remove(&handle)) {
        comm.world.end();
    }
}

/// `ncclConfig_t` as of 2.18, which is the start of later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    pub size: usize,
    pub magic: c_uint,
    pub version: c_uint,
    pub blocking: c_int,
    pub cga_cluster_size: c_int,
    pub min_ctas: c_int,
    pub max_ctas: c_int,
    pub net_name: *const c_char,
    pub split_share: c_int,
}

/// Whether calls on a communicator of this configuration block.
unsafe fn is_blocking(config: *const Config, otherwise: bool) -> Result<bool, Code> {
    if config.is_null() {
        return Ok(otherwise);
    }
    // SAFETY: a configuration of 2.18 or later, if the caller is right.
    let config = unsafe { &*config };
    let wrong = |what: &str| {
        say(format!("ncclConfig_t: {what}"));
        INVALID_ARGUMENT
    };
    if config.magic != 0xcafe_beef {
        return Err(wrong("not initialized by NCCL_CONFIG_INITIALIZER"));
    }
    if config.size < size_of::<Config>() || !(21_800..30_000).contains(&config.version) {
        return Err(wrong("its size or version is not one of 2.18 or later"));
    }
    match config.blocking {
        0 => Ok(false),
        1 => Ok(true),
        c_int::MIN => Ok(otherwise),
        _ => Err(wrong("blocking is neither 0 nor 1")),
    }
}

/// The number of open groups, and the calls in them: communicator, operation and stream.
type Grouped = (usize, Vec<(Handle, Op, Handle)>);

/// The position of a rank's last kernel: device, stream and operation number.
type Last = Arc<Mutex<Option<(usize, usize, u64)>>>;

thread_local! {
    static GROUP: RefCell<Grouped> = const { RefCell::new((0, Vec::new())) };
    /// Of this thread, which is one rank.
    static LAST: Last = Last::default();
    static SAID: RefCell<CString> = RefCell::default();
}

/// Kernels of two communicators wait for peers, and may not both fit on a device. All ranks must
/// start them in one order, which only the order of a rank's streams can ensure.
fn in_order(last: &Last, who: &Accessor) -> Result<(), String> {
    let before = lock(last).replace((who.device, who.stream, who.tick));
    match before {
        Some((device, stream, tick))
            if device == who.device && stream != who.stream && !who.clock.covers(stream, tick) =>
        {
            Err("NCCL: kernels of two communicators of a rank are not ordered by their streams".into())
        }
        _ => Ok(()),
    }
}

/// Prepares the launch of a rank's calls on one stream.
fn launch(comm: &Comm, ops: Vec<Op>, on: driver::Handle) -> Result<Launch, Code> {
    let (world, rank) = (Arc::clone(&comm.world), comm.rank);
    let ranks = world.size;
    for op in &ops {
        let peers = matches!(op.kind, Kind::Broadcast | Kind::Reduce | Kind::Send | Kind::Recv);
        if width(op.dtype).is_none() || (peers && !(0..ranks as c_int).contains(&op.root)) {
            return Err(INVALID_ARGUMENT);
        }
    }
    // This stand-in cannot capture collectives, unlike a real NCCL.
    let stream = stream_now(on).map_err(|_| UNHANDLED)?;
    let (judged, last) = (ops.clone(), LAST.with(Arc::clone));
    // Messages take few blocks, and have an order of their own.
    let messages = ops.iter().all(|op| matches!(op.kind, Kind::Send | Kind::Recv));
    // Ranks of one process access each other's memory directly.
    let near = world.connection.is_none() && !remote::serves();
    let direct = ranks > 1 && near && !driver::is_open(stream.device);
    let judge = move |who: &Accessor| {
        if direct {
            return Err(format!(
                "NCCL: the memory of device {} is not open to the other ranks' devices",
                who.device
            ));
        }
        if ranks > 1 && !messages {
            in_order(&last, who)?;
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
    // Each collective is a separate round, in the order of the calls.
    let collectives = ops.iter().filter(|op| !matches!(op.kind, Kind::Send | Kind::Recv)).count() as u64;
    let first = comm.rounds.fetch_add(collectives, SeqCst);
    let (aborted, fault) = (Arc::clone(&comm.aborted), Arc::clone(&comm.fault));
    let (in_flight, done) = (Arc::clone(&comm.in_flight), Arc::clone(&comm.in_flight));
    let calls = ops.clone();
    let work = move || {
        match &world.connection {
            Some(connection) => {
                if connection.run(rank, world.size, &calls).is_err() && !aborted.load(SeqCst) {
                    // The other process is gone. As in the real library, the calls never complete.
                    fault.store(REMOTE, SeqCst);
                    let _: Option<()> = world.wait(&aborted, |_| None);
                }
            }
            None => {
                do_ops(&world, rank, first, &calls, &aborted);
            }
        }
        done.fetch_sub(1, SeqCst);
    };
    let go = move || {
        in_flight.fetch_add(1, SeqCst);
        match illegal(stream.device, stream.push(ranks > 1, judge, work)) {
            Ok(_) => SUCCESS,
            Err(_) => {
                in_flight.fetch_sub(1, SeqCst);
                UNHANDLED
            }
        }
    };
    Ok(Launch { ops, go: Box::new(go) })
}

/// Launches calls, with those of one communicator together.
fn launch_all(calls: Vec<(Handle, Op, Handle)>) -> Result<Code, Code> {
    // By communicator and stream.
    type Batch = (Handle, Vec<(Handle, Vec<Op>)>);
    let mut batches: Vec<Batch> = Vec::new();
    for (handle, op, on) in calls {
        let at = batches.iter().position(|batch| batch.0 == handle).unwrap_or_else(|| {
            batches.push((handle, Vec::new()));
            batches.len() - 1
        });
        let streams = &mut batches[at].1;
        match streams.iter_mut().find(|(stream, _)| *stream == on) {
            Some((_, ops)) => ops.push(op),
            None => streams.push((on, vec![op])),
        }
    }
    let mut outcome = SUCCESS;
    for (handle, streams) in batches {
        let comm = ready(handle)?;
        comm.grouped.store(0, SeqCst);
        let launches = streams.into_iter().map(|(on, ops)| launch(&comm, ops, on));
        match comm.start(launches.collect::<Result<_, _>>()?) {
            SUCCESS => {}
            IN_PROGRESS => outcome = IN_PROGRESS,
            code => return Err(code),
        }
    }
    Ok(outcome)
}

/// Splits a communicator in the background, and stores the handle of this rank's new communicator,
/// or null.
fn split(parent: &Arc<Comm>, (color, key): (c_int, c_int), blocking: bool, out: usize) -> JoinHandle<Code> {
    let (parent, world) = (Arc::clone(parent), Arc::clone(&parent.world));
    let number = lock(&world.state).splits;
    if world.connection.is_none() {
        world.request_split(parent.rank, color, key);
    }
    std::thread::spawn(move || {
        let part = match &world.connection {
            None => {
                let rank = parent.rank;
                let part = |state: &mut State| (state.splits > number).then(|| state.parts[rank].clone());
                world.wait(&parent.aborted, part)
            }
            Some(connection) => connection.split(color, key).ok().map(|part| {
                part.map(|(connection, size, place)| (World::with(size, Some(connection)), place))
            }),
        };
        let Some(part) = part else { return INTERNAL };
        if !parent.blocking {
            std::thread::sleep(DELAY);
        }
        if parent.is_aborted() {
            return INTERNAL;
        }
        let part = part.map_or(0, |(world, rank)| {
            while world.met().is_none() && !parent.is_aborted() {
                std::thread::sleep(Duration::from_micros(50));
            }
            hand_out(Comm::new(world, rank, blocking, Background::Nothing))
        });
        // SAFETY: a place that the caller keeps until the parent is not in progress any more, or is
        // aborted.
        unsafe { (*(out as *const AtomicUsize)).store(part, SeqCst) };
        *lock(&parent.background) = Background::Nothing;
        SUCCESS
    })
}

/// The time that a split takes in the background after all ranks have called it.
const DELAY: Duration = Duration::from_micros(300);

/// Runs a rank's calls in its own process. Returns the number of the next collective.
pub fn do_ops(world: &World, rank: usize, first: u64, ops: &[Op], aborted: &AtomicBool) -> u64 {
    let messages_of = |kind| ops.iter().filter(move |op| op.kind == kind);
    let mut sent = Vec::new();
    for op in messages_of(Kind::Send) {
        // SAFETY: the memory was judged, or is the caller's own.
        let data = unsafe { bytes(op.send, op.len * width(op.dtype).unwrap_or(0)) };
        let (way, mut state) = ((rank, op.root as usize), lock(&world.state));
        let mail = state.mail.entry(way).or_default();
        mail.messages.push_back(data);
        mail.sent += 1;
        sent.push((way, mail.sent));
        world.news.notify_all();
    }
    for op in messages_of(Kind::Recv) {
        let size = op.len * width(op.dtype).unwrap_or(0);
        let message = world.wait(aborted, |state| {
            let mail = state.mail.get_mut(&(op.root as usize, rank))?;
            let message = mail.messages.pop_front()?;
            mail.taken += 1;
            Some(message)
        });
        world.news.notify_all();
        match message {
            // SAFETY: as above.
            Some(data) if data.len() == size => unsafe { write(&data, op.recv) },
            Some(data) => error::report(format!("NCCL: {} bytes were sent, {size} are expected", data.len())),
            None => return first,
        }
    }
    // A send ends when it was received, as in the real library for messages larger than its
    // buffers.
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

fn enqueue(handle: Handle, op: Op, on: driver::Handle) -> Result<Code, Code> {
    let comm = ready(handle)?;
    let grouped = GROUP.with_borrow_mut(|(depth, ops)| {
        if *depth > 0 {
            comm.grouped.fetch_add(1, SeqCst);
            ops.push((handle, op, on));
        }
        *depth > 0
    });
    if grouped { Ok(SUCCESS) } else { launch_all(vec![(handle, op, on)]) }
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
    fn ncclGetVersion(out: *mut c_int) { unsafe { *out = version() }; Ok(SUCCESS) }
    fn ncclGetUniqueId(id: *mut UniqueId) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Bits that are NaN as numbers: they must arrive unchanged.
        let mut bytes = [0xff; 128];
        bytes[..8].copy_from_slice(&NEXT.fetch_add(1, SeqCst).to_le_bytes());
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        remote::listen();
        unsafe { *id = UniqueId(bytes) };
        Ok(SUCCESS)
    }
    fn ncclCommInitRankConfig(out: *mut Handle, size: c_int, id: UniqueId, rank: c_int, config: *const Config) {
        if out.is_null() || size < 1 || !(0..size).contains(&rank) { return Err(INVALID_ARGUMENT); }
        let blocking = unsafe { is_blocking(config, true)? };
        let mut context = 0;
        if unsafe { driver::cuCtxGetCurrent(&mut context) } != 0 || context == 0 { return Err(UNHANDLED); }
        let device = context as c_int - 1;
        let number = u64::from_le_bytes(std::array::from_fn(|at| id.0[at]));
        let process = u32::from_le_bytes(std::array::from_fn(|at| id.0[8 + at]));
        let (rank, size) = (rank as usize, size as usize);
        let world = if process == std::process::id() {
            let known = Arc::clone(lock(worlds()).entry(id.0.to_vec()).or_insert_with(|| {
                remote::world(number, size)
            }));
            if known.size != size { return Err(INVALID_ARGUMENT); }
            join(&known, rank, device);
            known
        } else {
            World::with(size, Some(Connection::join(process, number, (rank, device), size).map_err(|_| UNHANDLED)?))
        };
        let comm = Comm::new(world, rank, blocking, Background::Joining);
        unsafe { *out = hand_out(Arc::clone(&comm)) };
        while blocking && comm.poll() == IN_PROGRESS {
            if comm.is_aborted() { return Err(INTERNAL); }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(comm.poll())
    }
    fn ncclCommSplit(handle: Handle, color: c_int, key: c_int, out: *mut Handle, config: *const Config) {
        let parent = ready(handle)?;
        if out.is_null() || color < NO_COLOR { return Err(INVALID_ARGUMENT); }
        let blocking = unsafe { is_blocking(config, parent.blocking)? };
        if !parent.blocking {
            *lock(&parent.background) = Background::Split;
        }
        unsafe { *out = 0 };
        let job = split(&parent, (color, key), blocking, out as usize);
        // Also returns success while the split is in progress: only the state shows that.
        if parent.blocking { job.join().map_err(|_| INTERNAL) } else { Ok(SUCCESS) }
    }
    fn ncclCommDestroy(handle: Handle) {
        // If the communicator is in progress, the real library returns without closing its own
        // group.
        let comm = ready(handle).inspect_err(|_| GROUP.with_borrow_mut(|group| group.0 += 1))?;
        if comm.in_flight.load(SeqCst) > 0 && comm.fault.load(SeqCst) == SUCCESS {
            error::report("NCCL: a communicator is destroyed while its work is in flight".into());
        }
        take_back(handle);
        // All ranks of a node have to call it.
        match &comm.world.connection {
            Some(connection) => connection.end(),
            None => comm.world.wait_until_ended(),
        }
        Ok(SUCCESS)
    }
    fn ncclCommAbort(handle: Handle) {
        let comm = comm(handle)?;
        if comm.grouped.load(SeqCst) > 0 {
            error::report("NCCL: a communicator is aborted in the middle of a group with calls on it".into());
        }
        comm.aborted.store(true, SeqCst);
        if let Some(connection) = &comm.world.connection { connection.shut_down(); }
        comm.world.news.notify_all();
        take_back(handle);
        Ok(SUCCESS)
    }
    fn ncclCommGetAsyncError(handle: Handle, out: *mut c_int) {
        let code = comm(handle)?.poll();
        unsafe { *out = code };
        Ok(SUCCESS)
    }
    // Injects a fault for tests, which `ncclCommGetAsyncError` returns from now on.
    fn cuda_standin_nccl_fault(handle: Handle, code: c_int) { comm(handle)?.fault.store(code, SeqCst); Ok(SUCCESS) }
    fn ncclGroupStart() { GROUP.with_borrow_mut(|group| group.0 += 1); Ok(SUCCESS) }
    fn ncclGroupEnd() {
        let calls = GROUP.with_borrow_mut(|(depth, calls)| {
            *depth = depth.checked_sub(1).ok_or(INVALID_USAGE)?;
            Ok::<_, Code>(if *depth == 0 { std::mem::take(calls) } else { Vec::new() })
        })?;
        launch_all(calls)
    }
    fn ncclAllReduce(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::AllReduce, s, r, n, t, 0), on)
    }
    fn ncclAllGather(s: Const, r: Mut, n: usize, t: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::AllGather, s, r, n, t, 0), on)
    }
    fn ncclReduceScatter(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::ReduceScatter, s, r, n, t, 0), on)
    }
    fn ncclReduce(s: Const, r: Mut, n: usize, t: c_int, reduce: c_int, root: c_int, c: Handle, on: Handle) {
        if reduce != 0 { return Err(INVALID_ARGUMENT); }
        enqueue(c, op(Kind::Reduce, s, r, n, t, root), on)
    }
    fn ncclBroadcast(s: Const, r: Mut, n: usize, t: c_int, root: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Broadcast, s, r, n, t, root), on)
    }
    fn ncclSend(s: Const, n: usize, t: c_int, peer: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Send, s, std::ptr::null_mut(), n, t, peer), on)
    }
    fn ncclRecv(r: Mut, n: usize, t: c_int, peer: c_int, c: Handle, on: Handle) {
        enqueue(c, op(Kind::Recv, std::ptr::null(), r, n, t, peer), on)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let text = match code {
        SUCCESS => c"no error",
        UNHANDLED => c"unhandled cuda error",
        INTERNAL => c"internal error - please report this issue to the NCCL developers",
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
    // The text lives until the next error on this thread.
    SAID.with_borrow(|said| said.as_ptr())
}
