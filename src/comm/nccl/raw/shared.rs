//! The communicator handle that the rank's thread shares with others, which may abort it; and the
//! end of communicators.

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

/// The communicator handle that other threads than the rank's may use: they can abort it.
pub(in crate::comm::nccl) struct SharedComm {
    api: &'static Api,
    pub(super) make_current: MakeCurrent,
    state: Mutex<State>,
}

pub(super) struct State {
    /// Null once the communicator has ended.
    pub(super) handle: AtomicPtr<c_void>,
    usage: Usage,
    /// Why another thread has ended it.
    pub(super) reason: Option<Error>,
    /// Receives when that thread's call has returned.
    pub(super) ended: Option<Receiver<()>>,
}

/// What the rank's thread does with the handle.
enum Usage {
    Idle,
    /// Calls that do not wait for peers, such as those of a group before its end.
    Brief,
    /// A call that may wait for peers, and how often another thread has requested its end.
    Waiting(u32),
}

/// How often another thread has to request the end of a call before it aborts the call. Until then
/// the call may not have reached NCCL, or may be returning.
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
        // No critical section leaves its data half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Aborts the communicator on behalf of the rank's thread, which may be inside a call of NCCL
    /// that waits for peers, or of the driver. The rank then receives `reason`. Does nothing yet if
    /// the thread is between other calls, or has only just made this one.
    ///
    /// The abort ends the call. NCCL's guide recommends non-blocking communicators if they may be
    /// aborted, since a call that returns at that moment still uses what the abort frees. To wait
    /// forever for a lost rank is worse; `Options::blocking` leaves the choice.
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

    /// Whether it has ended.
    pub(in crate::comm::nccl) fn is_over(&self) -> bool {
        self.state().handle.get_mut().is_null()
    }

    /// Returns an asynchronous error of NCCL, for another thread than the rank's. Only for a
    /// blocking communicator: a non-blocking one advances its calls when it is queried.
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

    /// Ends the communicator of a handle that no thread can obtain any more. The receiver receives
    /// when that is done.
    ///
    /// A thread of its own does it: destroying waits for the other ranks to do the same, and the
    /// driver may block an abort on a rank that holds its lock.
    pub(super) fn end(&self, handle: AtomicPtr<c_void>, how: End) -> Receiver<()> {
        let ((done, ended), handle, make_current) =
            (channel(), Arc::new(handle), Arc::clone(&self.make_current));
        let api = self.api;
        let end = move || {
            let handle = handle.load(Ordering::Relaxed);
            // SAFETY: the handle was live, and a thread that asks for it from then on receives
            // none. A failure leaves nothing to be done.
            #[allow(unsafe_code)]
            let _ = unsafe {
                match how {
                    // Before any call into the driver, which may wait for what the abort ends.
                    End::Abort => (api.abort)(handle),
                    // NCCL restores the device that was current. Without this it is device 0, on
                    // which that creates a context.
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
    /// The communicators of this rank that are being ended.
    static ENDING: RefCell<Vec<Receiver<()>>> = const { RefCell::new(Vec::new()) };
}

/// Lets [`settle`] wait for the end of a communicator. Does nothing if the thread ends, and a group
/// with it.
pub(super) fn add_ending(ended: Option<Receiver<()>>) {
    let _ = ENDING.try_with(|ending| {
        let mut ending = ending.borrow_mut();
        ending.retain(|ended| matches!(ended.try_recv(), Err(TryRecvError::Empty)));
        ending.extend(ended);
    });
}

/// Waits until this thread's communicators are ended, at most two seconds: the process should not
/// exit while NCCL runs in it.
pub(in crate::comm) fn settle() {
    const LIMIT: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    for ended in ENDING.take() {
        let _ = ended.recv_timeout(LIMIT.saturating_sub(begin.elapsed()));
    }
}

/// Marks that the rank's thread uses the handle, as long as it exists.
pub(super) struct InUse<'a>(&'a SharedComm);

impl<'a> InUse<'a> {
    pub(super) fn new(shared: &'a SharedComm) -> Self {
        shared.state().usage = Usage::Brief;
        Self(shared)
    }

    /// Makes a call that may wait for peers, which another thread can end by an abort.
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
