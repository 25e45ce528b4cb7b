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
    ffi::{c_int, c_void},
    ptr::null_mut,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicPtr, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

/// A communicator of one rank.
pub(super) struct Raw {
    api: &'static Api,
    shared: Arc<Shared>,
    blocking: bool,
}

/// How much later than on another rank a call that joins or ends a communicator may end.
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
}

/// What the rank's thread does with the handle.
enum Uses {
    Nothing,
    /// Calls that do not wait for peers, such as those of a group before its end.
    Briefly,
    /// A call that may wait for peers, since then.
    Waits(Instant),
}

/// How long a call has to wait before another thread may end the communicator: one that is about to
/// enter or to leave is not to meet the end of its handle.
const MOMENT: Duration = Duration::from_millis(100);

/// What ends a communicator: `ncclCommAbort` or `ncclCommDestroy`.
type End = unsafe extern "C" fn(Handle) -> c_int;

impl Shared {
    fn new(api: &'static Api, handle: Handle, enter: Enter) -> Arc<Self> {
        let handle = AtomicPtr::new(handle);
        let state = Mutex::new(State { handle, uses: Uses::Nothing, reason: None });
        Arc::new(Self { api, enter, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No critical section leaves its data half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the communicator for the rank's thread, which may be inside of a call of NCCL that waits
    /// for peers, or of the driver: it gets this reason. Where the thread is in the middle of other
    /// calls nothing is done yet.
    ///
    /// NCCL takes an abort while another thread is inside of a blocking call: that is what ends the
    /// call.
    pub(super) fn abort_for(&self, reason: &Error) {
        let mut state = self.state();
        match state.uses {
            Uses::Briefly => return,
            Uses::Waits(since) if since.elapsed() < MOMENT => return,
            Uses::Nothing | Uses::Waits(_) => {}
        }
        if state.handle.get_mut().is_null() {
            return;
        }
        state.reason = Some(reason.clone());
        let handle = std::mem::take(&mut state.handle);
        drop(state);
        self.end(handle, self.api.abort, Duration::ZERO);
    }

    /// An error that NCCL has met beside its calls, for another thread than the rank's. Only of a
    /// blocking communicator: asking another one goes on with its calls.
    pub(super) fn check(&self) -> Result<()> {
        let mut state = self.state();
        let (handle, mut code) = (*state.handle.get_mut(), SUCCESS);
        if !handle.is_null() {
            // SAFETY: the handle is live as long as the state is locked, and `code` is a place for a
            // result.
            #[allow(unsafe_code)]
            let _ = unsafe { (self.api.async_error)(handle, &mut code) };
        }
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.api.error("ncclCommGetAsyncError", code, handle)),
        }
    }

    /// Ends the communicator of a handle that nobody finds any more, if there is one, and waits for
    /// that no longer than `patience`.
    ///
    /// It is done by a thread of its own, which is left to the call where that takes longer:
    /// destroying waits for the other ranks to do the same, and the driver may keep an abort waiting
    /// for a rank that holds its lock.
    fn end(&self, handle: AtomicPtr<c_void>, call: End, patience: Duration) {
        if handle.load(Ordering::Relaxed).is_null() {
            return;
        }
        let (handle, enter, (done, ended)) = (Arc::new(handle), Arc::clone(&self.enter), channel());
        let end = move || {
            // NCCL leaves the thread on the device on which it was: not on one that nobody uses.
            let _ = enter();
            // SAFETY: the handle was live, and whoever asks for it from then on finds none. A failure
            // leaves nothing to be done.
            #[allow(unsafe_code)]
            let _ = unsafe { call(handle.load(Ordering::Relaxed)) };
            let _ = done.send(());
        };
        match std::thread::Builder::new().name("NCCL ends".into()).spawn(end.clone()) {
            Ok(_) => drop(ended.recv_timeout(patience)),
            Err(_) => end(),
        }
    }
}

/// The rank's thread uses the handle.
struct Inside<'a>(&'a Shared);

impl Inside<'_> {
    /// Makes a call that may wait for peers, from which another thread can free it.
    fn wait<R>(&self, call: impl FnOnce() -> R) -> R {
        self.0.state().uses = Uses::Waits(Instant::now());
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

    /// Joins the communicator of this id, on the device that `enter` makes current, as it is.
    pub(super) fn join(
        id: [u8; 128],
        rank: usize,
        size: usize,
        enter: Enter,
        poll: Poll<'_>,
    ) -> Result<Self> {
        let api = Api::get()?;
        let (handle, code) = initialize(api, id, rank, size, false)?;
        let raw = Self::new(api, handle, enter, false);
        raw.settle("ncclCommInitRankConfig", code, poll)?;
        Ok(raw)
    }

    /// The same, where every call waits for the other ranks. The call that joins is made by a
    /// thread of its own, on which `enter` makes the device current: a call for ranks that never
    /// come does not end, and that thread is left to it.
    pub(super) fn join_blocking(
        id: [u8; 128],
        rank: usize,
        size: usize,
        enter: Enter,
        poll: Poll<'_>,
    ) -> Result<Self> {
        let api = Api::get()?;
        let (outcome, joined) = channel();
        let join = move || {
            let made = enter().and_then(|()| initialize(api, id, rank, size, true));
            let made = made.and_then(|(handle, code)| match code {
                SUCCESS => Ok(Self::new(api, handle, enter, true)),
                code => Err(api.error("ncclCommInitRankConfig", code, null_mut())),
            });
            // Where nobody waits any more, it is aborted.
            let _ = outcome.send(made);
        };
        let thread = std::thread::Builder::new().name("NCCL joins".into()).spawn(join);
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
                    return Err(Error::invalid("NCCL", "the thread that joins has panicked"));
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
        loop {
            match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(self.error(call, code)),
            }
            // First: a rank that is lost after it has done its part is no obstacle to what is done.
            code = self.state()?;
            if code == IN_PROGRESS {
                poll()?;
                std::thread::yield_now();
            }
        }
    }

    fn take(&self) -> AtomicPtr<c_void> {
        std::mem::take(&mut self.shared.state().handle)
    }

    /// Ends what the communicator is doing, on the device too, and the communicator.
    pub(super) fn abort(&self) {
        self.shared.end(self.take(), self.api.abort, SOON);
    }

    /// Ends the communicator, whose work is done: with the other ranks, if they do so soon.
    pub(super) fn destroy(&self) {
        self.shared.end(self.take(), self.api.destroy, SOON);
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
        // borrower does with it next (`Nccl::enter`, `Nccl::leave`). The handle is live.
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
        // `recv` if it is the root, see `Nccl::reduce_flat`.
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
fn initialize(api: &Api, id: [u8; 128], rank: usize, size: usize, blocking: bool) -> Result<(Handle, c_int)> {
    let (rank, size) = (number("the rank", rank)?, number("the number of ranks", size)?);
    let mut handle = null_mut();
    // SAFETY: `handle` is a place for a communicator, the configuration is of the size that it
    // states, and NCCL copies it.
    #[allow(unsafe_code)]
    let code = unsafe { (api.init)(&mut handle, size, UniqueId(id), rank, &mut Config::new(blocking)) };
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
