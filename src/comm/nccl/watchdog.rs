//! The watchdog: a thread that checks for lost ranks while the ranks of its process cannot.
//!
//! A rank polls its communicator while it waits for its device. It cannot poll inside an NCCL call
//! that waits for peers. Nor can it poll inside a driver call that waits for the device, while a
//! collective on the device waits for peers. So one thread of the process polls for all its ranks.
//! If a rank is lost, or has not arrived by the deadline, the watchdog aborts the communicator. The
//! abort ends the call.
//!
//! The watchdog makes no driver call, because the rank that it watches may hold the driver's lock.
//! So it cannot see which work the device has finished, and uses arrivals instead. A collective can
//! run as soon as all ranks have arrived at it and at all earlier collectives. From then on the
//! watchdog acts only on a lost rank, or on an NCCL error of a blocking communicator. It applies no
//! deadline then, because a rank that does not poll may simply be computing. For a rank inside an
//! NCCL call, the deadline counts from the start of the call.

use super::{Options, arrival::Arrival, raw::SharedComm};
use crate::{
    comm::{Communicator, Liveness},
    device::Cpu,
    error::{Error, Result},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

/// The time between two polls of the watchdog.
const INTERVAL: Duration = Duration::from_millis(20);

/// The watchdog polls on behalf of a rank that has not polled for this long, because the rank may
/// be inside a driver call. The watchdog also waits this long before it asks for arrivals again.
const SILENCE: Duration = Duration::from_secs(1);

/// A communicator that the watchdog watches.
pub(super) struct Watchdog {
    comm: Arc<SharedComm>,
    liveness: Option<Mutex<Box<dyn Liveness>>>,
    deadline: Duration,
    blocking: bool,
    rank: Mutex<Rank>,
}

/// The state of the rank's thread, as the thread last reported it.
struct Rank {
    /// The NCCL call that the thread is inside, and the start of the call.
    inside: Option<(Arrival, Instant)>,
    /// The collectives that are not known to be finished, oldest first.
    pending: VecDeque<Arrival>,
    /// The number of `pending` collectives at which all ranks have arrived. These are the oldest
    /// ones.
    arrived: usize,
    /// The start of the wait for arrivals at the next collective.
    since: Instant,
    polled: Instant,
    /// When the watchdog last asked whether the other ranks have arrived.
    asked: Instant,
}

/// The watched communicators of this process.
static WATCHED: Mutex<Vec<Weak<Watchdog>>> = Mutex::new(Vec::new());

/// Notified when a communicator is added.
static ADDED: Condvar = Condvar::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics leaves the data consistent, so a poisoned lock can be used.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Watches a communicator as long as the returned value lives.
    ///
    /// # Errors
    /// When the system cannot start the watchdog's thread.
    pub(super) fn watch(
        comm: Arc<SharedComm>,
        control: &dyn Communicator<Cpu>,
        options: &Options,
    ) -> Result<Arc<Self>> {
        let (liveness, now) = (control.liveness().map(Mutex::new), Instant::now());
        let rank =
            Rank { inside: None, pending: VecDeque::new(), arrived: 0, since: now, polled: now, asked: now };
        let (rank, deadline, blocking) = (Mutex::new(rank), options.deadline, options.blocking);
        let watchdog = Arc::new(Self { comm, liveness, deadline, blocking, rank });
        static RUNS: Mutex<bool> = Mutex::new(false);
        let mut runs = lock(&RUNS);
        if !*runs {
            let spawned = thread::Builder::new().name("NCCL watch".into()).spawn(run);
            spawned.map_err(|error| Error::invalid("NCCL", format!("cannot start the watchdog: {error}")))?;
            *runs = true;
        }
        drop(runs);
        lock(&WATCHED).push(Arc::downgrade(&watchdog));
        ADDED.notify_all();
        Ok(watchdog)
    }

    /// Makes a call into NCCL in which the rank may block.
    pub(super) fn inside<R>(&self, at: Arrival, call: impl FnOnce() -> R) -> R {
        lock(&self.rank).inside = Some((at, Instant::now()));
        let result = call();
        lock(&self.rank).inside = None;
        result
    }

    /// Records that the rank launches a collective.
    pub(super) fn started(&self, at: Arrival) {
        let (mut rank, now) = (lock(&self.rank), Instant::now());
        if rank.arrived == rank.pending.len() {
            rank.since = now;
        }
        rank.pending.push_back(at);
        rank.polled = now;
    }

    /// Records that the rank has polled. `oldest` is its oldest unfinished collective.
    pub(super) fn polled(&self, oldest: Option<&Arrival>) {
        let (mut rank, now) = (lock(&self.rank), Instant::now());
        rank.polled = now;
        while rank.pending.front().is_some_and(|front| oldest.is_none_or(|oldest| !front.is_same(oldest))) {
            rank.pending.pop_front();
            if rank.arrived == 0 {
                rank.since = now;
            }
            rank.arrived = rank.arrived.saturating_sub(1);
        }
    }

    /// Polls on behalf of the rank, if the rank is inside NCCL or has not polled for long.
    fn poll(&self) {
        let rank = lock(&self.rank);
        let is_silent = rank.polled.elapsed() > SILENCE;
        let waits = rank.inside.is_some() || (is_silent && !rank.pending.is_empty());
        if !waits || self.comm.is_over() {
            return;
        }
        let (inside, pending) = (rank.inside, rank.pending.clone());
        drop(rank);
        let failed = self.blocking.then(|| self.comm.check()).and_then(Result::err);
        let reason = failed.or_else(|| match &self.liveness {
            Some(liveness) => self.reason(&**lock(liveness), inside, &pending),
            // This control group cannot report arrivals, so the watchdog knows only how long the
            // rank has been inside the call. It does not know whether the device has finished a
            // collective.
            None => inside.filter(|(_, since)| since.elapsed() > self.deadline).map(|_| {
                Error::invalid("NCCL", format!("a call into NCCL has taken longer than {:?}", self.deadline))
            }),
        });
        if let Some(reason) = reason {
            self.comm.abort_for(&reason);
        }
    }

    /// Returns the error that ends the rank's wait, if there is one.
    fn reason(
        &self,
        liveness: &dyn Liveness,
        inside: Option<(Arrival, Instant)>,
        pending: &VecDeque<Arrival>,
    ) -> Option<Error> {
        let all = inside.iter().map(|(at, _)| at).chain(pending);
        if let Some(error) = all.into_iter().find_map(|at| at.obstacle_for(liveness)) {
            return Some(error);
        }
        match inside {
            Some((at, since)) => (since.elapsed() > self.deadline).then_some(at),
            None => self.late(liveness),
        }
        .map(|at| at.give_up_for(liveness, self.deadline))
    }

    /// Returns the first collective at which not all ranks have arrived, if its deadline has
    /// passed.
    fn late(&self, liveness: &dyn Liveness) -> Option<Arrival> {
        let mut rank = lock(&self.rank);
        if rank.asked.elapsed() < SILENCE {
            return None;
        }
        rank.asked = Instant::now();
        while let Some(at) = rank.pending.get(rank.arrived).copied() {
            let is_late = rank.since.elapsed() > self.deadline;
            // Unlocks first, so that the rank does not wait while the watchdog asks for arrivals.
            drop(rank);
            let is_absent = || at.steps().any(|step| !liveness.absent(step).is_empty());
            if is_absent() {
                // Asks again, because the first answer may have taken long.
                return (is_late && is_absent()).then_some(at);
            }
            rank = lock(&self.rank);
            if rank.pending.get(rank.arrived).is_some_and(|next| next.is_same(&at)) {
                (rank.arrived, rank.since) = (rank.arrived + 1, Instant::now());
            }
        }
        None
    }
}

fn run() {
    loop {
        let watched = {
            let mut watched = lock(&WATCHED);
            watched.retain(|watchdog| watchdog.strong_count() > 0);
            while watched.is_empty() {
                watched = ADDED.wait(watched).unwrap_or_else(PoisonError::into_inner);
            }
            watched.clone()
        };
        watched.iter().filter_map(Weak::upgrade).for_each(|watchdog| watchdog.poll());
        thread::sleep(INTERVAL);
    }
}
