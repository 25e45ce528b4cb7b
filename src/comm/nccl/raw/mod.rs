//! One NCCL communicator, and the only calls into it.
//!
//! Every function takes views, not pointers, and checks their lengths before it passes them on.

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

/// A communicator of one rank.
pub(super) struct RawComm {
    api: &'static Api,
    shared: Arc<SharedComm>,
    blocking: bool,
}

/// How much later than on another rank a call that joins may end.
const JOIN_DELAY: Duration = Duration::from_millis(500);

/// Called while NCCL works: an error ends the wait.
pub(super) type Poll<'a> = &'a dyn Fn() -> Result<()>;

/// A rank of a new communicator.
#[derive(Clone, Copy)]
pub(super) struct RankId {
    pub(super) id: [u8; 128],
    pub(super) rank: usize,
    pub(super) size: usize,
}

impl RawComm {
    /// Creates an id, which all ranks of a new communicator need.
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

    /// Joins a non-blocking communicator, on the current device, which is that of `make_current`.
    pub(super) fn join(rank_id: RankId, make_current: MakeCurrent, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (handle, code) = initialize(api, rank_id, false)?;
        let raw = Self::new(api, handle, make_current, false);
        raw.complete("ncclCommInitRankConfig", code, poll)?;
        Ok(raw)
    }

    /// Joins a blocking communicator, whose calls wait for the other ranks. A thread of its own
    /// makes the call that joins; `make_current` makes the device current there. If a rank never
    /// arrives, the call does not return, and this function abandons that thread.
    pub(super) fn join_blocking(rank_id: RankId, make_current: MakeCurrent, poll: Poll<'_>) -> Result<Self> {
        let api = Api::get()?;
        let (outcome, joined) = channel();
        let join = move || {
            let made = make_current().and_then(|()| initialize(api, rank_id, true));
            let made = made.and_then(|(handle, code)| match code {
                SUCCESS => Ok(Self::new(api, handle, make_current, true)),
                code => Err(api.error("ncclCommInitRankConfig", code, null_mut())),
            });
            // If the caller does not wait any more, dropping `made` aborts the communicator.
            let _ = outcome.send(made);
        };
        let thread = thread::Builder::new().name("NCCL joins".into()).spawn(join);
        thread.map_err(|error| Error::invalid("NCCL", format!("no thread can be started: {error}")))?;
        loop {
            match joined.recv_timeout(Duration::from_micros(100)) {
                Ok(made) => return made,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = poll() {
                        // A rank that is lost after it has joined is no obstacle: the call soon
                        // returns here too.
                        return joined.recv_timeout(JOIN_DELAY).ok().and_then(Result::ok).ok_or(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::internal("NCCL", "the thread that joins has panicked"));
                }
            }
        }
    }

    /// The handle that other threads may use.
    pub(super) fn shared(&self) -> Arc<SharedComm> {
        Arc::clone(&self.shared)
    }

    /// Creates the communicator of the ranks of one color, in order of `key`.
    pub(super) fn split(&self, color: Option<usize>, key: usize, poll: Poll<'_>) -> Result<Option<Self>> {
        let wanted = color.is_some();
        let color = color.map_or(Ok(NO_COLOR), |color| number("the color", color))?;
        let key = number("the key", key)?;
        let in_use = self.in_use()?;
        let parent = self.alive()?;
        // Until the parent leaves `IN_PROGRESS`, a thread of NCCL may write the new handle here at
        // any time, without a color too. So if `complete` returns an error, `place` leaks: it has
        // to stay forever.
        let place = Box::into_raw(Box::new(AtomicPtr::<c_void>::new(null_mut())));
        let mut config = Config::new(self.blocking);
        // SAFETY: the parent is live; `place` has the layout of a handle, and is freed below only
        // after `complete` has returned that NCCL is done with it.
        #[allow(unsafe_code)]
        let split = || unsafe { (self.api.split)(parent, color, key, place.cast::<Handle>(), &mut config) };
        let code = in_use.wait(split);
        drop(in_use);
        // A non-blocking call returns success and not `IN_PROGRESS` while it continues: only the
        // parent's state says when it is done.
        let code = if code == SUCCESS { IN_PROGRESS } else { code };
        self.complete("ncclCommSplit", code, poll)?;
        // SAFETY: `place` came from `Box::into_raw`, and NCCL does not use it any more: `complete`
        // returned without an error.
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

    /// The live handle, which no other thread ends while this one makes brief calls.
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

    /// Returns why another thread has ended the communicator, if one has.
    pub(super) fn check_live(&self) -> Result<()> {
        self.alive().map(drop)
    }

    /// The error of a call that returned a code. If another thread has ended the communicator, its
    /// reason.
    fn error(&self, call: &'static str, code: c_int) -> Error {
        match self.alive() {
            Ok(handle) => self.api.error(call, code, handle),
            Err(reason) => reason,
        }
    }

    /// Returns an asynchronous error of NCCL.
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

    /// Queries the state of a communicator that is in use.
    fn query(&self) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: the handle is that of a live communicator, and `state` is valid for
        // writing the result.
        #[allow(unsafe_code)]
        match unsafe { (self.api.async_error)(self.alive()?, &mut state) } {
            SUCCESS => Ok(state),
            code => Err(self.error("ncclCommGetAsyncError", code)),
        }
    }

    /// Waits until a call that continues in the background is done.
    fn complete(&self, call: &'static str, mut code: c_int, poll: Poll<'_>) -> Result<()> {
        // No other thread ends it meanwhile: NCCL ties such a call to the thread that made it.
        let _in_use = self.in_use()?;
        loop {
            match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(self.error(call, code)),
            }
            // First: a rank that is lost after its contribution does not stop a call that is done.
            code = self.query()?;
            if code == IN_PROGRESS {
                poll()?;
                thread::yield_now();
            }
        }
    }

    /// Aborts the communicator and its calls, on the device too.
    pub(super) fn abort(&self) {
        self.end(End::Abort);
    }

    /// Destroys the communicator, whose work is done, once the other ranks do the same.
    pub(super) fn destroy(&self) {
        self.end(End::Destroy);
    }

    /// Does not wait: the other ranks may first have to learn that this one leaves.
    fn end(&self, how: End) {
        let mut state = self.shared.state();
        let mut handle = std::mem::take(&mut state.handle);
        let ended = match (handle.get_mut().is_null(), how) {
            (true, _) => state.ended.take(),
            // NCCL ties a call that continues in the background to the thread that made it.
            (false, End::Abort) if !self.blocking => {
                drop(state);
                // SAFETY: the handle was live, and is not used again: `take` left null.
                #[allow(unsafe_code)]
                let _ = unsafe { (self.api.abort)(handle.into_inner()) };
                return;
            }
            (false, how) => Some(self.shared.end(handle, how)),
        };
        add_ending(ended);
    }

    /// Makes one call.
    pub(super) fn single(&self, poll: Poll<'_>, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let in_use = self.in_use()?;
        let result = in_use.wait(call);
        drop(in_use);
        result?;
        // A non-blocking call continues in the background.
        if self.blocking { Ok(()) } else { self.complete("a call", IN_PROGRESS, poll) }
    }

    /// Makes several calls as one group.
    pub(super) fn grouped(&self, poll: Poll<'_>, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let in_use = self.in_use()?;
        // SAFETY: every start has its end below, after `calls` too if they fail.
        #[allow(unsafe_code)]
        let started = unsafe { (self.api.group_start)() };
        self.returned("ncclGroupStart", started)?;
        let result = calls();
        // SAFETY: as above.
        #[allow(unsafe_code)]
        let ended = in_use.wait(|| unsafe { (self.api.group_end)() });
        drop(in_use);
        result?;
        self.complete("ncclGroupEnd", ended, poll)
    }

    /// Accepts a call that is done, or continues in the background.
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

/// Creates a communicator's handle on the current device. Returns it and NCCL's code.
fn initialize(api: &Api, rank_id: RankId, blocking: bool) -> Result<(Handle, c_int)> {
    let (rank, size) = (number("the rank", rank_id.rank)?, number("the number of ranks", rank_id.size)?);
    let mut handle = null_mut();
    // SAFETY: `handle` is valid for writing a communicator, the configuration is of the size that
    // it states, and NCCL copies it.
    #[allow(unsafe_code)]
    let code =
        unsafe { (api.init)(&mut handle, size, UniqueId(rank_id.id), rank, &mut Config::new(blocking)) };
    Ok((handle, code))
}

fn number(what: &str, value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(|_| Error::invalid("NCCL", format!("{what} is {value}")))
}
