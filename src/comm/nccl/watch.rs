//! The thread that watches over ranks which cannot look around themselves.
//!
//! A rank looks around while it waits for its device. It cannot inside of a call of NCCL's that
//! waits for peers, or of the driver's that waits for the device while a collective on it waits for
//! peers. One thread of the process looks around for all its ranks: where a rank is lost, or has
//! not come for the deadline, it ends the communicator, which ends the call.
//!
//! It makes no call of the driver's: who holds the driver's lock may be the rank that it watches
//! over.

use super::{meeting::Meeting, raw::Shared};
use crate::{
    comm::{Communicator, Lookout},
    device::Cpu,
    error::{Error, Result},
};
use std::{
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
    lookout: Option<Mutex<Box<dyn Lookout>>>,
    deadline: Duration,
    rank: Mutex<Rank>,
}

/// What the rank's thread does, as far as it has said.
struct Rank {
    /// The call that it hands to NCCL, and since when.
    inside: Option<(Meeting, Instant)>,
    /// The oldest collective that it does not know to be finished, and since when that was to be
    /// expected.
    oldest: Option<(Meeting, Instant)>,
    looked: Instant,
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
        deadline: Duration,
    ) -> Result<Arc<Self>> {
        let rank = Mutex::new(Rank { inside: None, oldest: None, looked: Instant::now() });
        let watch = Arc::new(Self { comm, lookout: side.lookout().map(Mutex::new), deadline, rank });
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

    /// The rank has looked around; the oldest collective that is not finished.
    pub(super) fn looked(&self, oldest: Option<Meeting>) {
        let (mut rank, now) = (lock(&self.rank), Instant::now());
        let same = |(at, _): &(Meeting, Instant)| oldest.is_some_and(|oldest| oldest.is(at));
        rank.oldest = rank.oldest.take().filter(same).or(oldest.map(|oldest| (oldest, now)));
        rank.looked = now;
    }

    /// Looks around for the rank, if it cannot.
    fn look(&self) {
        let (inside, oldest) = {
            let rank = lock(&self.rank);
            (rank.inside, rank.oldest.filter(|_| rank.looked.elapsed() > STILL))
        };
        let Some((at, since)) = inside.or(oldest) else { return };
        if let Some(reason) = self.reason(at, since, inside.is_some()) {
            self.comm.end(&reason);
        }
    }

    /// Why what the rank waits for has to end.
    fn reason(&self, at: Meeting, since: Instant, inside: bool) -> Option<Error> {
        let late = since.elapsed() > self.deadline;
        let Some(lookout) = &self.lookout else {
            // Only the time is known, and of a collective on the device not even whether it is
            // finished.
            let error =
                || Error::invalid("NCCL", format!("{:?} have passed inside of a call", self.deadline));
            return (late && inside).then(error);
        };
        let lookout = lock(lookout);
        if let Some(error) = at.obstacle_for(&**lookout) {
            return Some(error);
        }
        if !late {
            return None;
        }
        // A collective to which all have come may be finished, and the rank compute on its own.
        if !inside && at.steps().all(|step| lookout.absent(step).is_empty()) {
            self.expect_again();
            return None;
        }
        Some(lookout.give_up(&at.call, &at.steps().collect::<Vec<_>>(), self.deadline))
    }

    /// The oldest collective is given its time once more.
    fn expect_again(&self) {
        if let Some((_, since)) = &mut lock(&self.rank).oldest {
            *since = Instant::now();
        }
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
