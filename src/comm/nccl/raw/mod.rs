//! One NCCL communicator. All calls into it are in this module.
//!
//! The functions take views, not pointers. They check the views' lengths before they pass addresses
//! to NCCL.

mod collectives;
mod shared;

pub(super) use shared::SharedComm;
pub(in crate::comm) use shared::settle;

use super::{
    MakeCurrent,
    api::{Api, Config, Handle, IN_PROGRESS, NO_COLOR, SUCCESS, UniqueId},
};
use crate::error::{Error, Result};
use shared::{End, InUse, add_ending};
use std::{
    ffi::{c_int, c_void},
    ptr::null_mut,
    sync::{
        Arc,
        atomic::{AtomicPtr, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

/// One rank's NCCL communicator.
pub(super) struct RawComm {
    api: &'static Api,
    shared: Arc<SharedComm>,
    blocking: bool,
}

/// How long a rank still waits for its own join call after its poll has failed.
const JOIN_DELAY: Duration = Duration::from_millis(500);

/// A function that a rank calls while it waits for NCCL. If it returns an error, the wait ends.
pub(super) type Poll<'a> = &'a dyn Fn() -> Result<()>;

/// One rank's arguments for joining a new communicator.
#[derive(Clone, Copy)]
pub(super) struct RankId {
    pub(super) id: [u8; 128],
    pub(super) rank: usize,
    pub(super) size: usize,
}

impl RawComm {
    /// Creates the unique id of a new communicator. All its ranks join with this id.
    pub(super) fn unique_id() -> Result<[u8; 128]> {
        let api = Api::get()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: `id` is valid for writing an id.
        #[allow(unsafe_code)]
        match unsafe { (api.unique_id)(&mut id) } {
            SUCCESS => Ok(id.0),
            code => Err(api.error("ncclGetUniqueId", code, null_mut())),
        }
    }

    fn new(api: &'static Api, handle: Handle, make_current: MakeCurrent, blocking: bool) -> Self {
        Self { api, shared: SharedComm::new(api, handle, make_current), blocking }
    }

    /// Joins a non-blocking communicator on the current device. `make_current` makes the same
    /// device current on another thread.
    pub(super) fn join(rank_id: RankId, make_current: MakeCurrent, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (handle, code) = initialize(api, rank_id, false)?;
        let raw = Self::new(api, handle, make_current, false);
        raw.complete("ncclCommInitRankConfig", code, poll)?;
        Ok(raw)
    }

    /// Joins a blocking communicator, whose calls wait for the other ranks. A new thread calls
    /// `make_current` and then makes NCCL's join call. If a rank never arrives, the join call does
    /// not return. Then this function returns the error of `poll` and abandons the thread.
    pub(super) fn join_blocking(rank_id: RankId, make_current: MakeCurrent, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (outcome, joined) = channel();
        let join = move || {
            let made = make_current().and_then(|()| initialize(api, rank_id, true));
            let made = made.and_then(|(handle, code)| match code {
                SUCCESS => Ok(Self::new(api, handle, make_current, true)),
                code => Err(api.error("ncclCommInitRankConfig", code, null_mut())),
            });
            // If the caller has stopped waiting, this drops `made`, which aborts the communicator.
            let _ = outcome.send(made);
        };
        let thread = thread::Builder::new().name("NCCL joins".into()).spawn(join);
        thread.map_err(|error| Error::invalid("NCCL", format!("cannot start a thread: {error}")))?;
        loop {
            match joined.recv_timeout(Duration::from_micros(100)) {
                Ok(made) => return made,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = poll() {
                        // Another rank may be lost after it has joined. Then the join call of this
                        // rank still returns soon.
                        return joined.recv_timeout(JOIN_DELAY).ok().and_then(Result::ok).ok_or(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::internal("NCCL", "the thread that joins a communicator panicked"));
                }
            }
        }
    }

    /// Returns the handle that other threads can abort.
    pub(super) fn shared(&self) -> Arc<SharedComm> {
        Arc::clone(&self.shared)
    }

    /// Creates the communicator of the ranks with one color, ordered by `key`. Returns none on a
    /// rank without a color.
    pub(super) fn split(&self, color: Option<usize>, key: usize, poll: Poll<'_>) -> Result<Option<Self>> {
        let wanted = color.is_some();
        let color = color.map_or(Ok(NO_COLOR), |color| number("the color", color))?;
        let key = number("the key", key)?;
        let in_use = self.in_use()?;
        let parent = self.alive()?;
        // An NCCL thread may write the new handle to `place` as long as the parent's state is
        // `IN_PROGRESS`, even on a rank without a color. So if `complete` returns an error, `place`
        // has to leak.
        let place = Box::into_raw(Box::new(AtomicPtr::<c_void>::new(null_mut())));
        let mut config = Config::new(self.blocking);
        // SAFETY: the parent is live. `place` has the layout of a handle. It is freed below only
        // after `complete` has succeeded, so NCCL does not use it any more.
        #[allow(unsafe_code)]
        let split = || unsafe { (self.api.split)(parent, color, key, place.cast::<Handle>(), &mut config) };
        let code = in_use.wait(split);
        drop(in_use);
        // A non-blocking split returns success, not `IN_PROGRESS`, while it continues. Only the
        // parent's state shows when the split is done.
        let code = if code == SUCCESS { IN_PROGRESS } else { code };
        self.complete("ncclCommSplit", code, poll)?;
        // SAFETY: `place` came from `Box::into_raw`. NCCL does not use it any more, because
        // `complete` succeeded.
        #[allow(unsafe_code)]
        let place = unsafe { Box::from_raw(place) };
        let handle = place.load(Ordering::Acquire);
        if !wanted {
            return Ok(None);
        }
        let child = Self::new(self.api, handle, Arc::clone(&self.shared.make_current), self.blocking);
        child.complete("ncclCommSplit", IN_PROGRESS, poll)?;
        Ok(Some(child))
    }

    /// Returns the live handle. While this thread holds an `InUse` that marks its calls as brief,
    /// no other thread ends the communicator.
    fn alive(&self) -> Result<Handle> {
        let state = self.shared.state();
        let handle = state.handle.load(Ordering::Relaxed);
        if handle.is_null() {
            let reason = state.reason.clone();
            return Err(reason.unwrap_or_else(|| Error::invalid("NCCL", "the communicator was aborted")));
        }
        Ok(handle)
    }

    fn in_use(&self) -> Result<InUse<'_>> {
        let in_use = InUse::new(&self.shared);
        self.alive()?;
        Ok(in_use)
    }

    /// Returns an error if the communicator has ended. If another thread aborted it, returns the
    /// reason.
    pub(super) fn check_live(&self) -> Result<()> {
        self.alive().map(drop)
    }

    /// Returns the error for a call that returned `code`. If another thread has aborted the
    /// communicator, returns that thread's reason instead.
    fn error(&self, call: &'static str, code: c_int) -> Error {
        match self.alive() {
            Ok(handle) => self.api.error(call, code, handle),
            Err(reason) => reason,
        }
    }

    /// Returns NCCL's asynchronous error, if there is one.
    pub(super) fn check(&self) -> Result<()> {
        match self.state()? {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.error("ncclCommGetAsyncError", code)),
        }
    }

    fn state(&self) -> Result<c_int> {
        let _in_use = self.in_use()?;
        self.query()
    }

    /// Queries NCCL's state of the communicator. The caller holds an `InUse`.
    fn query(&self) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: the handle is a live communicator's, and `state` is valid for writing the result.
        #[allow(unsafe_code)]
        match unsafe { (self.api.async_error)(self.alive()?, &mut state) } {
            SUCCESS => Ok(state),
            code => Err(self.error("ncclCommGetAsyncError", code)),
        }
    }

    /// Waits until a call that NCCL continues in the background is done.
    fn complete(&self, call: &'static str, mut code: c_int, poll: Poll<'_>) -> Result<()> {
        // `InUse` keeps other threads from ending the communicator during this wait, because NCCL
        // ties a call in the background to the thread that made the call.
        let _in_use = self.in_use()?;
        loop {
            match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(self.error(call, code)),
            }
            // Queries before it polls, so that a finished call succeeds even if a rank was lost
            // after it had contributed to the call.
            code = self.query()?;
            if code == IN_PROGRESS {
                poll()?;
                thread::yield_now();
            }
        }
    }

    /// Aborts the communicator and its calls, including their work on the device.
    pub(super) fn abort(&self) {
        self.end(End::Abort);
    }

    /// Destroys the communicator, whose work is done. NCCL waits, on another thread, until the
    /// other ranks destroy it too.
    pub(super) fn destroy(&self) {
        self.end(End::Destroy);
    }

    /// Ends the communicator. Does not wait, because the other ranks may first have to learn that
    /// this rank leaves.
    fn end(&self, how: End) {
        let mut state = self.shared.state();
        let mut handle = std::mem::take(&mut state.handle);
        let ended = match (handle.get_mut().is_null(), how) {
            (true, _) => state.ended.take(),
            // NCCL ties a call in the background to the thread that made it, so this thread aborts
            // it.
            (false, End::Abort) if !self.blocking => {
                drop(state);
                // SAFETY: the handle was live. It is not used again, because `take` left null.
                #[allow(unsafe_code)]
                let _ = unsafe { (self.api.abort)(handle.into_inner()) };
                return;
            }
            (false, how) => Some(self.shared.end(handle, how)),
        };
        add_ending(ended);
    }

    /// Makes one NCCL call.
    pub(super) fn single(&self, poll: Poll<'_>, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let in_use = self.in_use()?;
        let result = in_use.wait(call);
        drop(in_use);
        result?;
        // NCCL continues a non-blocking call in the background.
        if self.blocking { Ok(()) } else { self.complete("a call", IN_PROGRESS, poll) }
    }

    /// Makes several NCCL calls as one NCCL group.
    pub(super) fn grouped(&self, poll: Poll<'_>, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let in_use = self.in_use()?;
        // SAFETY: `group_end` below ends the group, even if `calls` fails.
        #[allow(unsafe_code)]
        let started = unsafe { (self.api.group_start)() };
        self.returned("ncclGroupStart", started)?;
        let result = calls();
        // SAFETY: this ends the group that was started above.
        #[allow(unsafe_code)]
        let ended = in_use.wait(|| unsafe { (self.api.group_end)() });
        drop(in_use);
        result?;
        self.complete("ncclGroupEnd", ended, poll)
    }

    /// Returns an error unless `code` states that the call is done or continues in the background.
    fn returned(&self, call: &'static str, code: c_int) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.error(call, code)),
        }
    }
}

impl Drop for RawComm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Creates a communicator's handle on the current device. Returns the handle and NCCL's code.
fn initialize(api: &Api, rank_id: RankId, blocking: bool) -> Result<(Handle, c_int)> {
    let (rank, size) = (number("the rank", rank_id.rank)?, number("the number of ranks", rank_id.size)?);
    let mut handle = null_mut();
    // SAFETY: `handle` is valid for writing a communicator. The configuration states its own size,
    // and NCCL copies it.
    #[allow(unsafe_code)]
    let code =
        unsafe { (api.init)(&mut handle, size, UniqueId(rank_id.id), rank, &mut Config::new(blocking)) };
    Ok((handle, code))
}

fn number(what: &str, value: usize) -> Result<c_int> {
    c_int::try_from(value)
        .map_err(|_| Error::invalid("NCCL", format!("{what} is {value}, too large for NCCL")))
}
