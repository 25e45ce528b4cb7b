//! The exported entry points of `libnccl`, between the threads of one process, and by [`crate::remote`] between processes.
//!
//! A call goes to its stream, and is done there when all ranks have come. As in the real one nothing is compared but what would
//! end in chaos here: ranks that disagree are reported, and wait until they are aborted.
//!
//! Calls on a non-blocking communicator go on in the background, as late as the real one may:
//!
//! * A launch reaches its stream at the second look at the communicator's state, not before.
//! * A split returns success, and its thread stores the part's handle a while later.
//! * Every other call on a communicator that is in progress is refused.
//!
//! Calls on a blocking one wait: for all ranks at its creation and at a split, and for the peers at
//! the first call of each kind, where the real one sets up connections.
//!
//! Destroying a communicator of either kind waits until all ranks have destroyed or aborted theirs.

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

/// The ranks of a communicator, as they meet.
pub struct World {
    number: u64,
    size: usize,
    state: Mutex<State>,
    news: Condvar,
    /// The way to it, if it is in another process.
    line: Option<Arc<Line>>,
    /// Whether ranks of other processes have come to it.
    far: AtomicBool,
}

#[derive(Default)]
struct State {
    joined: usize,
    /// The device of each rank.
    devices: Vec<Option<c_int>>,
    /// Which kinds of calls a rank has made, with its peer where it has one.
    knocks: HashSet<(usize, Kind, c_int)>,
    ended: usize,
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
    world: Arc<World>,
    rank: usize,
    blocking: bool,
    rounds: AtomicU64,
    aborted: Arc<AtomicBool>,
    fault: Arc<AtomicI32>,
    /// What was handed to streams and is not done.
    under_way: Arc<AtomicUsize>,
    /// Its calls in groups that have not ended.
    grouped: AtomicUsize,
    /// What a call goes on with in the background.
    background: Mutex<Background>,
}

/// What is still to be done of a call that has returned.
enum Background {
    Nothing,
    Joining,
    Split,
    /// A launch, and how often the state was looked at since the call.
    Launch(u32, Vec<Launch>),
}

/// A rank's calls, on their way to a stream.
struct Launch {
    ops: Vec<Op>,
    go: Box<dyn FnOnce() -> Code + Send>,
}

fn worlds() -> &'static Mutex<HashMap<Vec<u8>, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<Vec<u8>, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Mutex::default)
}

/// A rank is there, with a device.
pub fn join(world: &World, rank: usize, device: c_int) {
    let mut state = lock(&world.state);
    state.joined += 1;
    state.devices[rank] = Some(device);
    world.news.notify_all();
}

/// One rank's wish for a division, which is its `count`-th: waits for the part that it gets.
pub fn wish(
    world: &World,
    rank: usize,
    (count, color, key): (i64, c_int, c_int),
    aborted: &AtomicBool,
) -> Option<(Arc<World>, usize)> {
    world.divide(rank, color, key);
    world.wait(aborted, |state| (state.divisions > count as u64).then(|| state.parts[rank].clone())).flatten()
}

impl World {
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, None)
    }

    fn with(size: usize, line: Option<Arc<Line>>) -> Arc<Self> {
        // Above what ids count to.
        static NEXT: AtomicU64 = AtomicU64::new(1 << 32);
        let state = State { wishes: vec![None; size], devices: vec![None; size], ..State::default() };
        let (number, state) = (NEXT.fetch_add(1, SeqCst), Mutex::new(state));
        Arc::new(Self { number, size, state, news: Condvar::new(), line, far: AtomicBool::new(false) })
    }

    /// Ranks of other processes have come.
    pub fn is_met_from_afar(&self) {
        self.far.store(true, SeqCst);
    }

    /// Two ranks on one device, which only later versions allow, where they are told to.
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

    /// Whether all ranks have come: with success, or what the real one says to all of them.
    fn met(&self) -> Option<Code> {
        let outcome = match &self.line {
            Some(line) => line.joined()?,
            None if lock(&self.state).joined < self.size => return None,
            None => self.duplicate().is_none(),
        };
        if outcome {
            return Some(SUCCESS);
        }
        let words = self.duplicate().map_or("Duplicate GPU detected".to_string(), |(a, b, device)| {
            format!("Duplicate GPU detected : rank {b} and rank {a} both on CUDA device {device}")
        });
        say(words);
        Some(INVALID_USAGE)
    }

    /// Whether all those whom a rank's calls need have once made the like: connections are set up
    /// then.
    fn is_connected(&self, rank: usize, ops: &[Op]) -> bool {
        if self.line.is_some() || self.far.load(SeqCst) {
            return true;
        }
        let state = lock(&self.state);
        let has = |rank, kind, peer| state.knocks.contains(&(rank, kind, peer));
        ops.iter().all(|op| match op.kind {
            Kind::Send => has(op.root as usize, Kind::Recv, rank as c_int),
            Kind::Recv => has(op.root as usize, Kind::Send, rank as c_int),
            kind => (0..self.size).all(|rank| has(rank, kind, -1)),
        })
    }

    /// A rank wants to be connected for its calls.
    fn knock(&self, rank: usize, ops: &[Op]) {
        let mut state = lock(&self.state);
        for op in ops {
            let peer = if matches!(op.kind, Kind::Send | Kind::Recv) { op.root } else { -1 };
            state.knocks.insert((rank, op.kind, peer));
        }
        drop(state);
        self.news.notify_all();
    }

    /// A rank has ended its communicator: the last frees what they share.
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
            part.far.store(self.far.load(SeqCst), SeqCst);
            let mut new = lock(&part.state);
            new.joined = members.len();
            new.devices = members.iter().map(|&rank| state.devices[rank]).collect();
            drop(new);
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

/// A value as it is after it was stored.
fn rounded(value: f64, dtype: c_int) -> f64 {
    match dtype {
        6 => f64::from(f16::from_f32(value as f32).to_f32()),
        7 => f64::from(value as f32),
        8 => value,
        _ => f64::from(bf16::from_f32(value as f32).to_f32()),
    }
}

/// Up to so many bytes an all-reduce goes up and down a tree.
const TREE: usize = 256;

/// Sums term by term, each rounded to the element, in an order that depends on what is done and of
/// how much: along a tree, or round a ring which a part enters behind its own rank.
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
            under_way: Arc::default(),
            grouped: AtomicUsize::new(0),
            background: Mutex::new(background),
        })
    }

    /// Looks at what goes on in the background, and is the time at which that goes on.
    fn look(&self) -> Code {
        let fault = self.fault.load(SeqCst);
        if fault != SUCCESS {
            return fault;
        }
        let mut background = lock(&self.background);
        let code = match &mut *background {
            Background::Nothing => SUCCESS,
            Background::Joining => self.world.met().unwrap_or(IN_PROGRESS),
            Background::Split => IN_PROGRESS,
            Background::Launch(looks, launches) => {
                *looks += 1;
                let connected = launches.iter().all(|launch| self.world.is_connected(self.rank, &launch.ops));
                if *looks < 2 || !connected {
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

    /// Launches, or leaves that to the background.
    fn start(&self, launches: Vec<Launch>) -> Code {
        launches.iter().for_each(|launch| self.world.knock(self.rank, &launch.ops));
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

/// What the real one would have logged, and tells when it is asked for the last error.
fn say(words: String) {
    SAID.set(CString::new(words).unwrap_or_default());
}

/// The version: `CUDA_STANDIN_NCCL`, such as 22809, the default.
fn version() -> c_int {
    std::env::var("CUDA_STANDIN_NCCL").ok().and_then(|v| v.parse().ok()).unwrap_or(22_809)
}

/// The communicators by their handles, none of which is given out twice, and the last that was.
type Comms = (Handle, Option<HashMap<Handle, Arc<Comm>>>);

static COMMS: Mutex<Comms> = Mutex::new((0, None));

/// The communicator of a handle.
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
        const WORDS: &str = "Attempt to use communicator before the previous operation returned ncclSuccess";
        error::report(format!("NCCL: {WORDS}"));
        say(WORDS.into());
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

/// `ncclConfig_t` as of 2.18, with which later ones begin.
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

/// How many groups are open, and the calls in them: communicator, operation and stream.
type Grouped = (usize, Vec<(Handle, Op, Handle)>);

/// Where a rank's last kernel was enqueued: device, stream and its operation there.
type Last = Arc<Mutex<Option<(usize, usize, u64)>>>;

thread_local! {
    static GROUP: RefCell<Grouped> = const { RefCell::new((0, Vec::new())) };
    /// Of this thread, which is a rank.
    static LAST: Last = Last::default();
    static SAID: RefCell<CString> = RefCell::default();
}

/// Kernels of two communicators wait for peers, and may not both fit on a device: all ranks have to
/// start them in one order, which only the order of a rank's streams can give.
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

/// A rank's calls on one stream, to be launched.
fn launch(comm: &Comm, ops: Vec<Op>, on: driver::Handle) -> Result<Launch, Code> {
    let (world, rank) = (Arc::clone(&comm.world), comm.rank);
    let ranks = world.size;
    for op in &ops {
        let peers = matches!(op.kind, Kind::Broadcast | Kind::Reduce | Kind::Send | Kind::Recv);
        if width(op.dtype).is_none() || (peers && !(0..ranks as c_int).contains(&op.root)) {
            return Err(INVALID_ARGUMENT);
        }
    }
    // Collectives are not captured here, as a real NCCL's may be.
    let stream = stream_now(on).map_err(|_| UNHANDLED)?;
    let (judged, last) = (ops.clone(), LAST.with(Arc::clone));
    // Messages take few blocks, and go by an order of their own.
    let messages = ops.iter().all(|op| matches!(op.kind, Kind::Send | Kind::Recv));
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
    // Each collective is a meeting of its own, in the order of the calls.
    let collectives = ops.iter().filter(|op| !matches!(op.kind, Kind::Send | Kind::Recv)).count() as u64;
    let first = comm.rounds.fetch_add(collectives, SeqCst);
    let (aborted, fault) = (Arc::clone(&comm.aborted), Arc::clone(&comm.fault));
    let (under_way, done) = (Arc::clone(&comm.under_way), Arc::clone(&comm.under_way));
    let calls = ops.clone();
    let work = move || {
        match &world.line {
            Some(line) => {
                if line.run(rank, world.size, &calls).is_err() && !aborted.load(SeqCst) {
                    // The other end is gone. As with the real one what was asked for is never done.
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
        under_way.fetch_add(1, SeqCst);
        match illegal(stream.device, stream.push(ranks > 1, judge, work)) {
            Ok(_) => SUCCESS,
            Err(_) => {
                under_way.fetch_sub(1, SeqCst);
                UNHANDLED
            }
        }
    };
    Ok(Launch { ops, go: Box::new(go) })
}

/// Launches calls: a communicator's own together.
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

/// Divides a communicator in the background, and stores the handle of this rank's part, or null.
fn split(parent: &Arc<Comm>, (color, key): (c_int, c_int), blocking: bool, out: usize) -> JoinHandle<Code> {
    let (parent, world) = (Arc::clone(parent), Arc::clone(&parent.world));
    let number = lock(&world.state).divisions;
    if world.line.is_none() {
        world.divide(parent.rank, color, key);
    }
    std::thread::spawn(move || {
        let part = match &world.line {
            None => {
                let rank = parent.rank;
                let part = |state: &mut State| (state.divisions > number).then(|| state.parts[rank].clone());
                world.wait(&parent.aborted, part)
            }
            Some(line) => line
                .split(color, key)
                .ok()
                .map(|part| part.map(|(line, size, place)| (World::with(size, Some(line)), place))),
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

/// How long a split goes on in the background after all ranks have called it.
const DELAY: Duration = Duration::from_micros(300);

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
        // Bits that are NaN as numbers: they have to arrive as they are.
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
            World::with(size, Some(Line::join(process, number, (rank, device), size).map_err(|_| UNHANDLED)?))
        };
        let comm = Comm::new(world, rank, blocking, Background::Joining);
        unsafe { *out = hand_out(Arc::clone(&comm)) };
        while blocking && comm.look() == IN_PROGRESS {
            if comm.is_aborted() { return Err(INTERNAL); }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(comm.look())
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
        // Success also while it goes on: only the state says so.
        if parent.blocking { job.join().map_err(|_| INTERNAL) } else { Ok(SUCCESS) }
    }
    fn ncclCommDestroy(handle: Handle) {
        // Where it is in progress the real one leaves in the middle of a group of its own.
        let comm = ready(handle).inspect_err(|_| GROUP.with_borrow_mut(|group| group.0 += 1))?;
        if comm.under_way.load(SeqCst) > 0 && comm.fault.load(SeqCst) == SUCCESS {
            error::report("NCCL: a communicator is destroyed while its work is under way".into());
        }
        take_back(handle);
        // All ranks of a node have to call it.
        match &comm.world.line {
            Some(line) => line.end(),
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
        if let Some(line) = &comm.world.line { line.cut(); }
        comm.world.news.notify_all();
        take_back(handle);
        Ok(SUCCESS)
    }
    fn ncclCommGetAsyncError(handle: Handle, out: *mut c_int) {
        let code = comm(handle)?.look();
        unsafe { *out = code };
        Ok(SUCCESS)
    }
    // A fault for tests: what `ncclCommGetAsyncError` says from now on.
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
    // It lives until the next that is said on this thread.
    SAID.with_borrow(|said| said.as_ptr())
}
