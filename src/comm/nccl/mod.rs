//! Ranks that each have a GPU, over NCCL. Feature `nccl`.
//!
//! Beside every NCCL communicator stands one of the host, its *side*: thread ranks' or processes'. On it the ranks exchange
//! NCCL's unique id, compare their calls before data move, and hear of lost ranks. NCCL itself does none of this: ranks that
//! disagree hang there, or get each other's bytes for their own.
//!
//! * A call is compared on the side if its kind is new to the group, and at every `check_every`-th call together with a hash of
//!   the calls in between. Ranks of one process compare every call.
//! * Data move on a stream of the communicator's own, which waits for what was computed and which what is computed later waits
//!   for: the thread waits for nobody but in a comparison.
//! * Ranks note on the side which collective they have come to, so that one which leaves before a collective that the others
//!   are inside of is known to be needed, and one that does not come can be named.
//! * While a rank waits for its device, it looks around: where a rank is lost, NCCL reports an
//!   error, or a collective has been at work for longer than the deadline, the communicator is
//!   aborted, and the error is that of the waiting call and of every later one. For a rank that is
//!   inside of a call of NCCL's or the driver's a thread of the process does so (`watch.rs`).
//! * A rank's collectives of all communicators run one after another, in the order of its calls:
//!   where kernels of two start in another order on another rank, and do not fit on a device
//!   together, each waits for what the other keeps from starting. Messages, which only two ranks
//!   make, wait for what their own communicator does.

mod api;
mod cuda;
mod device;
mod meeting;
mod raw;
mod watch;

pub use device::{Enter, NcclDevice};

use super::{
    Call, Collective, Communicator, ExternalStep, Group, InFlight, Incoming, Outgoing, ReduceOp, Shards,
    call::hash, each_pair,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, DType, Element, cuda::Version, each_dtype},
    error::{Error, LostReason, Result},
    kernels::{MatMut, MatRef},
    shard::Partition,
    trace,
};
use api::Api;
use half::{bf16, f16};
use meeting::Meeting;
pub(super) use raw::settle;
use raw::{Raw, Seat};
use std::{
    any::Any,
    cell::{Cell, OnceCell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    ffi::c_void,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};
use watch::Watch;

/// The NCCL that is used, loaded if it was not. The other libraries are
/// [`crate::device::cuda::versions`].
///
/// # Errors
/// When there is none of version 2.18 or later.
pub fn version() -> Result<Version> {
    Ok(Api::get()?.describe())
}

/// How sums are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By NCCL: the fastest, in an order and rounding of its own. Also from run to run on one machine the bits are usually, but
    /// not by promise, the same.
    #[default]
    Any,
    /// In rank order, in the accumulator, rounded once: the bits of thread ranks. Every rank gets all ranks' terms of its part,
    /// adds them and hands the sums round: an all-reduce moves the bytes of a reduce-scatter and an all-gather.
    Ranks,
}

/// How a group uses NCCL.
#[derive(Clone, Debug)]
pub struct Options {
    /// How sums are made.
    pub order: Order,
    /// After how many calls the ranks compare what they called. A kind of call that is new is compared in any case.
    pub check_every: usize,
    /// How long a collective may be at work, and how long a rank waits for the others to create a communicator.
    pub deadline: Duration,
    /// Whether NCCL's calls wait inside of NCCL for what they need of other ranks: connections, at
    /// the first call of a kind or of a size for which NCCL takes another algorithm.
    ///
    /// If so a call costs microseconds. Otherwise NCCL makes a thread for every call, and the rank
    /// asks until it is done, some tens of microseconds; in return the rank looks around by itself
    /// all the time. Either way no lost rank is waited for. Where calls wait inside of NCCL, an abort
    /// on another thread ends them, as in PyTorch; NCCL's guide advises against that.
    pub blocking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { order: Order::Any, check_every: 64, deadline: Duration::from_secs(120), blocking: true }
    }
}

impl Group<Cpu> {
    /// This group for tensors on each rank's `device`, over NCCL. This group goes on beside it: the ranks compare their calls
    /// on it. Every rank calls it.
    ///
    /// Where a collective is aborted, whatever waits for `device` fails as long as the group is
    /// there: tensors may hold what was not done. Where the group is dropped before any call has
    /// returned that error, it goes on failing: go on with a new device.
    ///
    /// # Errors
    /// When there is no NCCL of version 2.18 or later (`SHARDWISE_NCCL` may name its file), NCCL refuses, or a rank calls
    /// something else, or is lost.
    #[track_caller]
    pub fn over_nccl<B: NcclDevice>(&self, device: &B, options: Options) -> Result<Group<B>> {
        let call = self.split_call();
        let ticket = trace::enter(call.operation());
        let nccl = Nccl::join(self.communicator(), &call, device, options);
        trace::leave(ticket, nccl.as_ref().err());
        Ok(self.carried(Rc::new(nccl?), device))
    }
}

/// One rank's end of a group over NCCL.
pub struct Nccl<B: NcclDevice> {
    state: Rc<State<B>>,
    /// What devices call while this rank waits for them, as long as it is held here.
    look: Rc<dyn Fn() -> Result<()>>,
    side: Rc<dyn Communicator<Cpu>>,
    device: B,
    /// The kinds of calls that all ranks have made.
    known: RefCell<HashSet<u64>>,
    unchecked: Cell<usize>,
    history: Cell<u64>,
    /// The group's number on the side, and how many collectives came before.
    work: u64,
    steps: Cell<u64>,
    /// How many messages came before, by sender and receiver.
    messages: RefCell<HashMap<(usize, usize), u64>>,
    options: Options,
}

/// A collective of some communicator of a rank, and the stream that it runs on.
type Last = Option<(*mut c_void, Rc<dyn Any>)>;

thread_local! {
    /// This rank's last collective. It is kept when it is finished too: the next waits for it in
    /// any case.
    static LAST: RefCell<Last> = const { RefCell::new(None) };
}

/// What a rank looks at while it waits.
struct State<B: NcclDevice> {
    raw: Raw,
    watch: Arc<Watch>,
    side: Rc<dyn Communicator<Cpu>>,
    /// The device's handle on which collectives run.
    lane: B,
    deadline: Duration,
    failed: RefCell<Option<Error>>,
    /// Whether collectives were aborted, so that what the device holds may be wrong.
    spoiled: Cell<bool>,
    under_way: RefCell<VecDeque<Rc<UnderWay<B>>>>,
}

/// A collective that the device has not finished.
struct UnderWay<B: NcclDevice> {
    at: Meeting,
    /// Reached when it can be at work, if what the lane did before is finished.
    begin: B::Mark,
    /// Not there before all of it was handed over.
    end: OnceCell<B::Mark>,
    /// When it was first seen at work.
    since: Cell<Option<Instant>>,
}

impl<B: NcclDevice> UnderWay<B> {
    /// Lets what is asked of a handle later wait for it.
    fn hold(&self, device: &B) -> Result<()> {
        self.end.get().map_or(Ok(()), |end| device.after(end))
    }
}

impl<B: NcclDevice> State<B> {
    /// Whether the group can be used.
    fn is_well(&self) -> Result<()> {
        let first = self.failed.borrow().clone();
        first.map_or_else(|| self.look(), Err)
    }

    /// Whether what is under way can still be finished. If not, the communicator is aborted, and the first reason that there
    /// was is returned from then on.
    fn look(&self) -> Result<()> {
        if let (true, Some(error)) = (self.spoiled.get(), &*self.failed.borrow()) {
            return Err(error.clone());
        }
        if self.failed.borrow().is_some() && self.under_way.borrow().is_empty() {
            return Ok(());
        }
        self.seek().map_err(|error| self.abort(error))
    }

    /// Looks at what is under way. A failure is noted with the collective whose it is: whatever waited for it may be no call of
    /// the group.
    fn seek(&self) -> Result<()> {
        loop {
            let oldest = self.under_way.borrow().front().cloned();
            self.watch.looked(oldest.as_ref().map(|oldest| &oldest.at));
            let Some(oldest) = oldest else { return self.raw.check() };
            let reached = oldest.end.get().map_or(Ok(false), |end| self.lane.is_reached(end));
            // An abort by the watch lets the device pass what it has aborted.
            let lives = self.raw.lives().map_err(|error| self.named(&oldest.at, error));
            if let (Ok(true), Ok(())) = (&reached, &lives) {
                self.under_way.borrow_mut().pop_front();
                continue;
            }
            return reached.and(lives).and_then(|()| self.wait_on(&oldest)).inspect_err(|error| {
                trace::leave(trace::enter(oldest.at.call.operation()), Some(error));
            });
        }
    }

    /// The loss for which the watch has aborted, be it of a rank that a later collective needs.
    fn named(&self, oldest: &Meeting, error: Error) -> Error {
        let under_way = self.under_way.borrow();
        let loss = under_way.iter().find_map(|under_way| under_way.at.obstacle(&*self.side));
        loss.unwrap_or_else(|| oldest.explain(&*self.side, error))
    }

    /// Whether a collective that is not finished may still be.
    fn wait_on(&self, oldest: &UnderWay<B>) -> Result<()> {
        if let Some(error) = oldest.at.obstacle(&*self.side) {
            return Err(error);
        }
        self.raw.check().map_err(|error| oldest.at.explain(&*self.side, error))?;
        // Time counts from when the collective itself is at work, not what was asked for before it.
        if oldest.since.get().is_none() && self.lane.is_reached(&oldest.begin)? {
            oldest.since.set(Some(Instant::now()));
        }
        if oldest.since.get().is_some_and(|since| since.elapsed() > self.deadline) {
            return Err(oldest.at.give_up(&*self.side, self.deadline));
        }
        Ok(())
    }

    /// PipelineEnds the group. Where a rank has left after it had done its part, what is under way is still finished.
    fn fail(&self, error: Error) -> Error {
        if matches!(error, Error::PeerLost { reason: LostReason::Left, .. }) {
            return self.failed.borrow_mut().get_or_insert(error).clone();
        }
        self.abort(error)
    }

    /// PipelineEnds the group and what is under way.
    fn abort(&self, error: Error) -> Error {
        self.spoiled.set(self.spoiled.get() || !self.under_way.borrow().is_empty());
        self.raw.abort();
        self.failed.borrow_mut().get_or_insert(error).clone()
    }
}

impl<B: NcclDevice> Nccl<B> {
    /// Creates the communicator of the side's ranks.
    fn join(side: Rc<dyn Communicator<Cpu>>, call: &Call, device: &B, options: Options) -> Result<Self> {
        // As f16, whose bits are copied as they are.
        let mut id = [f16::ZERO; 64];
        if side.rank() == 0 {
            let bytes = Raw::unique_id()?;
            let (pairs, _) = bytes.as_chunks();
            id.iter_mut().zip(pairs).for_each(|(word, pair)| *word = f16::from_le_bytes(*pair));
        }
        side.broadcast(call, 0, AnyMut::F16(id.as_mut_slice()))?;
        let mut bytes = [0; 128];
        bytes.as_chunks_mut().0.iter_mut().zip(id).for_each(|(pair, word)| *pair = word.to_le_bytes());
        if side.is_near() {
            device.open_memory()?;
        }
        device.make_current()?;
        let work = hash((call.group, call.seq));
        let step = ExternalStep { work, number: 0, with: None };
        let at = Meeting { call: *call, step, other: None };
        at.come(&*side);
        let raw = {
            let seat = Seat { id: bytes, rank: side.rank(), size: side.size() };
            let poll = at.patience(&*side, options.deadline);
            let join = if options.blocking { Raw::join_blocking } else { Raw::join };
            let raw = join(seat, device.elsewhere(), &poll);
            raw.map_err(|error| at.explain(&*side, error))?
        };
        Self::new(raw, side, device, work, options)
    }

    /// `work` is the group's number on the side, where its making was the first step.
    fn new(
        raw: Raw,
        side: Rc<dyn Communicator<Cpu>>,
        device: &B,
        work: u64,
        options: Options,
    ) -> Result<Self> {
        let state = Rc::new(State {
            watch: Watch::over(raw.shared(), &*side, &options)?,
            raw,
            side: Rc::clone(&side),
            lane: device.beside()?,
            deadline: options.deadline,
            failed: RefCell::new(None),
            spoiled: Cell::new(false),
            under_way: RefCell::default(),
        });
        let watched = Rc::clone(&state);
        let look: Rc<dyn Fn() -> Result<()>> = Rc::new(move || watched.look());
        device.while_waiting(&look);
        state.lane.while_waiting(&look);
        Ok(Self {
            state,
            look,
            side,
            device: device.clone(),
            known: RefCell::default(),
            unchecked: Cell::new(0),
            history: Cell::new(0),
            work,
            steps: Cell::new(1),
            messages: RefCell::default(),
            options,
        })
    }

    fn here(&self) -> usize {
        self.side.rank()
    }

    /// Compares the call. Makes the lane wait for what was computed, on `foreign` handles too, and
    /// for the rank's collectives of other communicators. Returns the mark behind that.
    fn enter(&self, call: &Call, foreign: &[Option<B>]) -> Result<B::Mark> {
        self.state.is_well()?;
        self.compare(call)?;
        let lane = self.lane().stream();
        let last = LAST.with_borrow(|last| last.clone()).filter(|(stream, _)| *stream != lane);
        self.wait_for(foreign, last.and_then(|(_, last)| last.downcast().ok()))
    }

    /// Lets the lane wait for what was computed, and for a collective on another lane. Returns the
    /// mark behind that.
    fn wait_for(&self, foreign: &[Option<B>], last: Option<Rc<UnderWay<B>>>) -> Result<B::Mark> {
        self.device.make_current()?;
        let (lane, computed) = (self.lane(), self.device.mark()?);
        lane.after(&computed)?;
        if last.is_none() && foreign.iter().flatten().next().is_none() {
            // What the lane did before is known to be finished when this collective is the oldest.
            return Ok(computed);
        }
        last.map_or(Ok(()), |last| last.hold(lane))?;
        foreign.iter().flatten().try_for_each(|foreign| lane.after(&foreign.mark()?))?;
        lane.mark()
    }

    /// The handle of a view's memory, where that has to be waited for by itself.
    fn foreign(&self, view: AnyRef<'_, B>) -> Result<Option<B>> {
        each_dtype!(AnyRef, view, view => self.device.foreign(view))
    }

    fn compare(&self, call: &Call) -> Result<()> {
        let every = if self.side.is_near() { 1 } else { self.options.check_every.max(1) };
        let kind = call.kind();
        let (new, unchecked) = (!self.known.borrow().contains(&kind), self.unchecked.get() + 1);
        if !new && unchecked < every {
            self.unchecked.set(unchecked);
            self.history.set(hash((self.history.get(), call.fingerprint())) | 1);
            return Ok(());
        }
        let call = Call { history: self.history.replace(0), ..*call };
        self.unchecked.set(0);
        self.side.barrier(&call).map_err(|error| self.state.fail(error))?;
        self.known.borrow_mut().insert(kind);
        Ok(())
    }

    /// Runs a collective on the lane, and returns the mark behind it.
    fn run(
        &self,
        call: &Call,
        foreign: &[Option<B>],
        collective: impl FnOnce(&Meeting) -> Result<()>,
    ) -> Result<Rc<UnderWay<B>>> {
        let begin = self.enter(call, foreign)?;
        let under_way = self.go(self.meeting(call), begin, foreign, collective)?;
        LAST.set(Some((self.lane().stream(), Rc::clone(&under_way) as Rc<dyn Any>)));
        Ok(under_way)
    }

    /// Where all ranks meet next.
    fn meeting(&self, call: &Call) -> Meeting {
        let number = self.steps.replace(self.steps.get() + 1);
        Meeting { call: *call, step: ExternalStep { work: self.work, number, with: None }, other: None }
    }

    /// The step of the next message between two ranks, of which this is one.
    fn message(&self, from: usize, to: usize) -> ExternalStep {
        let mut messages = self.messages.borrow_mut();
        let count = messages.entry((from, to)).or_default();
        *count += 1;
        let with = if from == self.here() { to } else { from };
        ExternalStep { work: hash((self.work, from, to)), number: *count - 1, with: Some(with) }
    }

    /// Hands what this rank does at a meeting to the device, and returns it; `begin` lies before it.
    fn go(
        &self,
        at: Meeting,
        begin: B::Mark,
        foreign: &[Option<B>],
        act: impl FnOnce(&Meeting) -> Result<()>,
    ) -> Result<Rc<UnderWay<B>>> {
        at.come(&*self.side);
        let under_way = Rc::new(UnderWay { at, begin, end: OnceCell::new(), since: Cell::new(None) });
        // It is watched from here on: it may wait for the device itself.
        self.state.under_way.borrow_mut().push_back(Rc::clone(&under_way));
        self.state.watch.started(at);
        foreign.iter().flatten().for_each(|foreign| foreign.while_waiting(&self.look));
        let acted = self.state.watch.inside(at, || act(&at));
        let acted = acted.map_err(|error| self.state.abort(at.explain(&*self.side, error)));
        // Part of it may be with the device, also where it failed: the tensors go back after that.
        let end = self.state.lane.mark()?;
        foreign.iter().flatten().try_for_each(|foreign| foreign.after(&end))?;
        if acted.is_err() {
            self.device.after(&end)?;
        }
        under_way.end.get_or_init(|| end);
        acted.map(|()| under_way)
    }

    /// Runs a collective, and lets what is computed later wait for it.
    fn run_now(
        &self,
        call: &Call,
        foreign: &[Option<B>],
        collective: impl FnOnce(&Meeting) -> Result<()>,
    ) -> Result<()> {
        let done = self.run(call, foreign, collective)?;
        done.hold(&self.device)
    }

    /// One call of NCCL.
    fn alone(&self, at: &Meeting, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let poll = at.patience(&*self.side, self.options.deadline);
        self.state.raw.alone(&poll, call)
    }

    /// Several calls of NCCL as one.
    fn grouped(&self, at: &Meeting, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let poll = at.patience(&*self.side, self.options.deadline);
        self.state.raw.grouped(&poll, calls)
    }

    fn lane(&self) -> &B {
        &self.state.lane
    }

    /// recv ← the parts one after another; `send` is this rank's.
    fn gather_flat<T: Element>(
        &self,
        at: &Meeting,
        lens: &Partition,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        let raw = &self.state.raw;
        if is_even(lens) {
            return self.alone(at, || raw.all_gather::<T, B>(self.lane(), lens.shards(), send, &mut recv));
        }
        self.grouped(at, || {
            for root in (0..lens.shards()).filter(|&root| lens.size(root) > 0) {
                let own = (root == self.here()).then_some(send);
                let mut part = B::narrow_mut::<T>(B::reborrow::<T>(&mut recv), lens.range(root));
                raw.broadcast::<T, B>(self.lane(), root, own, &mut part)?;
            }
            Ok(())
        })
    }

    /// recv ← this rank's part of the reduction; `send` is all parts one after another.
    fn scatter_flat<T: Element>(
        &self,
        at: &Meeting,
        op: ReduceOp,
        lens: &Partition,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (raw, here, ranks) = (&self.state.raw, self.here(), lens.shards());
        if op == ReduceOp::Sum && self.options.order == Order::Any {
            if is_even(lens) {
                return self.alone(at, || raw.reduce_scatter::<T, B>(self.lane(), ranks, send, &mut recv));
            }
            return self.grouped(at, || {
                for root in (0..ranks).filter(|&root| lens.size(root) > 0) {
                    let own = (root == here).then_some(&mut recv);
                    raw.reduce::<T, B>(self.lane(), root, B::narrow::<T>(send, lens.range(root)), own)?;
                }
                Ok(())
            });
        }
        // All ranks' terms of this rank's part, one after another.
        let len = lens.size(here);
        let mut terms = self.lane().empty::<T>(len * ranks)?;
        let mut terms_mut = B::slice_mut::<T>(&mut terms);
        self.grouped(at, || {
            for peer in 0..ranks {
                if lens.size(peer) > 0 {
                    raw.send::<T, B>(self.lane(), peer, B::narrow::<T>(send, lens.range(peer)))?;
                }
                if len > 0 {
                    let range = peer * len..(peer + 1) * len;
                    let mut term = B::narrow_mut::<T>(B::reborrow::<T>(&mut terms_mut), range);
                    raw.recv::<T, B>(self.lane(), peer, &mut term)?;
                }
            }
            Ok(())
        })?;
        drop(terms_mut);
        if len == 0 {
            return Ok(());
        }
        // Max and min too: NCCL's would lose a NaN.
        self.lane().combine::<T>(op, ranks, B::slice::<T>(&terms), recv)
    }

    fn reduce<T: Element>(&self, at: &Meeting, op: ReduceOp, mut x: B::SliceMut<'_, T>) -> Result<()> {
        let len = B::len_mut::<T>(&x);
        if len == 0 {
            return Ok(());
        }
        if op == ReduceOp::Sum && self.options.order == Order::Any {
            return self.alone(at, || self.state.raw.all_reduce::<T, B>(self.lane(), &mut x));
        }
        let lens = Partition::even(len, self.side.size());
        let mut part = self.lane().empty::<T>(lens.size(self.here()))?;
        self.scatter_flat::<T>(at, op, &lens, B::shared::<T>(&x), B::slice_mut::<T>(&mut part))?;
        self.gather_flat::<T>(at, &lens, B::slice::<T>(&part), x)
    }

    fn gather<T: Element>(
        &self,
        at: &Meeting,
        parts: &Shards,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        if parts.total() == 0 {
            return Ok(());
        }
        let (lens, cols) = (lens(parts), parts.partition.total());
        if parts.rows == 1 {
            return self.gather_flat::<T>(at, &lens, send, recv);
        }
        let mut flat = self.lane().empty::<T>(parts.total())?;
        self.gather_flat::<T>(at, &lens, send, B::slice_mut::<T>(&mut flat))?;
        for rank in (0..lens.shards()).filter(|&rank| lens.size(rank) > 0) {
            let part = B::narrow::<T>(B::slice::<T>(&flat), lens.range(rank));
            let whole = MatMut::<T, B>::new(B::reborrow::<T>(&mut recv), parts.rows, cols)?;
            let part = MatRef::new(part, parts.rows, parts.partition.size(rank))?;
            self.lane().copy::<T, T>(part, whole.columns(parts.partition.range(rank)))?;
        }
        Ok(())
    }

    fn scatter<T: Element>(
        &self,
        at: &Meeting,
        op: ReduceOp,
        parts: &Shards,
        send: B::Slice<'_, T>,
        recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        if parts.total() == 0 {
            return Ok(());
        }
        let (lens, cols) = (lens(parts), parts.partition.total());
        if parts.rows == 1 {
            return self.scatter_flat::<T>(at, op, &lens, send, recv);
        }
        let mut flat = self.lane().empty::<T>(parts.total())?;
        let whole = MatRef::<T, B>::new(send, parts.rows, cols)?;
        for rank in (0..lens.shards()).filter(|&rank| lens.size(rank) > 0) {
            let part = B::narrow_mut::<T>(B::slice_mut::<T>(&mut flat), lens.range(rank));
            let part = MatMut::new(part, parts.rows, parts.partition.size(rank))?;
            self.lane().copy::<T, T>(whole.columns(parts.partition.range(rank)), part)?;
        }
        self.scatter_flat::<T>(at, op, &lens, B::slice::<T>(&flat), recv)
    }

    fn work(
        &self,
        at: &Meeting,
        collective: &Collective,
        send: &mut AnyBuffer<B>,
        recv: &mut AnyBuffer<B>,
    ) -> Result<()> {
        match collective {
            Collective::AllReduce(op) => {
                each_dtype!(AnyMut, send.as_mut(), x => self.reduce(at, *op, x))
            }
            Collective::AllGather(parts) => each_pair!(send.as_ref(), recv.as_mut(), (send, recv) => {
                self.gather(at, parts, send, recv)
            }),
            Collective::ReduceScatter(op, parts) => {
                each_pair!(send.as_ref(), recv.as_mut(), (send, recv) => {
                    self.scatter(at, *op, parts, send, recv)
                })
            }
        }
    }

    /// Tells the receiver what it will get, and compares what is expected with what the sender says.
    fn announce(
        &self,
        call: &Call,
        send: Option<&Outgoing<'_, B>>,
        recv: Option<&Incoming<'_, B>>,
    ) -> Result<()> {
        // Messages of no elements, which carry the shapes.
        let outgoing =
            send.map(|send| Outgoing { to: send.to, shape: send.shape, data: nothing(send.data.dtype()) });
        let incoming = recv.map(|recv| Incoming {
            from: recv.from,
            shape: recv.shape,
            data: nothing_mut(recv.data.dtype()),
        });
        self.side.exchange(call, outgoing, incoming).map_err(|error| match error {
            // Others may still be there.
            Error::PeerLost { reason: LostReason::Left, .. } => error,
            error => self.state.fail(error),
        })
    }
}

fn nothing<'a>(dtype: DType) -> AnyRef<'a, Cpu> {
    match dtype {
        DType::F64 => AnyRef::F64(&[] as &[f64]),
        DType::F32 => AnyRef::F32(&[] as &[f32]),
        DType::BF16 => AnyRef::BF16(&[] as &[bf16]),
        DType::F16 => AnyRef::F16(&[] as &[f16]),
    }
}

fn nothing_mut<'a>(dtype: DType) -> AnyMut<'a, Cpu> {
    match dtype {
        DType::F64 => AnyMut::F64(&mut [] as &mut [f64]),
        DType::F32 => AnyMut::F32(&mut [] as &mut [f32]),
        DType::BF16 => AnyMut::BF16(&mut [] as &mut [bf16]),
        DType::F16 => AnyMut::F16(&mut [] as &mut [f16]),
    }
}

/// The lengths of the parts, as they lie one after another.
fn lens(parts: &Shards) -> Partition {
    Partition::from_sizes((0..parts.partition.shards()).map(|rank| parts.len(rank)))
}

fn is_even(lens: &Partition) -> bool {
    lens.sizes().all(|size| size == lens.size(0))
}

impl<B: NcclDevice> Communicator<B> for Nccl<B> {
    fn rank(&self) -> usize {
        self.side.rank()
    }

    fn size(&self) -> usize {
        self.side.size()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        let foreign = [self.foreign(x.shared())?];
        self.run_now(call, &foreign, |at| each_dtype!(AnyMut, x, x => self.reduce(at, op, x)))
    }

    fn all_gather(
        &self,
        call: &Call,
        parts: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let foreign = [self.foreign(send)?, self.foreign(recv.shared())?];
        self.run_now(
            call,
            &foreign,
            |at| each_pair!(send, recv, (send, recv) => self.gather(at, parts, send, recv)),
        )
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let foreign = [self.foreign(send)?, self.foreign(recv.shared())?];
        self.run_now(
            call,
            &foreign,
            |at| each_pair!(send, recv, (send, recv) => self.scatter(at, op, parts, send, recv)),
        )
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()> {
        fn broadcast<T: Element, B: NcclDevice>(
            nccl: &Nccl<B>,
            at: &Meeting,
            root: usize,
            mut x: B::SliceMut<'_, T>,
        ) -> Result<()> {
            if B::len_mut::<T>(&x) == 0 {
                return Ok(());
            }
            nccl.alone(at, || nccl.state.raw.broadcast::<T, B>(nccl.lane(), root, None, &mut x))
        }
        let foreign = [self.foreign(x.shared())?];
        self.run_now(call, &foreign, |at| each_dtype!(AnyMut, x, x => broadcast(self, at, root, x)))
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        self.state.is_well()?;
        self.announce(call, send.as_ref(), recv.as_ref())?;
        fn offer<T: Element, B: NcclDevice>(nccl: &Nccl<B>, to: usize, data: B::Slice<'_, T>) -> Result<()> {
            if B::len::<T>(data) == 0 { Ok(()) } else { nccl.state.raw.send::<T, B>(nccl.lane(), to, data) }
        }
        fn accept<T: Element, B: NcclDevice>(
            nccl: &Nccl<B>,
            from: usize,
            mut data: B::SliceMut<'_, T>,
        ) -> Result<()> {
            if B::len_mut::<T>(&data) == 0 {
                return Ok(());
            }
            nccl.state.raw.recv::<T, B>(nccl.lane(), from, &mut data)
        }
        let sent = send.as_ref().map_or(Ok(None), |send| self.foreign(send.data))?;
        let received = recv.as_ref().map_or(Ok(None), |recv| self.foreign(recv.data.shared()))?;
        let foreign = [sent, received];
        let sending = send.as_ref().map(|send| self.message(self.here(), send.to));
        let receiving = recv.as_ref().map(|recv| self.message(recv.from, self.here()));
        let mut steps = [sending, receiving].into_iter().flatten();
        let Some(step) = steps.next() else { return Ok(()) };
        let at = Meeting { call: *call, step, other: steps.next() };
        let begin = self.wait_for(&foreign, None)?;
        let done = self.go(at, begin, &foreign, |at| {
            self.grouped(at, || {
                if let Some(send) = send {
                    each_dtype!(AnyRef, send.data, data => offer(self, send.to, data))?;
                }
                match recv {
                    Some(recv) => each_dtype!(AnyMut, recv.data, data => accept(self, recv.from, data)),
                    None => Ok(()),
                }
            })
        })?;
        done.hold(&self.device)
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.state.is_well()?;
        self.side.barrier(call).map_err(|error| self.state.fail(error))
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.state.is_well().err().or_else(|| self.side.obstacle(call))
    }

    fn is_near(&self) -> bool {
        self.side.is_near()
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        self.state.is_well()?;
        let side = self.side.split(call, color, key, name).map_err(|error| self.state.fail(error))?;
        // NCCL's colors are small numbers: the rank, in this group, of a part's first.
        let mut first = [self.here() as f64];
        if let Some(side) = &side {
            side.broadcast(call, 0, AnyMut::F64(first.as_mut_slice()))?;
        }
        let color = side.as_ref().map(|_| first[0] as usize);
        let key = side.as_ref().map_or(0, |side| side.rank());
        self.device.make_current()?;
        let at = self.meeting(call);
        at.come(&*self.side);
        let poll = at.patience(&*self.side, self.options.deadline);
        let raw = self.state.watch.inside(at, || self.state.raw.split(color, key, &poll));
        let raw = raw.map_err(|error| self.state.abort(at.explain(&*self.side, error)))?;
        let (Some(raw), Some(side)) = (raw, side) else { return Ok(None) };
        let work = hash((self.work, call.seq, color));
        let part = Self::new(raw, side.into(), &self.device, work, self.options.clone())?;
        Ok(Some(Box::new(part)))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        mut send: AnyBuffer<B>,
        mut recv: AnyBuffer<B>,
    ) -> Result<Box<dyn InFlight<B>>> {
        let foreign = [self.foreign(send.as_ref())?, self.foreign(recv.as_ref())?];
        let under_way = self.run(call, &foreign, |at| self.work(at, &collective, &mut send, &mut recv))?;
        let (result, used) = match collective {
            Collective::AllReduce(_) => (send, recv),
            _ => (recv, send),
        };
        let state = Rc::clone(&self.state);
        let memory = Some((result, used));
        Ok(Box::new(Started { state, under_way, device: self.device.clone(), memory }))
    }
}

impl<B: NcclDevice> Drop for Nccl<B> {
    /// What is under way is finished first: others may need this rank's part.
    fn drop(&mut self) {
        let state = &self.state;
        let told = state.failed.borrow().is_some();
        let goes_on =
            || !std::thread::panicking() && state.look().is_ok() && !state.under_way.borrow().is_empty();
        while goes_on() {
            std::thread::yield_now();
        }
        let finished = state.under_way.borrow().is_empty();
        if finished {
            // Not aborted: another rank may still be fetching what this one has given.
            state.raw.destroy();
        } else {
            state.raw.abort();
            state.spoiled.set(!finished);
        }
        if state.spoiled.get() && !told {
            // No call has returned it, and what the device holds stays wrong without the group.
            std::mem::forget(Rc::clone(&self.look));
        }
        let over = Error::invalid("NCCL", "the group has ended");
        state.failed.borrow_mut().get_or_insert(over);
    }
}

/// A collective that the device is doing.
struct Started<B: NcclDevice> {
    state: Rc<State<B>>,
    under_way: Rc<UnderWay<B>>,
    device: B,
    /// The result, and what else the collective uses.
    memory: Option<(AnyBuffer<B>, AnyBuffer<B>)>,
}

impl<B: NcclDevice> InFlight<B> for Started<B> {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<B>> {
        self.state.look()?;
        self.under_way.hold(&self.device)?;
        match self.memory.take() {
            Some((result, _)) => Ok(result),
            None => Err(Error::internal("wait", "a collective was waited for twice")),
        }
    }
}

impl<B: NcclDevice> Drop for Started<B> {
    /// The memory goes back when the collective is done with it.
    fn drop(&mut self) {
        if self.memory.is_some() {
            let _ = self.under_way.hold(&self.device);
        }
    }
}
