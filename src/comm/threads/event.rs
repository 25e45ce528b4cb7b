//! Waiting for another rank: a waiter spins, then yields, then sleeps.

use super::sync::{AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, spin_loop, yield_now};
use std::time::{Duration, Instant};

/// How many times a waiter yields before it sleeps.
const YIELDS: u32 = if cfg!(any(loom, shuttle)) { 0 } else { 200 };

/// Lets ranks wait for a change of shared state. See `README.md`, "Waiting".
#[derive(Debug)]
pub(super) struct Event {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    spins: u32,
}

impl Event {
    /// Creates an event whose waiters check their condition `spins` times before they yield.
    pub(super) fn new(spins: u32) -> Self {
        Self { sleepers: AtomicUsize::new(0), lock: Mutex::new(()), wake: Condvar::new(), spins }
    }

    /// Wakes the sleeping waiters. Call it after a change of the state that their conditions read.
    pub(super) fn notify(&self) {
        // A read-modify-write instead of a load, so that this access and a sleeper's increment are
        // totally ordered. See `README.md`, "Waiting".
        if self.sleepers.fetch_add(0, Ordering::AcqRel) > 0 {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    /// Waits until `done` returns a value, for at most `patience` if it is given.
    pub(super) fn wait_until<R>(
        &self,
        patience: Option<Duration>,
        mut done: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        for _ in 0..self.spins {
            if let Some(result) = done() {
                return Some(result);
            }
            spin_loop();
        }
        for _ in 0..YIELDS {
            if let Some(result) = done() {
                return Some(result);
            }
            yield_now();
        }
        let start = Instant::now();
        // Ignores poison, because the lock guards no data.
        let mut guard = self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.sleepers.fetch_add(1, Ordering::AcqRel);
        let result = loop {
            if let Some(result) = done() {
                break Some(result);
            }
            let Some(left) = left_of(patience, start) else { break None };
            guard = self.sleep(guard, left);
        };
        self.sleepers.fetch_sub(1, Ordering::AcqRel);
        result
    }

    #[cfg(not(any(loom, shuttle)))]
    fn sleep<'a>(&self, guard: MutexGuard<'a, ()>, left: Duration) -> MutexGuard<'a, ()> {
        // The system's clock cannot add arbitrarily long durations, so sleep for at most an hour.
        // The caller's loop then sleeps again.
        let left = left.min(Duration::from_secs(3600));
        match self.wake.wait_timeout(guard, left) {
            Ok((guard, _)) => guard,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }

    /// Time does not pass in a model, so the sleep has no limit. The model checker reports a
    /// sleeper that no thread wakes as a deadlock.
    #[cfg(any(loom, shuttle))]
    fn sleep<'a>(&self, guard: MutexGuard<'a, ()>, _: Duration) -> MutexGuard<'a, ()> {
        self.wake.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Returns the rest of `patience`; none if it is over.
#[cfg(not(shuttle))]
fn left_of(patience: Option<Duration>, start: Instant) -> Option<Duration> {
    patience.map_or(Some(Duration::MAX), |all| all.checked_sub(start.elapsed()))
}

/// In a model, a patience of at most a millisecond is over at once, because the schedule decides
/// which rank comes first. A longer patience never ends.
#[cfg(shuttle)]
fn left_of(patience: Option<Duration>, _: Instant) -> Option<Duration> {
    let is_short = patience.is_some_and(|all| all <= Duration::from_millis(1));
    (!is_short).then_some(Duration::MAX)
}
