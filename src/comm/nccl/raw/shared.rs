//! The NCCL communicator handle, shared with threads that may abort it, and the code that aborts
//! and destroys communicators.

use crate::{
    comm::nccl::{
        MakeCurrent,
        api::{Api, Handle, IN_PROGRESS, SUCCESS},
    },
    error::{Error, Result},
};
use std::{
    cell::RefCell,
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicPtr, Ordering},
        mpsc::{Receiver, TryRecvError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// A communicator handle that threads other than the rank's thread can abort.
pub(in crate::comm::nccl) struct SharedComm {
    api: &'static Api,
    pub(super) make_current: MakeCurrent,
    state: Mutex<State>,
}

pub(super) struct State {
    /// Null after the communicator has ended.
    pub(super) handle: AtomicPtr<c_void>,
    usage: Usage,
    /// Why another thread has aborted the communicator.
    pub(super) reason: Option<Error>,
    /// Receives a message when that abort has returned.
    pub(super) ended: Option<Receiver<()>>,
}

/// What the rank's thread does with the handle.
enum Usage {
    Idle,
    /// Calls that do not wait for peers, such as those between group start and group end.
    Brief,
    /// A call that may wait for peers, with the number of abort requests since the call began.
    Waiting(u32),
}

/// The number of abort requests at which a waiting call is aborted. Earlier requests are ignored,
/// because the call may not have reached NCCL yet, or may be about to return.
const REQUESTS: u32 = 5;

/// How a communicator ends.
#[derive(Clone, Copy)]
pub(super) enum End {
    Abort,
    Destroy,
}

impl SharedComm {
    pub(super) fn new(api: &'static Api, handle: Handle, make_current: MakeCurrent) -> Arc<Self> {
        let handle = AtomicPtr::new(handle);
        let state = Mutex::new(State { handle, usage: Usage::Idle, reason: None, ended: None });
        Arc::new(Self { api, make_current, state })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A thread that panics leaves the state consistent, so a poisoned lock can be used.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests an abort of the communicator while the rank's thread may be blocked in NCCL or in
    /// the driver. After the abort the rank receives `reason`. An idle communicator is aborted at
    /// the first request, and a waiting call at the `REQUESTS`th. During `Usage::Brief` a request
    /// does nothing.
    ///
    /// The abort ends the waiting call. NCCL's guide recommends non-blocking communicators to
    /// programs that abort, because a call that returns during the abort still uses memory that the
    /// abort frees. Blocking communicators accept this risk, because their ranks would otherwise
    /// wait forever for a lost rank. See `Options::blocking`.
    pub(in crate::comm::nccl) fn abort_for(&self, reason: &Error) {
        let mut state = self.state();
        match &mut state.usage {
            Usage::Idle => {}
            Usage::Brief => return,
            Usage::Waiting(requests) => {
                *requests += 1;
                if *requests < REQUESTS {
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

    /// Whether the communicator has ended.
    pub(in crate::comm::nccl) fn is_over(&self) -> bool {
        self.state().handle.get_mut().is_null()
    }

    /// Returns NCCL's asynchronous error, if any. Threads other than the rank's may call this only
    /// for a blocking communicator: a query of a non-blocking communicator advances its calls.
    pub(in crate::comm::nccl) fn check(&self) -> Result<()> {
        let mut state = self.state();
        let (handle, mut code) = (*state.handle.get_mut(), SUCCESS);
        if !handle.is_null() {
            // SAFETY: the handle is live as long as the state is locked, and `code` is valid
            // for writing the result.
            #[allow(unsafe_code)]
            let _ = unsafe { (self.api.async_error)(handle, &mut code) };
        }
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.api.error("ncclCommGetAsyncError", code, handle)),
        }
    }

    /// Aborts or destroys a communicator whose handle no other thread can obtain any more. The
    /// returned receiver gets a message when NCCL's call has returned.
    ///
    /// NCCL's call runs on a new thread, because it may block. `destroy` waits until the other
    /// ranks destroy too. An abort may wait in the driver for a rank that holds the driver's lock.
    pub(super) fn end(&self, handle: AtomicPtr<c_void>, how: End) -> Receiver<()> {
        let ((done, ended), handle, make_current) =
            (channel(), Arc::new(handle), Arc::clone(&self.make_current));
        let api = self.api;
        let end = move || {
            let handle = handle.load(Ordering::Relaxed);
            // SAFETY: the handle is live: the caller took it out of `State`, so no other thread can
            // end it or obtain it. Errors are ignored, because nothing can be done about them.
            #[allow(unsafe_code)]
            let _ = unsafe {
                match how {
                    // Without `make_current`, because a driver call may wait for the aborted work.
                    End::Abort => (api.abort)(handle),
                    // NCCL restores the device that was current before. Without `make_current` this
                    // is device 0, and NCCL would create a context there.
                    End::Destroy => make_current().map_or(SUCCESS, |()| (api.destroy)(handle)),
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
    /// The communicators of this rank that other threads are still ending.
    static ENDING: RefCell<Vec<Receiver<()>>> = const { RefCell::new(Vec::new()) };
}

/// Lets [`settle`] wait for the end of a communicator. Does nothing if this thread is exiting,
/// because the thread's list `ENDING` is gone by then.
pub(super) fn add_ending(ended: Option<Receiver<()>>) {
    let _ = ENDING.try_with(|ending| {
        let mut ending = ending.borrow_mut();
        ending.retain(|ended| matches!(ended.try_recv(), Err(TryRecvError::Empty)));
        ending.extend(ended);
    });
}

/// Waits at most two seconds until this thread's communicators have ended, because the process
/// should not exit while NCCL runs in it.
pub(in crate::comm) fn settle() {
    const LIMIT: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    for ended in ENDING.take() {
        let _ = ended.recv_timeout(LIMIT.saturating_sub(begin.elapsed()));
    }
}

/// While this value exists, the rank's thread uses the handle.
pub(super) struct InUse<'a>(&'a SharedComm);

impl<'a> InUse<'a> {
    pub(super) fn new(shared: &'a SharedComm) -> Self {
        shared.state().usage = Usage::Brief;
        Self(shared)
    }

    /// Makes a call that may wait for peers. Another thread can end the call by an abort.
    pub(super) fn wait<R>(&self, call: impl FnOnce() -> R) -> R {
        self.0.state().usage = Usage::Waiting(0);
        let result = call();
        self.0.state().usage = Usage::Brief;
        result
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.0.state().usage = Usage::Idle;
    }
}
