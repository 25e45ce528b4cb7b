//! Vector clocks: which operations the program has ordered before which others.

use std::sync::{Mutex, PoisonError};

/// The number of operations of each stream that are ordered before, by stream number.
#[derive(Clone, Default, Debug)]
pub struct Clock(Vec<u64>);

impl Clock {
    const fn new() -> Self {
        Self(Vec::new())
    }

    /// Merges another clock into this one.
    pub fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }

    /// Counts one more operation of `stream` and returns its number.
    pub fn tick(&mut self, stream: usize) -> u64 {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] += 1;
        self.0[stream]
    }

    /// Whether operation `tick` of `stream` is ordered before the holder of this clock.
    pub fn covers(&self, stream: usize, tick: u64) -> bool {
        self.0.get(stream).is_some_and(|&seen| seen >= tick)
    }

    /// The number of operations of `stream` that are ordered before.
    pub fn at(&self, stream: usize) -> u64 {
        self.0.get(stream).copied().unwrap_or(0)
    }

    /// Sets the number of operations of `stream` that are ordered before.
    pub fn set(&mut self, stream: usize, tick: u64) {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] = tick;
    }
}

// One clock for all host threads. Their mutual order is not visible here, and a clock per thread
// would raise false alarms.
static HOST: Mutex<Clock> = Mutex::new(Clock::new());

/// Merges what the host has waited for.
pub fn join_host(clock: &mut Clock) {
    clock.join(&HOST.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Records that the host has waited for everything in `clock`.
pub fn host_waited(clock: &Clock) {
    HOST.lock().unwrap_or_else(PoisonError::into_inner).join(clock);
}
