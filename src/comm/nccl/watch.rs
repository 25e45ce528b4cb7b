//! The thread that watches over ranks which cannot look around themselves.
//!
//! A rank looks around while it waits for its device. It cannot inside of a call of NCCL's that
//! waits for peers, or of the driver's that waits for the device while a collective on it waits for
//! peers. One thread of the process looks around for all its ranks: where a rank is lost, or has
//! not come for the deadline, it aborts the communicator, which ends the call.
//!
//! It makes no call of the driver's: who holds the driver's lock may be the rank that it watches
//! over. So it cannot see what the device has finished, and goes by who has come: a collective can
//! run when all ranks have come to it and to those before it. Where they have come to all, it waits
//! for the loss of a rank, or an error of NCCL's where calls block: a rank that does not look
//! around may as well compute.

use super::{Options, meeting::Meeting, raw::Shared};
use crate::{
    comm::{Communicator, Watchdog},
    device::Cpu,
    error::{Error, Result},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

/// How often it looks.
const TICK: Duration = Duration::from_millis(20);

/// A rank that has not looked for so long may be in a call of the driver's.
const STILL: Duration = Duration::from_secs(1);

/// A communicator that is watched.
pub(super) struct Watch {
    comm: Arc<Shared>,
    watchdog: Option<Mutex<Box<dyn Watchdog>>>,
    deadline: Duration,
    blocking: bool,
    rank: Mutex<Rank>,
}

/// What the rank's thread does, as far as it has said.
struct Rank {
    /// The call that it hands to NCCL, and since when.
    inside: Option<(Meeting, Instant)>,
    /// The collectives that it does not know to be finished.
    under_way: VecDeque<Meeting>,
    /// To how many of them, from the oldest on, all ranks were seen to have come.
    met: usize,
    /// Since when the next is awaited.
    since: Instant,
    looked: Instant,
    /// When the others were last asked whether they have come.
    asked: Instant,
}

/// The communicators of this process.
static WATCHED: Mutex<Vec<Weak<Watch>>> = Mutex::new(Vec::new());

/// There are some.
static SOME: Condvar = Condvar::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section leaves its data half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Watches over a communicator as long as what is returned lives.
    ///
    /// # Errors
    /// When the system has no thread left for it.
    pub(super) fn over(
        comm: Arc<Shared>,
        side: &dyn Communicator<Cpu>,
        options: &Options,
    ) -> Result<Arc<Self>> {
        let (watchdog, now) = (side.watchdog().map(Mutex::new), Instant::now());
        let rank =
            Rank { inside: None, under_way: VecDeque::new(), met: 0, since: now, looked: now, asked: now };
        let (rank, deadline, blocking) = (Mutex::new(rank), options.deadline, options.blocking);
        let watch = Arc::new(Self { comm, watchdog, deadline, blocking, rank });
        static RUNS: Mutex<bool> = Mutex::new(false);
        let mut runs = lock(&RUNS);
        if !*runs {
            let spawned = thread::Builder::new().name("NCCL watch".into()).spawn(run);
            spawned
                .map_err(|error| Error::invalid("NCCL", format!("no thread to watch over ranks: {error}")))?;
            *runs = true;
        }
        drop(runs);
        lock(&WATCHED).push(Arc::downgrade(&watch));
        SOME.notify_all();
        Ok(watch)
    }

    /// The rank hands a call to NCCL, and may stay in there.
    pub(super) fn inside<R>(&self, at: Meeting, call: impl FnOnce() -> R) -> R {
        lock(&self.rank).inside = Some((at, Instant::now()));
        let result = call();
        lock(&self.rank).inside = None;
        result
    }

    /// The rank comes to a collective.
    pub(super) fn started(&self, at: Meeting) {
        let (mut rank, now) = (lock(&self.rank), Instant::now());
        if rank.met == rank.under_way.len() {
            rank.since = now;
        }
        rank.under_way.push_back(at);
        rank.looked = now;
    }

    /// The rank has looked around; the oldest collective that is not finished.
    pub(super) fn looked(&self, oldest: Option<&Meeting>) {
        let (mut rank, now) = (lock(&self.rank), Instant::now());
        rank.looked = now;
        while rank.under_way.front().is_some_and(|front| oldest.is_none_or(|oldest| !front.is(oldest))) {
            rank.under_way.pop_front();
            if rank.met == 0 {
                rank.since = now;
            }
            rank.met = rank.met.saturating_sub(1);
        }
    }

    /// Looks around for the rank, if it cannot.
    fn look(&self) {
        let rank = lock(&self.rank);
        let is_still = rank.looked.elapsed() > STILL;
        let waits = rank.inside.is_some() || (is_still && !rank.under_way.is_empty());
        if !waits || self.comm.is_over() {
            return;
        }
        let (inside, under_way) = (rank.inside, rank.under_way.clone());
        drop(rank);
        let failed = self.blocking.then(|| self.comm.check()).and_then(Result::err);
        let reason = failed.or_else(|| match &self.watchdog {
            Some(watchdog) => self.reason(&**lock(watchdog), inside, &under_way),
            // Only the time is known, and of a collective on the device not even whether it is
            // finished.
            None => inside
                .filter(|(_, since)| since.elapsed() > self.deadline)
                .map(|_| Error::invalid("NCCL", format!("{:?} have passed inside of a call", self.deadline))),
        });
        if let Some(reason) = reason {
            self.comm.abort_for(&reason);
        }
    }

    /// Why what the rank waits for has to end.
    fn reason(
        &self,
        watchdog: &dyn Watchdog,
        inside: Option<(Meeting, Instant)>,
        under_way: &VecDeque<Meeting>,
    ) -> Option<Error> {
        let all = inside.iter().map(|(at, _)| at).chain(under_way);
        if let Some(error) = all.into_iter().find_map(|at| at.obstacle_for(watchdog)) {
            return Some(error);
        }
        match inside {
            Some((at, since)) => (since.elapsed() > self.deadline).then_some(at),
            None => self.late(watchdog),
        }
        .map(|at| at.give_up_for(watchdog, self.deadline))
    }

    /// The first collective to which not all ranks have come, if they are late for it.
    fn late(&self, watchdog: &dyn Watchdog) -> Option<Meeting> {
        let mut rank = lock(&self.rank);
        if rank.asked.elapsed() < STILL {
            return None;
        }
        rank.asked = Instant::now();
        while let Some(at) = rank.under_way.get(rank.met).copied() {
            let is_late = rank.since.elapsed() > self.deadline;
            // The rank goes on while the others are asked.
            drop(rank);
            let is_absent = || at.steps().any(|step| !watchdog.absent(step).is_empty());
            if is_absent() {
                // A rank whose answer was slow has another chance.
                return (is_late && is_absent()).then_some(at);
            }
            rank = lock(&self.rank);
            if rank.under_way.get(rank.met).is_some_and(|next| next.is(&at)) {
                (rank.met, rank.since) = (rank.met + 1, Instant::now());
            }
        }
        None
    }
}

fn run() {
    loop {
        let watched = {
            let mut watched = lock(&WATCHED);
            watched.retain(|watch| watch.strong_count() > 0);
            while watched.is_empty() {
                watched = SOME.wait(watched).unwrap_or_else(PoisonError::into_inner);
            }
            watched.clone()
        };
        watched.iter().filter_map(Weak::upgrade).for_each(|watch| watch.look());
        thread::sleep(TICK);
    }
}
