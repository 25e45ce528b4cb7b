//! The watchdog: a thread that checks for lost ranks on behalf of ranks that cannot do so
//! themselves.
//!
//! A rank polls its communicator while it waits for its device. It cannot do so inside a call of
//! NCCL that waits for peers, or inside a call of the driver that waits for the device while a
//! collective on it waits for peers. One thread of the process polls for all its ranks: if a rank
//! is lost, or has not arrived by the deadline, it aborts the communicator, which ends the call.
//!
//! The thread makes no call of the driver, since the rank that it watches may hold the driver's
//! lock. So it cannot see what the device has finished, and judges by arrivals: a collective can
//! run once all ranks have arrived at it and at those before it. If they have arrived at all, the
//! thread waits for the loss of a rank, or for an error of NCCL if calls block: a rank that does
//! not poll may simply be computing.

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

/// How often the thread polls.
const INTERVAL: Duration = Duration::from_millis(20);

/// A rank that has not polled for so long may be inside a call of the driver.
const SILENCE: Duration = Duration::from_secs(1);

/// A communicator that is watched.
pub(super) struct Watchdog {
    comm: Arc<SharedComm>,
    liveness: Option<Mutex<Box<dyn Liveness>>>,
    deadline: Duration,
    blocking: bool,
    rank: Mutex<Rank>,
}

/// What the rank's thread does, as far as it has reported.
struct Rank {
    /// The call that it makes into NCCL, and since when.
    inside: Option<(Arrival, Instant)>,
    /// The collectives that are not known to be finished.
    pending: VecDeque<Arrival>,
    /// At how many of them, from the oldest on, all ranks are known to have arrived.
    arrived: usize,
    /// Since when the next one is awaited.
    since: Instant,
    polled: Instant,
    /// When the other ranks were last asked whether they have arrived.
    asked: Instant,
}

/// The communicators of this process.
static WATCHED: Mutex<Vec<Weak<Watchdog>>> = Mutex::new(Vec::new());

/// Notified when a communicator is added.
static ADDED: Condvar = Condvar::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section leaves its data half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Watches a communicator as long as the returned value lives.
    ///
    /// # Errors
    /// When the system cannot start the thread.
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
            spawned
                .map_err(|error| Error::invalid("NCCL", format!("no thread to watch over ranks: {error}")))?;
            *runs = true;
        }
        drop(runs);
        lock(&WATCHED).push(Arc::downgrade(&watchdog));
        ADDED.notify_all();
        Ok(watchdog)
    }

    /// Makes a call into NCCL, in which the rank may block.
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

    /// Records that the rank has polled, and the oldest collective that is not finished.
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

    /// Polls for the rank, if the rank cannot.
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
            // Only the time in the call is known. Whether a collective on the device is finished is
            // not.
            None => inside
                .filter(|(_, since)| since.elapsed() > self.deadline)
                .map(|_| Error::invalid("NCCL", format!("{:?} have passed inside of a call", self.deadline))),
        });
        if let Some(reason) = reason {
            self.comm.abort_for(&reason);
        }
    }

    /// Returns why the rank's wait has to end.
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

    /// The first collective at which not all ranks have arrived, if its deadline has passed.
    fn late(&self, liveness: &dyn Liveness) -> Option<Arrival> {
        let mut rank = lock(&self.rank);
        if rank.asked.elapsed() < SILENCE {
            return None;
        }
        rank.asked = Instant::now();
        while let Some(at) = rank.pending.get(rank.arrived).copied() {
            let is_late = rank.since.elapsed() > self.deadline;
            // Does not block the rank while the others are asked.
            drop(rank);
            let is_absent = || at.steps().any(|step| !liveness.absent(step).is_empty());
            if is_absent() {
                // Asks again: an answer may have been slow.
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
