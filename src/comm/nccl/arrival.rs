//! Whether the ranks that a call needs have arrived, and whether they are alive.
//!
//! NCCL does not know which rank a call inside it waits for, so a waiting rank asks the control
//! group.

use crate::{
    comm::{Call, Communicator, ExternalStep, Liveness},
    device::Cpu,
    error::{Error, Result},
};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How long a rank waits for the report of a lost rank after NCCL has reported an error.
const REPORT_DELAY: Duration = Duration::from_millis(500);

/// A call, and the steps outside the control group that all ranks it needs have to reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) call: Call,
    pub(super) step: ExternalStep,
    /// The second step of an exchange with two ranks.
    pub(super) other: Option<ExternalStep>,
}

impl Arrival {
    /// Whether both are the same arrival.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.step.work, self.step.number) == (other.step.work, other.step.number)
    }

    pub(super) fn steps(&self) -> impl Iterator<Item = ExternalStep> {
        [Some(self.step), self.other].into_iter().flatten()
    }

    /// Records that this rank has arrived.
    pub(super) fn arrive(&self, control: &dyn Communicator<Cpu>) {
        self.steps().for_each(|step| control.reached_step(step));
    }

    /// Returns why a rank that has not arrived cannot arrive.
    pub(super) fn obstacle(&self, control: &dyn Communicator<Cpu>) -> Option<Error> {
        self.steps().find_map(|step| control.lost_at_step(&self.call, step))
    }

    /// As `obstacle`, for another thread.
    pub(super) fn obstacle_for(&self, liveness: &dyn Liveness) -> Option<Error> {
        self.steps().find_map(|step| liveness.lost_at_step(&self.call, step))
    }

    /// Ends the wait, after a time, for the ranks that have not arrived.
    pub(super) fn give_up(&self, control: &dyn Communicator<Cpu>, after: Duration) -> Error {
        control.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// As `give_up`, for another thread.
    pub(super) fn give_up_for(&self, liveness: &dyn Liveness, after: Duration) -> Error {
        liveness.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// Returns the loss that made NCCL fail, which the control group may report a little later;
    /// otherwise NCCL's own error.
    pub(super) fn explain(&self, control: &dyn Communicator<Cpu>, error: Error) -> Error {
        match error {
            Error::Library { .. } => {}
            // Another thread may have found it: the control group has to record that this rank
            // received the error.
            Error::PeerLost { .. } | Error::Deadline { .. } => {
                return self.obstacle(control).unwrap_or(error);
            }
            _ => return error,
        }
        let begin = Instant::now();
        while begin.elapsed() < REPORT_DELAY {
            if let Some(loss) = self.obstacle(control) {
                return loss;
            }
            thread::sleep(Duration::from_millis(1));
        }
        error
    }

    /// Returns a check that ends a wait for NCCL when a rank is lost or the deadline has passed.
    pub(super) fn poll<'a>(
        &'a self,
        control: &'a dyn Communicator<Cpu>,
        deadline: Duration,
    ) -> impl Fn() -> Result<()> + 'a {
        let begin = Instant::now();
        move || match self.obstacle(control) {
            Some(error) => Err(error),
            None if begin.elapsed() > deadline => Err(self.give_up(control, deadline)),
            None => Ok(()),
        }
    }
}
