//! Ranks as processes that a launcher has started, connected by TCP.

use super::{Env, rendezvous::Rendezvous};
use crate::{
    comm::{self, Group, Link},
    device::Cpu,
    error::{LostReason, Result},
    trace,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    time::Duration,
};

/// Longer than any job lasts, and short enough to be added to an instant.
const FOREVER: Duration = Duration::from_secs(1 << 32);

impl Env {
    /// Connects to the other processes and runs `rank` with a group of all of them. This is
    /// [`crate::launch::threads`] for processes started by a launcher. The group is a [`Link`].
    ///
    /// Returns when all ranks have left the group. A rank gives up on the others after `deadline`.
    ///
    /// # Errors
    /// When not all ranks come within the deadline, when `rank` fails, and when another rank has
    /// sent this one a message that it did not receive.
    pub fn run<R>(&self, deadline: Duration, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let connections = Rendezvous::new(self)?.join(deadline.min(FOREVER))?;
        trace::begin(format!("{}.{}", self.job, self.epoch), self.rank, self.world, trace::folder());
        let world = Group::new(Rc::new(Link::world(&connections)), &Cpu::new());
        let result = catch_unwind(AssertUnwindSafe(|| rank(world)));
        trace::end(&result);
        connections.close(match &result {
            Ok(Ok(_)) => LostReason::Left,
            Ok(Err(_)) => LostReason::Failed,
            Err(_) => LostReason::Panicked,
        });
        comm::settle();
        match result {
            Ok(Ok(result)) => connections.unread().map_or(Ok(result), Err),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }
}
