//! One NCCL communicator, and the only calls into it.
//!
//! Every function takes views, not pointers, and checks their lengths before it hands them on.

use super::{
    NcclDevice,
    api::{Api, Config, Handle, IN_PROGRESS, NO_COLOR, SUCCESS, SUM, UniqueId},
    device::Enter,
};
use crate::{
    device::{DType, Element},
    error::{Error, Result, same_size},
};
use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    ptr::null_mut,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicPtr, Ordering},
        mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// A communicator of one rank.
pub(super) struct Raw {
    api: &'static Api,
    shared: Arc<Shared>,
    blocking: bool,
}

/// How much later than on another rank a call that joins may end.
const SOON: Duration = Duration::from_millis(500);

/// Called while NCCL is at work: an error ends the wait.
pub(super) type Poll<'a> = &'a dyn Fn() -> Result<()>;

/// The part of a communicator that other threads than the rank's may touch: they can end it.
pub(super) struct Shared {
    api: &'static Api,
    enter: Enter,
    state: Mutex<State>,
}

struct State {
    /// Null once it has ended.
    handle: AtomicPtr<c_void>,
    uses: Uses,
    /// Why another thread has ended it.
    reason: Option<Error>,
    /// Hears when that thread's call is done.
    ended: Option<Receiver<()>>,
}

/// What the rank's thread does with the handle.
enum Uses {
    Nothing,
    /// Calls that do not wait for peers, such as those of a group before its end.
    Briefly,
    /// A call that may wait for peers, and how often another thread has asked for its end.
    Waits(u32),
}

/// How often an end has to be asked for before a call is ended: until then it may not have reached
/// NCCL, or may be returning.
const TIMES: u32 = 5;

/// How a communicator ends.
#[derive(Clone, Copy)]
enum End {
    Abort,
    Destroy,
}

impl Shared {
    fn new(api: &'static Api, handle: Handle, enter: Enter) -> Arc<Self> {
        let handle = AtomicPtr::new(handle);
        let state = Mutex::new(State { handle, uses: Uses::Nothing, reason: None, ended: None });
        Arc::new(Self { api, enter, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No critical section leaves its data half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Aborts the communicator for the rank's thread, which may be inside of a call of NCCL that
    /// waits for peers, or of the driver: it gets this reason. Does nothing yet where the thread is
    /// in the middle of other calls, or has only just made this one.
    ///
    /// The abort ends the call. NCCL's guide asks for communicators that do not block where they
    /// may be aborted, since a call that returns at that moment still uses what the abort frees. To
    /// wait for a lost rank without end is worse; `Options::blocking` leaves the choice.
    pub(super) fn abort_for(&self, reason: &Error) {
        let mut state = self.state();
        match &mut state.uses {
            Uses::Nothing => {}
            Uses::Briefly => return,
            Uses::Waits(times) => {
                *times += 1;
                if *times < TIMES {
                    return;
                }
            }
        }
        if state.handle.get_mut().is_null() {
            return;
        }
        state.reason = Some(reason.clone());
        let handle = std::mem::take(&mut state.handle);
        drop(state);
        let ended = self.end(handle, End::Abort);
        self.state().ended = Some(ended);
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.state().handle.get_mut().is_null()
    }

    /// An error that NCCL has met beside its calls, for another thread than the rank's. Only of a
    /// blocking communicator: another one goes on with its calls when it is asked.
    pub(super) fn check(&self) -> Result<()> {
        let mut state = self.state();
        let (handle, mut code) = (*state.handle.get_mut(), SUCCESS);
        if !handle.is_null() {
            // SAFETY: the handle is live as long as the state is locked, and `code` is a place for
            // a result.
            #[allow(unsafe_code)]
            let _ = unsafe { (self.api.async_error)(handle, &mut code) };
        }
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.api.error("ncclCommGetAsyncError", code, handle)),
        }
    }

    /// PipelineEnds the communicator of a handle that nobody finds any more. What is returned hears when
    /// that is done.
    ///
    /// A thread of its own does it: destroying waits for the other ranks to do the same, and the
    /// driver may keep an abort waiting for a rank that holds its lock.
    fn end(&self, handle: AtomicPtr<c_void>, how: End) -> Receiver<()> {
        let ((done, ended), handle, enter) = (channel(), Arc::new(handle), Arc::clone(&self.enter));
        let api = self.api;
        let end = move || {
            let handle = handle.load(Ordering::Relaxed);
            // SAFETY: the handle was live, and whoever asks for it from then on finds none. A
            // failure leaves nothing to be done.
            #[allow(unsafe_code)]
            let _ = unsafe {
                match how {
                    // Before any call into the driver, which may wait for what the abort ends.
                    End::Abort => (api.abort)(handle),
                    // NCCL restores the device that was current. Without this it is device 0, on
                    // which that makes a context.
                    End::Destroy => enter().map_or(SUCCESS, |()| (api.destroy)(handle)),
                }
            };
            let _ = done.send(());
        };
        if thread::Builder::new().name("NCCL ends".into()).spawn(end.clone()).is_err() {
            end();
        }
        ended
    }
}

thread_local! {
    /// The communicators of this rank that are being ended.
    static ENDING: RefCell<Vec<Receiver<()>>> = const { RefCell::new(Vec::new()) };
}

/// Waits until this thread's communicators are ended, or two seconds: the process is not to end
/// while NCCL is at work in it.
pub(in crate::comm) fn settle() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    for ended in ENDING.take() {
        let _ = ended.recv_timeout(PATIENCE.saturating_sub(begin.elapsed()));
    }
}

/// The rank's thread uses the handle.
struct Inside<'a>(&'a Shared);

impl Inside<'_> {
    /// Makes a call that may wait for peers, from which another thread can free it.
    fn wait<R>(&self, call: impl FnOnce() -> R) -> R {
        self.0.state().uses = Uses::Waits(0);
        let result = call();
        self.0.state().uses = Uses::Briefly;
        result
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.state().uses = Uses::Nothing;
    }
}

/// A rank's place in a new communicator.
#[derive(Clone, Copy)]
pub(super) struct Seat {
    pub(super) id: [u8; 128],
    pub(super) rank: usize,
    pub(super) size: usize,
}

impl Raw {
    /// What the ranks of a new communicator have to know.
    pub(super) fn unique_id() -> Result<[u8; 128]> {
        let api = Api::get()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: `id` is a place for an id.
        #[allow(unsafe_code)]
        match unsafe { (api.unique_id)(&mut id) } {
            SUCCESS => Ok(id.0),
            code => Err(api.error("ncclGetUniqueId", code, null_mut())),
        }
    }

    fn new(api: &'static Api, handle: Handle, enter: Enter, blocking: bool) -> Self {
        Self { api, shared: Shared::new(api, handle, enter), blocking }
    }

    /// Joins a communicator, on the device that is current, which is that of `enter`.
    pub(super) fn join(seat: Seat, enter: Enter, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (handle, code) = initialize(api, seat, false)?;
        let raw = Self::new(api, handle, enter, false);
        raw.settle("ncclCommInitRankConfig", code, poll)?;
        Ok(raw)
    }

    /// The same, where every call waits for the other ranks. The call that joins is made by a
    /// thread of its own, on which `enter` makes the device current: a call for ranks that never
    /// come does not end, and that thread is left to it.
    pub(super) fn join_blocking(seat: Seat, enter: Enter, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (outcome, joined) = channel();
        let join = move || {
            let made = enter().and_then(|()| initialize(api, seat, true));
            let made = made.and_then(|(handle, code)| match code {
                SUCCESS => Ok(Self::new(api, handle, enter, true)),
                code => Err(api.error("ncclCommInitRankConfig", code, null_mut())),
            });
            // Where nobody waits any more, it is aborted.
            let _ = outcome.send(made);
        };
        let thread = thread::Builder::new().name("NCCL joins".into()).spawn(join);
        thread.map_err(|error| Error::invalid("NCCL", format!("no thread can be started: {error}")))?;
        loop {
            match joined.recv_timeout(Duration::from_micros(100)) {
                Ok(made) => return made,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = poll() {
                        // A rank that is lost after it has joined is no obstacle: the call ends
                        // here too, soon after.
                        return joined.recv_timeout(SOON).ok().and_then(Result::ok).ok_or(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::internal("NCCL", "the thread that joins has panicked"));
                }
            }
        }
    }

    /// What other threads may touch.
    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// The communicator of the ranks of one color, in order of `key`.
    pub(super) fn split(&self, color: Option<usize>, key: usize, poll: Poll<'_>) -> Result<Option<Self>> {
        let wanted = color.is_some();
        let color = color.map_or(Ok(NO_COLOR), |color| number("the color", color))?;
        let key = number("the key", key)?;
        let inside = self.enter()?;
        let parent = self.alive()?;
        // A thread of NCCL writes the part's handle here at any time until the parent has left
        // `IN_PROGRESS`, also where there is no color. Where that is not waited for, the place has
        // to stay for ever: `settle` returning an error leaks it.
        let place = Box::into_raw(Box::new(AtomicPtr::<c_void>::new(null_mut())));
        let mut config = Config::new(self.blocking);
        // SAFETY: the parent is live; `place` is laid out as a handle, and is freed below only when
        // NCCL is done with it.
        #[allow(unsafe_code)]
        let split = || unsafe { (self.api.split)(parent, color, key, place.cast::<Handle>(), &mut config) };
        let code = inside.wait(split);
        drop(inside);
        // Without blocking the call returns success and not `IN_PROGRESS` while it goes on: the
        // parent has to be asked.
        let code = if code == SUCCESS { IN_PROGRESS } else { code };
        self.settle("ncclCommSplit", code, poll)?;
        // SAFETY: `place` came from `Box::into_raw`, and NCCL does not use it any more.
        #[allow(unsafe_code)]
        let place = unsafe { Box::from_raw(place) };
        let handle = place.load(Ordering::Acquire);
        if !wanted {
            return Ok(None);
        }
        let part = Self::new(self.api, handle, Arc::clone(&self.shared.enter), self.blocking);
        part.settle("ncclCommSplit", IN_PROGRESS, poll)?;
        Ok(Some(part))
    }

    /// The handle, which no other thread ends while this one uses it briefly.
    fn alive(&self) -> Result<Handle> {
        let state = self.shared.state();
        let handle = state.handle.load(Ordering::Relaxed);
        if handle.is_null() {
            let reason = state.reason.clone();
            return Err(reason.unwrap_or_else(|| Error::invalid("NCCL", "the communicator was aborted")));
        }
        Ok(handle)
    }

    fn enter(&self) -> Result<Inside<'_>> {
        self.shared.state().uses = Uses::Briefly;
        let inside = Inside(&self.shared);
        self.alive()?;
        Ok(inside)
    }

    /// Whether no other thread has ended it; if one has, why.
    pub(super) fn lives(&self) -> Result<()> {
        self.alive().map(drop)
    }

    /// The error of a call that returned a code; where another thread has ended the communicator,
    /// why.
    fn error(&self, call: &'static str, code: c_int) -> Error {
        match self.alive() {
            Ok(handle) => self.api.error(call, code, handle),
            Err(reason) => reason,
        }
    }

    /// An error that NCCL has met beside its calls.
    pub(super) fn check(&self) -> Result<()> {
        match self.state()? {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.error("ncclCommGetAsyncError", code)),
        }
    }

    fn state(&self) -> Result<c_int> {
        let _inside = self.enter()?;
        self.ask()
    }

    /// What NCCL says of the communicator, to a thread that is inside.
    fn ask(&self) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: the handle is that of a live communicator, and `state` is a place for a result.
        #[allow(unsafe_code)]
        match unsafe { (self.api.async_error)(self.alive()?, &mut state) } {
            SUCCESS => Ok(state),
            code => Err(self.error("ncclCommGetAsyncError", code)),
        }
    }

    /// Waits until a call that goes on in the background is done.
    fn settle(&self, call: &'static str, mut code: c_int, poll: Poll<'_>) -> Result<()> {
        // No other thread ends it meanwhile: NCCL keeps such a call with the thread that made it.
        let _inside = self.enter()?;
        loop {
            match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(self.error(call, code)),
            }
            // First: a rank that is lost after it has done its part is no obstacle to what is done.
            code = self.ask()?;
            if code == IN_PROGRESS {
                poll()?;
                thread::yield_now();
            }
        }
    }

    /// PipelineEnds what the communicator is doing, on the device too, and the communicator.
    pub(super) fn abort(&self) {
        self.end(End::Abort);
    }

    /// PipelineEnds the communicator, whose work is done, when the other ranks do the same.
    pub(super) fn destroy(&self) {
        self.end(End::Destroy);
    }

    /// Does not wait: the other ranks may have to hear first that this one leaves.
    fn end(&self, how: End) {
        let mut state = self.shared.state();
        let mut handle = std::mem::take(&mut state.handle);
        let ended = match (handle.get_mut().is_null(), how) {
            (true, _) => state.ended.take(),
            // NCCL keeps a call that goes on in the background with the thread that made it.
            (false, End::Abort) if !self.blocking => {
                drop(state);
                // SAFETY: the handle was live, and is not used again.
                #[allow(unsafe_code)]
                let _ = unsafe { (self.api.abort)(handle.into_inner()) };
                return;
            }
            (false, how) => Some(self.shared.end(handle, how)),
        };
        // It is gone where the thread ends, and a group with it.
        let _ = ENDING.try_with(|ending| {
            let mut ending = ending.borrow_mut();
            ending.retain(|ended| matches!(ended.try_recv(), Err(TryRecvError::Empty)));
            ending.extend(ended);
        });
    }

    /// One call.
    pub(super) fn alone(&self, poll: Poll<'_>, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let inside = self.enter()?;
        let result = inside.wait(call);
        drop(inside);
        result?;
        // Without blocking it goes on in the background.
        if self.blocking { Ok(()) } else { self.settle("a call", IN_PROGRESS, poll) }
    }

    /// Several calls as one.
    pub(super) fn grouped(&self, poll: Poll<'_>, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let inside = self.enter()?;
        // SAFETY: every start has its end below.
        #[allow(unsafe_code)]
        let started = unsafe { (self.api.group_start)() };
        self.returned("ncclGroupStart", started)?;
        let result = calls();
        // SAFETY: as above.
        #[allow(unsafe_code)]
        let ended = inside.wait(|| unsafe { (self.api.group_end)() });
        drop(inside);
        result?;
        self.settle("ncclGroupEnd", ended, poll)
    }

    /// Accepts a call that is done, or goes on in the background.
    fn returned(&self, call: &'static str, code: c_int) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.error(call, code)),
        }
    }

    /// x ← the sum of all ranks' x.
    pub(super) fn all_reduce<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        x: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (len, x) = (B::len_mut::<T>(x), B::address_mut::<T>(x));
        // SAFETY: `x` is `len` elements of the device, borrowed exclusively; the lane orders the work before whatever the
        // borrower does with it next (`Nccl::go`). The handle is live.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.all_reduce)(x.cast_const(), x, len, dtype(T::DTYPE), SUM, self.alive()?, lane.stream())
        };
        self.returned("ncclAllReduce", code)
    }

    /// recv ← all ranks' parts, of one length.
    pub(super) fn all_gather<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        size: usize,
        send: B::Slice<'_, T>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len::<T>(send);
        same_size("all_gather", "the parts together", len * size, "what is received", B::len_mut::<T>(recv))?;
        let (send, recv) = (B::address::<T>(send), B::address_mut::<T>(recv));
        // SAFETY: as in `all_reduce`; `recv` has `size` times the length of `send`, as was checked.
        #[allow(unsafe_code)]
        let code =
            unsafe { (self.api.all_gather)(send, recv, len, dtype(T::DTYPE), self.alive()?, lane.stream()) };
        self.returned("ncclAllGather", code)
    }

    /// recv ← this rank's part of the sum, parts of one length.
    pub(super) fn reduce_scatter<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        size: usize,
        send: B::Slice<'_, T>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len_mut::<T>(recv);
        same_size("reduce_scatter", "the parts together", len * size, "what is sent", B::len::<T>(send))?;
        let (send, recv) = (B::address::<T>(send), B::address_mut::<T>(recv));
        // SAFETY: as in `all_reduce`; `send` has `size` times the length of `recv`, as was checked.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.reduce_scatter)(send, recv, len, dtype(T::DTYPE), SUM, self.alive()?, lane.stream())
        };
        self.returned("ncclReduceScatter", code)
    }

    /// The root's recv, of which the others have none ← the sum of all ranks' send.
    pub(super) fn reduce<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        root: usize,
        send: B::Slice<'_, T>,
        recv: Option<&mut B::SliceMut<'_, T>>,
    ) -> Result<()> {
        let len = B::len::<T>(send);
        if let Some(recv) = &recv {
            same_size("reduce", "what is sent", len, "what is received", B::len_mut::<T>(recv))?;
        }
        let recv = recv.map_or(null_mut(), |recv| B::address_mut::<T>(recv));
        let (send, root) = (B::address::<T>(send), number("the root", root)?);
        // SAFETY: as in `all_reduce`; the lengths were checked. Ranks that are not the root may pass null: a rank passes
        // `recv` if it is the root, see `Nccl::scatter_flat`.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.reduce)(send, recv, len, dtype(T::DTYPE), SUM, root, self.alive()?, lane.stream())
        };
        self.returned("ncclReduce", code)
    }

    /// recv ← the root's `send`, or its `recv` where that has none.
    pub(super) fn broadcast<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        root: usize,
        send: Option<B::Slice<'_, T>>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len_mut::<T>(recv);
        if let Some(send) = send {
            same_size("broadcast", "what is sent", B::len::<T>(send), "what is received", len)?;
        }
        let (recv, root) = (B::address_mut::<T>(recv), number("the root", root)?);
        let send = send.map_or(recv.cast_const(), B::address::<T>);
        // SAFETY: as in `all_reduce`; the lengths were checked.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.broadcast)(send, recv, len, dtype(T::DTYPE), root, self.alive()?, lane.stream())
        };
        self.returned("ncclBroadcast", code)
    }

    pub(super) fn send<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        to: usize,
        data: B::Slice<'_, T>,
    ) -> Result<()> {
        let (len, data, to) = (B::len::<T>(data), B::address::<T>(data), number("the receiver", to)?);
        // SAFETY: as in `all_reduce`, of a shared borrow that is read.
        #[allow(unsafe_code)]
        let code = unsafe { (self.api.send)(data, len, dtype(T::DTYPE), to, self.alive()?, lane.stream()) };
        self.returned("ncclSend", code)
    }

    pub(super) fn recv<T: Element, B: NcclDevice>(
        &self,
        lane: &B,
        from: usize,
        data: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (len, from) = (B::len_mut::<T>(data), number("the sender", from)?);
        let data = B::address_mut::<T>(data);
        // SAFETY: as in `all_reduce`.
        #[allow(unsafe_code)]
        let code = unsafe { (self.api.recv)(data, len, dtype(T::DTYPE), from, self.alive()?, lane.stream()) };
        self.returned("ncclRecv", code)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Makes a communicator's handle on the device that is current, and returns what NCCL said.
fn initialize(api: &Api, seat: Seat, blocking: bool) -> Result<(Handle, c_int)> {
    let (rank, size) = (number("the rank", seat.rank)?, number("the number of ranks", seat.size)?);
    let mut handle = null_mut();
    // SAFETY: `handle` is a place for a communicator, the configuration is of the size that it
    // states, and NCCL copies it.
    #[allow(unsafe_code)]
    let code = unsafe { (api.init)(&mut handle, size, UniqueId(seat.id), rank, &mut Config::new(blocking)) };
    Ok((handle, code))
}

/// NCCL's number of an element.
fn dtype(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}

fn number(what: &str, value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(|_| Error::invalid("NCCL", format!("{what} is {value}")))
}
