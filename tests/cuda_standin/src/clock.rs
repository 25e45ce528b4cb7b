//! Vector clocks: which operations the program has ordered before which.

use std::sync::{Mutex, PoisonError};

/// For each stream, by its number, how many of its operations are known to come before.
#[derive(Clone, Default, Debug)]
pub struct Clock(Vec<u64>);

impl Clock {
    const fn new() -> Self {
        Self(Vec::new())
    }

    /// Takes in what another clock knows.
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

    /// Whether operation `tick` of `stream` is ordered before whoever holds this clock.
    pub fn covers(&self, stream: usize, tick: u64) -> bool {
        self.0.get(stream).is_some_and(|&seen| seen >= tick)
    }

    /// How many operations of `stream` come before.
    pub fn at(&self, stream: usize) -> u64 {
        self.0.get(stream).copied().unwrap_or(0)
    }

    /// States how many operations of `stream` come before.
    pub fn set(&mut self, stream: usize, tick: u64) {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] = tick;
    }
}

// One clock for all host threads: how they order each other cannot be seen from here, and a clock for each would raise false alarms.
static HOST: Mutex<Clock> = Mutex::new(Clock::new());

/// Takes in what the host has waited for.
pub fn join_host(clock: &mut Clock) {
    clock.join(&HOST.lock().unwrap_or_else(PoisonError::into_inner));
}

/// The host has waited for everything in `clock`.
pub fn host_waited(clock: &Clock) {
    HOST.lock().unwrap_or_else(PoisonError::into_inner).join(clock);
}
