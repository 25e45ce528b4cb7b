//! Where the ranks of a call meet: what a rank that waits inside of NCCL, which knows no names, asks the side.

use crate::{
    comm::{Call, Communicator, ExternalStep, Watchdog},
    device::Cpu,
    error::{Error, Result},
};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How long is waited for word of a lost rank after NCCL has said that something is wrong.
const WORD: Duration = Duration::from_millis(500);

/// A call, and the steps beside the side to which all that it needs have to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meeting {
    pub(super) call: Call,
    pub(super) step: ExternalStep,
    /// An exchange with two ranks has two.
    pub(super) other: Option<ExternalStep>,
}

impl Meeting {
    /// Whether it is the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        (self.step.work, self.step.number) == (other.step.work, other.step.number)
    }

    pub(super) fn steps(&self) -> impl Iterator<Item = ExternalStep> {
        [Some(self.step), self.other].into_iter().flatten()
    }

    /// This rank has come.
    pub(super) fn come(&self, side: &dyn Communicator<Cpu>) {
        self.steps().for_each(|step| side.reached_step(step));
    }

    /// What keeps a rank from coming that has not.
    pub(super) fn obstacle(&self, side: &dyn Communicator<Cpu>) -> Option<Error> {
        self.steps().find_map(|step| side.lost_at_step(&self.call, step))
    }

    /// As `obstacle`, for another thread.
    pub(super) fn obstacle_for(&self, watchdog: &dyn Watchdog) -> Option<Error> {
        self.steps().find_map(|step| watchdog.lost_at_step(&self.call, step))
    }

    /// The end of the wait for those that have not come for so long.
    pub(super) fn give_up(&self, side: &dyn Communicator<Cpu>, after: Duration) -> Error {
        side.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// As `give_up`, for another thread.
    pub(super) fn give_up_for(&self, watchdog: &dyn Watchdog, after: Duration) -> Error {
        watchdog.give_up(&self.call, &self.steps().collect::<Vec<_>>(), after)
    }

    /// The loss that made NCCL fail, of which word comes on the side, perhaps a little later; else NCCL's own words.
    pub(super) fn explain(&self, side: &dyn Communicator<Cpu>, error: Error) -> Error {
        match error {
            Error::Library { .. } => {}
            // Another thread may have learned it: the side has to know that this rank was told.
            Error::PeerLost { .. } | Error::Deadline { .. } => return self.obstacle(side).unwrap_or(error),
            _ => return error,
        }
        let begin = Instant::now();
        while begin.elapsed() < WORD {
            if let Some(loss) = self.obstacle(side) {
                return loss;
            }
            thread::sleep(Duration::from_millis(1));
        }
        error
    }

    /// PipelineEnds the wait for NCCL where a rank is lost or it takes too long.
    pub(super) fn patience<'a>(
        &'a self,
        side: &'a dyn Communicator<Cpu>,
        deadline: Duration,
    ) -> impl Fn() -> Result<()> + 'a {
        let begin = Instant::now();
        move || match self.obstacle(side) {
            Some(error) => Err(error),
            None if begin.elapsed() > deadline => Err(self.give_up(side, deadline)),
            None => Ok(()),
        }
    }
}
