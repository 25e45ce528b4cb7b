//! Checks whether the ranks that a call needs have arrived and are alive.
//!
//! NCCL does not report which rank a blocked call waits for, so a waiting rank asks the control
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

/// How long a rank waits, after an NCCL error, for the control group to report a lost rank.
const REPORT_DELAY: Duration = Duration::from_millis(500);

/// A call and its external steps. Every rank that the call needs has to reach these steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) call: Call,
    pub(super) step: ExternalStep,
    /// The second step of an exchange in which this rank both sends and receives.
    pub(super) other: Option<ExternalStep>,
}

impl Arrival {
    /// Whether both arrivals have the same first step.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.step.work, self.step.number) == (other.step.work, other.step.number)
    }

    pub(super) fn steps(&self) -> impl Iterator<Item = ExternalStep> {
        [Some(self.step), self.other].into_iter().flatten()
    }

    /// Records on the control group that this rank has arrived.
    pub(super) fn arrive(&self, control: &dyn Communicator<Cpu>) {
        self.steps().for_each(|step| control.reached_step(step));
    }

    /// Returns the failure that keeps another rank from arriving, if there is one.
    pub(super) fn obstacle(&self, control: &dyn Communicator<Cpu>) -> Option<Error> {
        self.steps().find_map(|step| control.lost_at_step(&self.call, step))
    }

    /// Like `obstacle`, for the watchdog's thread.
    pub(super) fn obstacle_for(&self, liveness: &dyn Liveness) -> Option<Error> {
        self.steps().find_map(|step| liveness.lost_at_step(&self.call, step))
    }

    /// Breaks the control group, because this rank has waited for the time `after`. Returns the
    /// error, which names the ranks that have not arrived.
    pub(super) fn give_up(&self, control: &dyn Communicator<Cpu>, after: Duration) -> Error {
        control.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// Like `give_up`, for the watchdog's thread.
    pub(super) fn give_up_for(&self, liveness: &dyn Liveness, after: Duration) -> Error {
        liveness.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// Explains an NCCL error: returns the loss of a rank, if the control group reports a lost rank
    /// within [`REPORT_DELAY`]. Otherwise returns `error`.
    pub(super) fn explain(&self, control: &dyn Communicator<Cpu>, error: Error) -> Error {
        match error {
            Error::Library { .. } => {}
            // The watchdog may have found this error. `obstacle` makes the control group record
            // that this rank knows of the lost rank.
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

    /// Returns a check for a loop that waits for NCCL. The check fails if a rank is lost or the
    /// deadline has passed.
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
